"""The version of this distribution."""

from __future__ import annotations

import importlib.metadata


def _installed() -> str:
    try:
        return importlib.metadata.version("gradwire")
    except importlib.metadata.PackageNotFoundError:
        return "0+source"


VERSION = _installed()
"""Version of the distribution; ``0+source`` if it is not installed."""
