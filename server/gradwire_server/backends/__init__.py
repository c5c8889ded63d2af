"""The backends, and which one a server takes."""

from __future__ import annotations

from gradwire_server.backends.base import Backend
from gradwire_server.backends.crew import processors
from gradwire_server.backends.numpy import NumpyBackend
from gradwire_server.devices import check_asked
from gradwire_server.errors import BackendError
from gradwire_server.settings import Settings

_NO_CUPY = "this version has no CuPy backend"


def choose(settings: Settings) -> tuple[Backend, str]:
    """The backend that the settings mean here, and why, in a few words.

    Raises:
        BackendError: It cannot be used here; the text says what is missing.
    """
    if settings.backend == "cupy":
        raise BackendError(f"the backend cupy cannot be used: {_NO_CUPY}")
    check_asked("numpy", settings.devices, (0,))
    threads = processors() if settings.cpu_threads is None else settings.cpu_threads
    why = "as asked" if settings.backend == "numpy" else _NO_CUPY
    return NumpyBackend(threads, settings.cpu_niceness), why


__all__ = ["choose"]
