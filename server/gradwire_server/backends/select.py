"""The backends, and which one a server takes."""

from __future__ import annotations

from gradwire_server.backends.base import Backend, DeviceLostError
from gradwire_server.backends.cuda.diagnose import missing
from gradwire_server.backends.device_info import check_asked
from gradwire_server.backends.numpy.backend import NumpyBackend
from gradwire_server.backends.numpy.worker_threads import processors
from gradwire_server.errors import BackendError
from gradwire_server.settings import Settings


def choose(settings: Settings) -> tuple[Backend, str]:
    """The backend that the settings mean here, and why, in a few words.

    Raises:
        BackendError: It cannot be used here; the text says what is missing.
    """
    if settings.backend == "numpy":
        return _numpy(settings), "as asked"
    why_not = missing()
    if why_not is None:
        try:
            return _cupy(settings), "as asked" if settings.backend == "cupy" else _TAKEN
        except (ImportError, DeviceLostError, MemoryError) as error:
            why_not = f"CUDA cannot be used: {_first_line(error)}"
    if settings.backend == "cupy":
        raise BackendError(f"the backend cupy cannot be used: {why_not}")
    return _numpy(settings), why_not


def _numpy(settings: Settings) -> Backend:
    check_asked("numpy", settings.devices, (0,))
    threads = processors() if settings.cpu_threads is None else settings.cpu_threads
    return NumpyBackend(threads, settings.cpu_niceness)


def _cupy(settings: Settings) -> Backend:
    # CuPy is imported where it is used, and takes a second.
    from gradwire_server.backends.cuda.backend import CupyBackend  # noqa: PLC0415
    from gradwire_server.backends.cuda.host import all_devices  # noqa: PLC0415

    check_asked("cupy", settings.devices, all_devices())
    return CupyBackend(settings.devices, settings.device_memory_limit)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


_TAKEN = "a CUDA device answers"


__all__ = ["choose"]
