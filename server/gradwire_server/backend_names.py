"""The names of the backends: gradwire's own, and those of installed packages."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata

AUTO = "auto"
"""The `Settings.backend` that leaves the choice to the server."""

GROUP = "gradwire.backends"
"""The group of entry points."""

OWN = {
    "cupy": "gradwire_server.backends.cuda.plugin:make_backend",
    "numpy": "gradwire_server.backends.numpy.plugin:make_backend",
}
"""gradwire's own entry points, as pyproject.toml declares them too: a checkout
on Python's path has no installed metadata. No other package can take a name of
these."""


def names() -> tuple[str, ...]:
    """The names of all backends, sorted."""
    return tuple(sorted({*OWN, *(point.name for point in _installed())}))


def listed() -> str:
    """The values that `Settings.backend` may have, for messages to people."""
    return ", ".join((AUTO, *names()))


def entry_points(name: str) -> frozenset[str]:
    """The entry points of that name, as ``module:attribute``. Empty: no backend."""
    # Installed packages are only searched where it is needed: it takes a while.
    if name in OWN:
        return frozenset({OWN[name]})
    return frozenset(point.value for point in _installed() if point.name == name)


def _installed() -> Iterator[metadata.EntryPoint]:
    yield from metadata.entry_points(group=GROUP)
