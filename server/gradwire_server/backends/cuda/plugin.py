"""The entry point of the CuPy backend."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradwire_server.backends.base import DeviceLostError
from gradwire_server.backends.cuda.diagnose import missing
from gradwire_server.backends.device_info import require_devices
from gradwire_server.backends.registry import first_line
from gradwire_server.errors import BackendUnavailableError
from gradwire_server.settings import Settings

if TYPE_CHECKING:
    from gradwire_server.backends.cuda.backend import CupyBackend


def make_backend(settings: Settings) -> CupyBackend:
    """Create the backend for the requested GPUs, or for all.

    Raises:
        BackendUnavailableError: CuPy, the driver or a device is missing.
        BackendError: A requested device does not exist.
    """
    if (why_not := missing()) is not None:
        raise BackendUnavailableError(why_not)
    try:
        # The import of CuPy takes a second, so it is not at the top.
        from gradwire_server.backends.cuda.backend import CupyBackend  # noqa: PLC0415
        from gradwire_server.backends.cuda.host import all_devices  # noqa: PLC0415

        require_devices(CupyBackend.name, settings.devices, all_devices())
        return CupyBackend(settings.devices, settings.device_memory_limit)
    except (ImportError, DeviceLostError, MemoryError) as error:
        why_not = f"CUDA cannot be used: {first_line(error)}"
        raise BackendUnavailableError(why_not) from error
