"""The version of this distribution."""

from __future__ import annotations

import importlib.metadata


def _installed() -> str:
    try:
        return importlib.metadata.version("gradwire")
    except importlib.metadata.PackageNotFoundError:
        return "0+source"


VERSION = _installed()
"""That, or ``0+source`` where the sources are used without being installed."""
