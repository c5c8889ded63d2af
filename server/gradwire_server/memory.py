"""How much memory there is, how much is taken, and giving some of it back."""

from __future__ import annotations

import ctypes
import os
import resource
from pathlib import Path

_CONTAINER_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),  # cgroup v2
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),  # cgroup v1
)


def machine_bytes() -> int:
    """Memory of the container, if it has a limit, else of the machine."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [physical]
    for path in _CONTAINER_LIMITS:
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        if text.isdigit():  # v2 writes "max" where there is none
            limits.append(int(text))
    return min(limits)


def peak_resident_bytes() -> int:
    """Highest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def give_back() -> None:
    """Returns memory that is free within this process to the machine.

    The C library keeps what gRPC's buffers took in a burst. Where it offers
    no way to let go of it (only glibc does), nothing happens.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
