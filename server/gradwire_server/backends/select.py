"""Choice of a server's backend."""

from __future__ import annotations

from gradwire_server.backend_names import AUTO
from gradwire_server.backends import registry
from gradwire_server.backends.base import Backend, DeviceLostError
from gradwire_server.errors import BackendError, BackendUnavailableError
from gradwire_server.settings import Settings

_PREFERRED = {"cupy": "a CUDA device answers"}
"""Backends that `AUTO` tries in order, with the reason for choosing each."""

_FALLBACK = "numpy"
"""The backend that `AUTO` chooses if no other is usable."""


def choose(settings: Settings) -> tuple[Backend, str]:
    """Return the backend for the settings, and the reason for the choice.

    Raises:
        BackendError: No backend has the name, or it cannot be used here; the message
            says what is missing.
    """
    name = settings.backend
    if name != AUTO:
        try:
            return _make(name, settings), "as asked"
        except BackendUnavailableError as error:
            raise BackendError(f"the backend {name} cannot be used: {error}") from error
    why_not = ""
    for name, reason in _PREFERRED.items():
        try:
            return _make(name, settings), reason
        except BackendUnavailableError as error:
            why_not = str(error)
    return _make(_FALLBACK, settings), why_not


def _make(name: str, settings: Settings) -> Backend:
    make = registry.load(name)
    try:
        return make(settings)
    except (ImportError, DeviceLostError, MemoryError) as error:
        raise BackendUnavailableError(registry.first_line(error)) from error


__all__ = ["choose"]
