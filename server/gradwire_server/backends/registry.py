"""Backends loaded by name, of gradwire and of installed packages.

A package adds a backend with an entry point of the group `backend_names.GROUP`,
which names a `MakeBackend`. In its pyproject.toml:

    [project.entry-points."gradwire.backends"]
    tiny = "tiny_backend:make_backend"

Then ``gradwire serve --backend tiny`` computes with it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Protocol

from gradwire_server import backend_names
from gradwire_server.errors import BackendError

if TYPE_CHECKING:
    from gradwire_server.backends.base import Backend
    from gradwire_server.settings import Settings


class MakeBackend(Protocol):
    """What an entry point of a backend names."""

    def __call__(self, settings: Settings, /) -> Backend:
        """The backend, ready to open jobs on its devices.

        Nothing is imported before this call but the module that defines it, so
        that module should import a large library here and not at its top.

        Args:
            settings: All settings of the server; `Settings.devices` names the
                devices that the operator wants (`check_asked` checks them).

        Raises:
            BackendUnavailableError: A package, a driver or a device is
                missing; the text says which.
            BackendError: The settings ask for what the backend does not have.
            ImportError, DeviceLostError, MemoryError: As
                BackendUnavailableError, with the error's first line for a text.
        """


def load(name: str) -> MakeBackend:
    """The function that makes the backend of that name.

    Raises:
        BackendError: No backend or two backends have the name, or it cannot be
            imported.
    """
    found = sorted(backend_names.entry_points(name))
    if not found:
        raise BackendError(
            f"the backend is {name!r}: expected {backend_names.listed()}"
        )
    if len(found) > 1:
        raise BackendError(
            f"the backend {name} cannot be used: two packages have one of that "
            f"name, {' and '.join(found)}"
        )
    (point,) = found
    module, _, attribute = point.partition(":")
    try:
        make: MakeBackend = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        # The module is another package's, and may raise anything.
        raise BackendError(
            f"the backend {name} cannot be used: its plug-in {point} cannot be "
            f"imported: {first_line(error)}"
        ) from error
    return make


def first_line(error: Exception) -> str:
    """What an error says, for the end of a sentence."""
    return (str(error) or type(error).__name__).splitlines()[0]
