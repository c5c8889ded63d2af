"""Descriptions of a server's devices, and the memory limits of their jobs."""

from __future__ import annotations

from collections.abc import Sequence

from gradwire_protocol.job_spec import Fingerprint
from gradwire_protocol.v1 import job_pb2
from gradwire_server.backends.base import DeviceInfo
from gradwire_server.errors import BackendError

MEMORY_FRACTION = 0.9
"""Default of the part of a device's memory for jobs. CUDA's context, its libraries and
cuBLAS's workspace need the rest."""


def memory_limit(device: DeviceInfo, asked: int | None) -> int | None:
    """Return the most bytes of a device's memory that its jobs may hold together.

    Args:
        device: The device.
        asked: The operator's limit; None: `MEMORY_FRACTION` of the device's memory.

    Returns:
        The limit, at most the device's memory; None if the device has no memory of its
        own.
    """
    if device.in_host_memory:
        return None
    if asked is None:
        return int(device.memory_bytes * MEMORY_FRACTION)
    return min(asked, device.memory_bytes)


def require_devices(
    backend: str, requested: Sequence[int], present: Sequence[int]
) -> None:
    """Check that the requested devices exist.

    Args:
        backend: Name of the backend.
        requested: Numbers of the requested devices.
        present: Numbers of the existing devices.

    Raises:
        BackendError: A device does not exist.
    """
    missing = [number for number in requested if number not in present]
    if missing:
        raise BackendError(
            f"devices names {_listed(missing)}, but the backend {backend} has "
            f"{_listed(present) if present else 'none'} here"
        )


def label(device: DeviceInfo) -> str:
    """Return a device's name for messages."""
    return f"device {device.index} ({device.name})"


def device_message(device: DeviceInfo, limit: int | None) -> job_pb2.Device:
    """Convert a device to the contract's message.

    Args:
        device: The device.
        limit: The operator's limit of the device's memory, in bytes.
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


def fingerprint_message(
    device: DeviceInfo, block_rows: int = 0, segment_rows: int = 0
) -> job_pb2.NumericsFingerprint:
    """Return what affects the last bits on a device, and of a job's if it is known."""
    return Fingerprint(
        device.library, device.name, device.threads, block_rows, segment_rows
    ).to_message()


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
