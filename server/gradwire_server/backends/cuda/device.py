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
from gradwire_server.backends.async_device.device import Event, Events, Stream
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
from gradwire_server.backends.cuda.kernels import SOURCE, THREADS, grid, kernel_name
from gradwire_server.backends.cuda.memory_pool import Piece, Pool


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
        self._module: Any = None
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

    def convert(self, source: DeviceMatrix, to: DeviceMatrix, *, add: bool) -> None:
        """Run one of gradwire's kernels."""
        self._kernel(kernel_name(source.dtype, to.dtype, add=add))(
            (grid(source.size),),
            (THREADS,),
            tuple(map(np.uint64, (source.address, to.address, source.size))),
            stream=self._streams[Stream.COMPUTE],
        )

    def _kernel(self, name: str) -> Any:
        """Return a kernel. The first call compiles all kernels.

        NVRTC compiles them in memory, in some hundredths of a second. CuPy's own
        kernels are not used, because they need a writable directory.
        """
        if self._module is None:
            compiled, _ = compile_using_nvrtc(SOURCE, cache_in_memory=True)
            self._module = Module()
            self._module.load(compiled)
        if name not in self._kernels:
            self._kernels[name] = self._module.get_function(name)
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
