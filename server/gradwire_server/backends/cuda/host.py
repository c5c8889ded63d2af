"""The process's use of CUDA outside the device workers: devices, memory, versions."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

import cupy
import numpy as np
import numpy.typing as npt
from cupy.cuda import Device as CudaDevice
from cupy.cuda import Memory, PinnedMemory, cublas, get_cublas_handle, runtime

from gradwire_server.backends.async_device.gemm import SUMS_ROUNDED_TO_NEAREST
from gradwire_server.backends.base import DeviceInfo
from gradwire_server.backends.cuda.device import CupyDevice
from gradwire_server.backends.cuda.errors import MEMORY, translated

T = TypeVar("T")

_log = logging.getLogger("gradwire_server")


def all_devices() -> tuple[int, ...]:
    """CUDA's numbers of the GPUs that it shows to this process.

    Raises:
        DeviceLostError: There is none, or no driver that knows this CUDA.
    """
    with translated(_nothing, _nothing):
        return tuple(range(runtime.getDeviceCount()))


def inspect(index: int) -> DeviceInfo:
    """What a GPU is, after it has shown that it answers.

    Raises:
        DeviceLostError: It does not.
        MemoryError: It has no memory left for a process.
    """
    with translated(_nothing, _nothing):
        with_device(index, runtime.memGetInfo)
        properties = runtime.getDeviceProperties(index)
        version = with_device(index, _cublas_version)
    return DeviceInfo(
        backend="cupy",
        index=index,
        name=properties["name"].decode(),
        memory_bytes=properties["totalGlobalMem"],
        library=", ".join(
            [
                f"cublas {version}",
                f"cuda-driver {_cuda_version(runtime.driverGetVersion())}",
                *_cublas_settings(),
            ]
        ),
        # Beside the library and the kind of GPU, bits depend on the number of these.
        threads=properties["multiProcessorCount"],
        compute_capability=f"{properties['major']}.{properties['minor']}",
        sums_rounded_to_nearest=SUMS_ROUNDED_TO_NEAREST,
    )


def libraries() -> dict[str, str]:
    """Versions of CuPy, cuBLAS, and CUDA's runtime and driver."""
    return {
        "cupy": cupy.__version__,
        "cublas": _cublas_version(),
        "cuda-runtime": _cuda_version(runtime.runtimeGetVersion()),
        "cuda-driver": _cuda_version(runtime.driverGetVersion()),
    }


def allocate(size_bytes: int) -> Any:
    """Memory of the calling thread's GPU; its `ptr` is its address.

    Raises:
        MemoryError: There is not so much.
    """
    return _or_memory_error(lambda: Memory(size_bytes))


def allocate_pinned(size_bytes: int) -> Any:
    """Host memory that is pinned for every GPU; its `ptr` is its address.

    Raises:
        MemoryError: There is not so much.
    """
    return _or_memory_error(lambda: PinnedMemory(size_bytes, runtime.hostAllocPortable))


def register(memory: npt.NDArray[np.uint8], index: int) -> npt.NDArray[np.uint8]:
    """Pins memory that was taken elsewhere, for every GPU.

    Args:
        memory: Whole pages.
        index: A GPU in whose name that is done.

    Returns:
        The same bytes, pinned until the last array that refers to it is gone;
        `memory` itself where they cannot be.
    """
    address = memory.ctypes.data
    flags = runtime.hostAllocPortable  # cudaHostRegisterPortable is the same
    try:
        with_device(index, lambda: runtime.hostRegister(address, memory.nbytes, flags))
    except runtime.CUDARuntimeError as error:
        _log.warning("shared memory stays unpinned, copies are slower: %s", error)
        return memory
    return np.asarray(_Registered(memory, index))


class _Registered:
    """What an array over pinned memory refers to."""

    def __init__(self, memory: npt.NDArray[np.uint8], index: int) -> None:
        self._memory = memory
        self._index = index
        self.__array_interface__ = memory.__array_interface__

    def __del__(self) -> None:
        address = self._memory.ctypes.data
        # What is left to be done about a lost device, or while the interpreter
        # ends, is done by the end of the process.
        with suppress(RuntimeError):
            with_device(self._index, lambda: runtime.hostUnregister(address))


def with_device(index: int, act: Callable[[], T]) -> T:
    """Does it in a thread of its own, in which that GPU is the current one.

    Any call of CUDA in a thread without one has it set up the first GPU, which
    may not be ours; and the calling thread's stays what it is.
    """

    def run() -> T:
        CudaDevice(index).use()
        return act()

    with ThreadPoolExecutor(1, "gradwire-cupy") as pool:
        return pool.submit(run).result()


def _or_memory_error(take: Callable[[], T]) -> T:
    try:
        return take()
    except runtime.CUDARuntimeError as error:
        if error.status in MEMORY:
            raise MemoryError(str(error)) from None
        raise


@functools.cache
def _cublas_version() -> str:
    try:
        # No handle, which would take memory: it is the library that is asked.
        version: int = cublas.getVersion(0)
    except cublas.CUBLASError:  # an older one wants a handle all the same
        version = cublas.getVersion(get_cublas_handle())
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def _cublas_settings() -> list[str]:
    """The environment variables by which cuBLAS chooses its kernels, as NAME=VALUE.

    Its variables are in the cuBLAS and the CUDA programming guides: among them
    CUBLAS_WORKSPACE_CONFIG, CUBLAS_EMULATE_SINGLE_PRECISION, and
    NVIDIA_TF32_OVERRIDE. Those for its log have no effect on results.
    """
    return sorted(
        f"{name}={value}"
        for name, value in os.environ.items()
        if name == "NVIDIA_TF32_OVERRIDE"
        or (name.startswith(("CUBLAS_", "CUBLASLT_")) and "_LOG" not in name)
    )


def _cuda_version(version: int) -> str:
    return f"{version // 1000}.{version // 10 % 100}"


def _nothing() -> None:
    pass


__all__ = [
    "CupyDevice",
    "all_devices",
    "allocate",
    "allocate_pinned",
    "inspect",
    "libraries",
    "register",
    "with_device",
]
