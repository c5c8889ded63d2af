"""Diagnosis of why CUDA cannot be used.

Three parts are needed, each with its own remedy: CuPy with CUDA's libraries (packages),
NVIDIA's driver (on the host), and a device.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

_INSUFFICIENT_DRIVER = 35  # cudaErrorInsufficientDriver: no driver, or too old
_NO_DEVICE = 100  # cudaErrorNoDevice

_INSTALL = (
    "pip install 'gradwire[server,cuda13]', or cuda12 if the driver is older than 580"
)


def missing() -> str | None:
    """Return why CuPy cannot compute here, and the remedy.

    CuPy is imported if it is installed.

    Returns:
        A part of a sentence; None if CuPy can compute.
    """
    if find_spec("cupy") is None:
        return f"CuPy is not installed ({_INSTALL})"
    try:
        # CuPy supports bfloat16 only if ml_dtypes was imported before.
        import ml_dtypes  # noqa: F401, PLC0415
        from cupy.cuda import runtime  # noqa: PLC0415

        why = missing_device(
            runtime.getDeviceCount, runtime.driverGetVersion, runtime.runtimeGetVersion
        )
        if why is None:
            from cupy.cuda import cublas  # noqa: F401, PLC0415
    except ImportError as error:
        cause = str(error).splitlines()[0]
        return f"CuPy or a library of CUDA cannot be imported: {cause} ({_INSTALL})"
    return why


def missing_device(
    count: Callable[[], int],
    driver_version: Callable[[], int],
    runtime_version: Callable[[], int],
) -> str | None:
    """Return why CUDA has no usable device; None if it has one.

    Args:
        count: Returns the number of devices, or raises an error with CUDA's `status`.
        driver_version: Returns the driver's CUDA version, 1000 major + 10 minor; 0:
            there is no driver.
        runtime_version: Returns the libraries' CUDA version, in the same form.
    """
    try:
        found = count()
    except RuntimeError as error:
        return _why(error, driver_version, runtime_version)
    return None if found else _no_device()


def _why(
    error: Any, driver_version: Callable[[], int], runtime_version: Callable[[], int]
) -> str:
    status = getattr(error, "status", None)
    if status == _NO_DEVICE:
        return _no_device()
    if status != _INSUFFICIENT_DRIVER:
        return f"CUDA says {str(error).splitlines()[0]}"
    if not _has_driver():
        return (
            "there is no NVIDIA driver (libcuda.so.1): install it on the host, and "
            "start a container with its devices (docker run --gpus all)"
        )
    return (
        f"the NVIDIA driver is for CUDA {_text(driver_version())}, but CuPy here "
        f"needs {_text(runtime_version())}: install a newer driver, or the extra for "
        f"an older CUDA"
    )


def _no_device() -> str:
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is not None:
        return f"there is no CUDA device with CUDA_VISIBLE_DEVICES={shown!r}"
    return "there is an NVIDIA driver, but no CUDA device"


def _has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _text(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
