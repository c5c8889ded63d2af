"""The backends, and which one a server takes."""

from __future__ import annotations

from gradwire_server.backends.base import Backend
from gradwire_server.backends.numpy import NumpyBackend
from gradwire_server.errors import BackendError

_NO_CUPY = "this version has no CuPy backend"


def choose(name: str) -> tuple[Backend, str]:
    """The backend that `name` means here, and why, in a few words.

    Args:
        name: ``auto``, ``numpy`` or ``cupy``.

    Raises:
        BackendError: It cannot be used here; the text says what is missing.
    """
    if name == "cupy":
        raise BackendError(f"the backend cupy cannot be used: {_NO_CUPY}")
    if name == "numpy":
        return NumpyBackend(), "as asked"
    return NumpyBackend(), _NO_CUPY


__all__ = ["choose"]
