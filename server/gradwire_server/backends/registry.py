"""Loading of backends by name, from gradwire and from installed packages.

A package adds a backend with an entry point in the group `backend_names.GROUP`, which
refers to a `MakeBackend`. In its pyproject.toml:

    [project.entry-points."gradwire.backends"]
    tiny = "tiny_backend:make_backend"

Then ``gradwire serve --backend tiny`` uses it.
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
    """The function that an entry point refers to."""

    def __call__(self, settings: Settings, /) -> Backend:
        """Create the backend, ready to open jobs on its devices.

        Only the module of this function is imported before the call. So the module
        should import large libraries here and not at its top.

        Args:
            settings: All settings of the server. `Settings.devices` has the requested
            devices; check them with `require_devices`.

        Raises:
            BackendUnavailableError: A package, a driver or a device is missing; the
                message says which.
            BackendError: The settings request something that the backend does not have.
            ImportError, DeviceLostError, MemoryError: As BackendUnavailableError, with
                the error's first line as the message.
        """


def load(name: str) -> MakeBackend:
    """Return the function that creates the backend with a name.

    Raises:
        BackendError: No backend or two backends have the name, or the backend cannot be
            imported.
    """
    found = sorted(backend_names.entry_points(name))
    if not found:
        raise BackendError(
            f"the backend is {name!r}: expected {backend_names.listed()}"
        )
    if len(found) > 1:
        raise BackendError(
            f"the backend {name} cannot be used: two packages have a backend of that "
            f"name, {' and '.join(found)}"
        )
    (point,) = found
    module, _, attribute = point.partition(":")
    try:
        make: MakeBackend = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        # The module belongs to another package, and may raise any exception.
        raise BackendError(
            f"the backend {name} cannot be used: its plug-in {point} cannot be "
            f"imported: {first_line(error)}"
        ) from error
    return make


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return (str(error) or type(error).__name__).splitlines()[0]
