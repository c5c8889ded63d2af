"""Conversion of CUDA's errors to those of a backend's job."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cupy.cuda import cublas, driver, runtime

from gradwire_server.backends.base import DeviceLostError

MEMORY = frozenset({2})
"""cudaErrorMemoryAllocation. The driver has the same numbers as the runtime, here and
below."""

LOST = frozenset(
    {
        3,  # cudaErrorInitializationError
        4,  # cudaErrorCudartUnloading
        35,  # cudaErrorInsufficientDriver
        46,  # cudaErrorDevicesUnavailable
        100,  # cudaErrorNoDevice
        201,  # cudaErrorDeviceUninitialized
        214,  # cudaErrorECCUncorrectable
        220,  # cudaErrorNvlinkUncorrectable
        226,  # cudaErrorContained
        700,  # cudaErrorIllegalAddress
        702,  # cudaErrorLaunchTimeout
        709,  # cudaErrorContextIsDestroyed
        710,  # cudaErrorAssert
        714,  # cudaErrorHardwareStackError
        715,  # cudaErrorIllegalInstruction
        716,  # cudaErrorMisalignedAddress
        717,  # cudaErrorInvalidAddressSpace
        718,  # cudaErrorInvalidPc
        719,  # cudaErrorLaunchFailure
        721,  # cudaErrorTensorMemoryLeak
        802,  # cudaErrorSystemNotReady
        803,  # cudaErrorSystemDriverMismatch
        805,  # cudaErrorMpsConnectionFailed
        806,  # cudaErrorMpsRpcFailure
        810,  # cudaErrorMpsClientTerminated
        911,  # cudaErrorExternalDevice
        999,  # cudaErrorUnknown
    }
)
"""Errors after which this process cannot use the device any more: those of
which CUDA says that all further work fails until the process is started again,
and those of a device, driver or context that is gone."""

CUBLAS_MEMORY = frozenset({1, 3})
"""CUBLAS_STATUS_NOT_INITIALIZED, which is the error of creating a handle without
memory, and CUBLAS_STATUS_ALLOC_FAILED."""


@contextmanager
def translated(free: Callable[[], None], probe: Callable[[], object]) -> Iterator[None]:
    """Convert CUDA's errors in this context to those of a backend's job.

    Args:
        free: Releases unused memory.
        probe: Makes any call to the device. It fails if the device is lost, which
            cuBLAS's status does not show.

    Raises:
        MemoryError: There was not enough memory, and `free` was called.
        DeviceLostError: The device is no longer usable.
    """
    try:
        yield
    except MemoryError as error:
        free()
        raise MemoryError(str(error)) from None
    except (runtime.CUDARuntimeError, driver.CUDADriverError) as error:
        _raise_known(error, free)
        raise
    except cublas.CUBLASError as error:
        if error.status in CUBLAS_MEMORY:
            free()
        try:
            probe()
        except (runtime.CUDARuntimeError, driver.CUDADriverError) as cause:
            _raise_known(cause, free)
        if error.status in CUBLAS_MEMORY:
            raise MemoryError(str(error)) from None
        raise


def _raise_known(error: Exception, free: Callable[[], None]) -> None:
    # mypy does not know the types of CuPy's errors.
    status: int = getattr(error, "status", 0)
    if status in LOST:
        raise DeviceLostError(str(error)) from error
    if status in MEMORY:
        free()
        raise MemoryError(str(error)) from None
