"""What is said of a server's devices, and how much of their memory is for jobs."""

from __future__ import annotations

from collections.abc import Sequence

from gradwire_protocol.v1 import job_pb2
from gradwire_server.backends.base import DeviceInfo
from gradwire_server.errors import BackendError

MEMORY_FRACTION = 0.9
"""Of a device's memory, how much jobs may hold unless the operator says: CUDA's
context, its libraries and cuBLAS's workspace take some for themselves."""


def memory_limit(device: DeviceInfo, asked: int | None) -> int | None:
    """Most bytes of a device's memory that its jobs hold together.

    Args:
        device: The device.
        asked: What the operator allows; None: `MEMORY_FRACTION` of what it has.

    Returns:
        That, never more than the device has; None where it has no memory of
        its own.
    """
    if device.in_host_memory:
        return None
    if asked is None:
        return int(device.memory_bytes * MEMORY_FRACTION)
    return min(asked, device.memory_bytes)


def check_asked(backend: str, asked: Sequence[int], present: Sequence[int]) -> None:
    """Checks that the devices that were asked for are there.

    Args:
        backend: Name of the backend.
        asked: Numbers of the devices that the operator wants.
        present: Numbers of those that there are.

    Raises:
        BackendError: One of them is not there.
    """
    missing = [number for number in asked if number not in present]
    if missing:
        raise BackendError(
            f"devices names {_listed(missing)}, but the backend {backend} has "
            f"{_listed(present) if present else 'none'} here"
        )


def label(device: DeviceInfo) -> str:
    """A device, for messages to people."""
    return f"device {device.index} ({device.name})"


def device_message(device: DeviceInfo, limit: int | None) -> job_pb2.Device:
    """A device, as the contract describes it.

    Args:
        device: The device.
        limit: What the operator allows jobs of its memory.
    """
    return job_pb2.Device(
        backend=device.backend,
        index=device.index,
        name=device.name,
        memory_bytes=device.memory_bytes,
        compute_capability=device.compute_capability,
        memory_limit_bytes=memory_limit(device, limit),
        sums_rounded_to_nearest=[
            dtype.proto_name for dtype in device.sums_rounded_to_nearest
        ],
        ignores_tf32=device.ignores_tf32,
    )


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
