"""The backends by name: gradwire's own, and those of installed packages.

A package adds a backend with an entry point of the group `GROUP`, which names a
`MakeBackend`. In its pyproject.toml:

    [project.entry-points."gradwire.backends"]
    tiny = "tiny_backend:make_backend"

Then ``gradwire serve --backend tiny`` computes with it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from importlib import metadata
from typing import TYPE_CHECKING, Protocol

from gradwire_server.errors import BackendError

if TYPE_CHECKING:
    from gradwire_server.backends.base import Backend
    from gradwire_server.settings import Settings

GROUP = "gradwire.backends"
"""The group of entry points."""

OWN = {
    "cupy": "gradwire_server.backends.cuda.plugin:make_backend",
    "numpy": "gradwire_server.backends.numpy.plugin:make_backend",
}
"""gradwire's own entry points, as pyproject.toml declares them too: a checkout
on Python's path has no installed metadata. No other package can take a name of
these."""


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


def names() -> tuple[str, ...]:
    """The names of all backends, sorted."""
    return tuple(sorted({*OWN, *(point.name for point in _installed())}))


def is_known(name: str) -> bool:
    """Whether there is a backend of that name."""
    # Installed packages are only searched where it is needed: it takes a while.
    return name in OWN or any(point.name == name for point in _installed())


def load(name: str) -> MakeBackend:
    """What makes the backend of that name.

    Raises:
        BackendError: There is none, there are two, or it cannot be imported.
    """
    found = OWN.get(name)
    if found is None:
        installed = {point.value for point in _installed() if point.name == name}
        if not installed:
            raise BackendError(f"the backend is {name!r}: expected {listed()}")
        if len(installed) > 1:
            raise BackendError(
                f"the backend {name} cannot be used: two packages have one of that "
                f"name, {' and '.join(sorted(installed))}"
            )
        (found,) = installed
    module, _, attribute = found.partition(":")
    try:
        make: MakeBackend = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        # The module is another package's, and may raise anything.
        raise BackendError(
            f"the backend {name} cannot be used: its plug-in {found} cannot be "
            f"imported: {first_line(error)}"
        ) from error
    return make


def listed() -> str:
    """What `Settings.backend` may be, for messages to people."""
    return ", ".join(("auto", *names()))


def first_line(error: Exception) -> str:
    """What an error says, for the end of a sentence."""
    return (str(error) or type(error).__name__).splitlines()[0]


def _installed() -> Iterator[metadata.EntryPoint]:
    yield from metadata.entry_points(group=GROUP)
