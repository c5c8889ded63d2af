"""A GPU in the thread of its device worker, with CuPy's low-level functions.

CuPy's arrays, pools and current settings are not used. Addresses are numbers, and every
call goes to CUDA's runtime, to cuBLAS, or to one of gradwire's kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from cupy.cuda import Device as CudaDevice
from cupy.cuda import Event as CudaEvent
from cupy.cuda import Stream as CudaStream
from cupy.cuda import cublas, get_elapsed_time, runtime
from cupy.cuda.compiler import compile_using_nvrtc
from cupy.cuda.function import Module

from gradwire_protocol.dtypes import ACCUMULATORS
from gradwire_protocol.optimizers import Sgd
from gradwire_server.backends.async_device.device import (
    PARTIAL_SUMS,
    Event,
    Events,
    Stream,
    Update,
)
from gradwire_server.backends.async_device.gemm import (
    CUDA_TYPES,
    DEFAULT_ALGORITHM,
    DISALLOW_REDUCED_PRECISION_REDUCTION,
    NO_TRANSPOSE,
    POINTER_MODE_HOST,
    TRANSPOSE,
    DeviceMatrix,
    Gemm,
)
from gradwire_server.backends.base import Array
from gradwire_server.backends.cuda.errors import translated
from gradwire_server.backends.cuda.kernels import (
    THREADS,
    added_name,
    grid,
    kernel_name,
    source_of,
    squares_name,
    update_name,
)
from gradwire_server.backends.cuda.memory_pool import Piece, Pool
from gradwire_server.backends.update_scalars import AdamScalars, SgdScalars


class CupyMemory:
    """A piece of a GPU's memory."""

    def __init__(self, piece: Piece[Any]) -> None:
        self._piece = piece
        self.address = int(piece.memory.ptr)

    def free(self) -> None:
        """Release the memory."""
        self._piece.free()


class CupyDevice:
    """A GPU with streams and a cuBLAS handle, for the calling thread.

    Args:
        index: CUDA's number of the GPU.
        pool: The pool of its memory.

    Raises:
        MemoryError: There is not enough memory for cuBLAS.
        DeviceLostError: The GPU cannot be used.
    """

    def __init__(self, index: int, pool: Pool[Any]) -> None:
        self._pool = pool
        self._streams: dict[Stream, Any] = {}
        with self.errors():
            CudaDevice(index).use()
            self._streams = {each: CudaStream(non_blocking=True) for each in Stream}
            # CuPy sets the handle's stream to the current one at every call.
            self._streams[Stream.COMPUTE].use()
            self._handle = CudaDevice(index).cublas_handle
            cublas.setPointerMode(self._handle, POINTER_MODE_HOST)
            cublas.setMathMode(self._handle, DISALLOW_REDUCED_PRECISION_REDUCTION)
        self._events: list[Events] = []
        self._modules: dict[str, Any] = {}
        """By their source."""
        self._kernels: dict[str, Any] = {}
        self._scalars = {
            (dtype, value): np.array(value, dtype.numpy)
            for dtype in ACCUMULATORS
            for value in (0.0, 1.0)
        }

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Convert CUDA's errors to those of a `BackendJob`."""
        with translated(self._pool.clear, runtime.deviceSynchronize):
            yield

    def allocate(self, size_bytes: int) -> CupyMemory:
        """Allocate memory from the GPU's pool."""
        return CupyMemory(self._pool.take(size_bytes))

    def events(self) -> Events:
        """Return unused events with times, on which a thread can wait."""
        if self._events:
            return self._events.pop()
        return Events(*(CudaEvent(block=True) for _ in range(6)))

    def release_events(self, events: Events) -> None:
        """Keep the events for another block."""
        self._events.append(events)

    def upload(self, source: Array, to: int) -> None:
        """Copy with cudaMemcpyAsync from the array's memory."""
        if source.nbytes:
            runtime.memcpyAsync(
                to,
                source.ctypes.data,
                source.nbytes,
                runtime.memcpyHostToDevice,
                self._streams[Stream.H2D].ptr,
            )

    def download(self, source: int, to: Array) -> None:
        """Copy with cudaMemcpyAsync to the array's memory."""
        if to.nbytes:
            runtime.memcpyAsync(
                to.ctypes.data,
                source,
                to.nbytes,
                runtime.memcpyDeviceToHost,
                self._streams[Stream.D2H].ptr,
            )

    def multiply(self, gemm: Gemm) -> None:
        """Call cublasGemmEx, with alpha and beta in the compute type."""
        scalars = gemm.compute.scalars
        operands = CUDA_TYPES[gemm.operands].number
        result = CUDA_TYPES[gemm.result].number
        cublas.gemmEx(
            self._handle,
            TRANSPOSE if gemm.transa else NO_TRANSPOSE,
            TRANSPOSE if gemm.transb else NO_TRANSPOSE,
            gemm.m,
            gemm.n,
            gemm.k,
            self._scalars[scalars, gemm.alpha].ctypes.data,
            gemm.a,
            operands,
            gemm.lda,
            gemm.b,
            operands,
            gemm.ldb,
            self._scalars[scalars, gemm.beta].ctypes.data,
            gemm.c,
            result,
            gemm.ldc,
            int(gemm.compute),
            DEFAULT_ALGORITHM,
        )

    def clear(self, address: int, size_bytes: int) -> None:
        """Call cudaMemsetAsync."""
        if size_bytes:
            stream = self._streams[Stream.COMPUTE].ptr
            runtime.memsetAsync(address, 0, size_bytes, stream)

    def copy(self, source: int, to: int, size_bytes: int) -> None:
        """Call cudaMemcpyAsync within the GPU's memory."""
        if size_bytes:
            runtime.memcpyAsync(
                to,
                source,
                size_bytes,
                runtime.memcpyDeviceToDevice,
                self._streams[Stream.COMPUTE].ptr,
            )

    def convert(self, source: DeviceMatrix, to: DeviceMatrix, *, add: bool) -> None:
        """Run one of gradwire's kernels."""
        self._run(
            kernel_name(source.dtype, to.dtype, add=add),
            grid(source.size),
            *(source.address, to.address, source.size),
        )

    def add(self, source: DeviceMatrix, to: DeviceMatrix) -> None:
        """Run one of gradwire's kernels."""
        self._run(
            added_name(source.dtype),
            grid(source.size),
            *(source.address, to.address, source.size),
        )

    def sum_squares(self, source: DeviceMatrix, to: int) -> None:
        """Run one of gradwire's kernels, with a block for each partial sum."""
        self._run(
            squares_name(source.dtype),
            PARTIAL_SUMS,
            *(source.address, to, source.size),
        )

    def update(self, update: Update) -> None:
        """Run one of gradwire's kernels."""
        optimizer, dtype, scale = update.optimizer, update.p.dtype, update.scale
        arrays = [each.address for each in (update.p, update.g, *update.states)]
        scalars: tuple[Any, ...]
        if isinstance(optimizer, Sgd):
            if not update.states:
                arrays.append(0)  # the kernel then has no momentum buffer
            flags = map(np.int32, (not update.made, optimizer.nesterov))
            scalars = (*SgdScalars.of(optimizer, dtype, scale), *flags)
        else:
            scalars = AdamScalars.of(optimizer, dtype, scale, update.made + 1)
        size = update.p.size
        name = update_name(optimizer, dtype)
        self._run(name, grid(size), *arrays, size, scalars=scalars)

    def _run(
        self, name: str, blocks: int, *numbers: int, scalars: tuple[Any, ...] = ()
    ) -> None:
        """Run a kernel.

        Args:
            name: Its name.
            blocks: Blocks of the grid.
            numbers: Its arguments of 64 bits, addresses and sizes.
            scalars: Its other arguments, which have the size of theirs.
        """
        self._kernel(name)(
            (blocks,),
            (THREADS,),
            (*map(np.uint64, numbers), *scalars),
            stream=self._streams[Stream.COMPUTE],
        )

    def _kernel(self, name: str) -> Any:
        """Return a kernel. The first call compiles all kernels of its kind.

        NVRTC compiles them in memory: those of jobs in some hundredths of a second,
        those of sessions in some tenths. CuPy's own kernels are not used, because they
        need a writable directory.
        """
        if name not in self._kernels:
            source = source_of(name)
            if source not in self._modules:
                compiled, _ = compile_using_nvrtc(source, cache_in_memory=True)
                self._modules[source] = Module()
                self._modules[source].load(compiled)
            self._kernels[name] = self._modules[source].get_function(name)
        return self._kernels[name]

    def record(self, stream: Stream, event: Event) -> None:
        """Call cudaEventRecord."""
        event.record(self._streams[stream])

    def wait(self, stream: Stream, event: Event) -> None:
        """Call cudaStreamWaitEvent."""
        self._streams[stream].wait_event(event)

    def synchronize(self, event: Event) -> None:
        """Call cudaEventSynchronize, without Python's lock."""
        event.synchronize()

    def elapsed_s(self, begin: Event, end: Event) -> float:
        """Call cudaEventElapsedTime."""
        milliseconds: float = get_elapsed_time(begin, end)
        return milliseconds / 1000

    def synchronize_all(self) -> None:
        """Call cudaStreamSynchronize for each stream."""
        for stream in self._streams.values():
            with suppress(runtime.CUDARuntimeError):
                stream.synchronize()
