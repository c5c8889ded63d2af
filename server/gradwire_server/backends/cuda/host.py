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
    """Return CUDA's numbers of the GPUs visible to this process.

    Raises:
        DeviceLostError: There is no GPU, or no driver for this version of CUDA.
    """
    with translated(_nothing, _nothing):
        return tuple(range(runtime.getDeviceCount()))


def inspect(index: int) -> DeviceInfo:
    """Check that a GPU responds, and describe it.

    Raises:
        DeviceLostError: The GPU does not respond.
        MemoryError: The GPU has no memory left for a process.
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
        # The last bits depend on this number, the library and the kind of GPU.
        threads=properties["multiProcessorCount"],
        compute_capability=f"{properties['major']}.{properties['minor']}",
        sums_rounded_to_nearest=SUMS_ROUNDED_TO_NEAREST,
    )


def libraries() -> dict[str, str]:
    """Return the versions of CuPy, cuBLAS, and CUDA's runtime and driver."""
    return {
        "cupy": cupy.__version__,
        "cublas": _cublas_version(),
        "cuda-runtime": _cuda_version(runtime.runtimeGetVersion()),
        "cuda-driver": _cuda_version(runtime.driverGetVersion()),
    }


def allocate(size_bytes: int) -> Any:
    """Allocate memory on the calling thread's GPU; `ptr` is its address.

    Raises:
        MemoryError: There is not enough memory.
    """
    return _or_memory_error(lambda: Memory(size_bytes))


def allocate_pinned(size_bytes: int) -> Any:
    """Allocate host memory pinned for every GPU; `ptr` is its address.

    Raises:
        MemoryError: There is not enough memory.
    """
    return _or_memory_error(lambda: PinnedMemory(size_bytes, runtime.hostAllocPortable))


def register(memory: npt.NDArray[np.uint8], index: int) -> npt.NDArray[np.uint8]:
    """Pin existing memory for every GPU.

    Args:
        memory: Whole pages.
        index: The GPU used for the call.

    Returns:
        An array of the same bytes, pinned until its last reference is gone; `memory`
        itself if it cannot be pinned.
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
    """Owner of pinned memory, referenced by its array."""

    def __init__(self, memory: npt.NDArray[np.uint8], index: int) -> None:
        self._memory = memory
        self._index = index
        self.__array_interface__ = memory.__array_interface__

    def __del__(self) -> None:
        address = self._memory.ctypes.data
        # If the device is lost, or the interpreter ends, the end of the process
        # unpins the memory.
        with suppress(RuntimeError):
            with_device(self._index, lambda: runtime.hostUnregister(address))


def with_device(index: int, act: Callable[[], T]) -> T:
    """Call `act` in a new thread with a GPU as the current one.

    In a thread without a current GPU, any CUDA call would initialize the first GPU,
    which may not be ours. The calling thread's current GPU is unchanged.
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
        # Without a handle, which would need memory.
        version: int = cublas.getVersion(0)
    except cublas.CUBLASError:  # older versions need a handle
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
