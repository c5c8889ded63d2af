"""The entry point of the NumPy backend."""

from __future__ import annotations

from gradwire_server.backends.device_info import require_devices
from gradwire_server.backends.host_limits import processors
from gradwire_server.backends.numpy.backend import NumpyBackend
from gradwire_server.settings import Settings


def make_backend(settings: Settings) -> NumpyBackend:
    """Create the backend with the threads of the settings.

    Raises:
        BackendError: Another device than 0 was requested.
    """
    require_devices(NumpyBackend.name, settings.devices, (0,))
    threads = processors() if settings.cpu_threads is None else settings.cpu_threads
    return NumpyBackend(threads, settings.cpu_niceness)
