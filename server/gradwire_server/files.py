"""Whether a file is another one than before."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeAlias

Stamp: TypeAlias = "tuple[int, ...] | None"


def stamp(path: Path) -> Stamp:
    """What differs as soon as a file does, or who may read it; None: there is none."""
    try:
        found = os.stat(path)  # noqa: PTH116 - looked at at every call
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
