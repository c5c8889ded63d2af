"""How much memory there is, how much is taken, and giving some of it back."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import resource
from pathlib import Path

_CONTAINER_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),  # cgroup v2
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),  # cgroup v1
)

# Parameters of mallopt(3), as <malloc.h> numbers them.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8


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


def tune_malloc() -> bool:
    """Has freed memory kept for what is allocated next, in the whole process.

    Pages that are touched for the first time are dear, on virtual machines
    dearer than the products that are written to them; and the C library
    gives large ones back to the machine at every job's end. `trim_malloc`
    still lets go of them.

    What Python has made so far is set aside from its garbage collection, so
    that collecting what a job has left takes no time.

    Returns:
        Whether the C library can be told so; only glibc can.
    """
    gc.collect()
    gc.freeze()
    tune = getattr(ctypes.CDLL(None), "mallopt", None)
    if tune is None or platform.libc_ver()[0] != "glibc":
        return False
    # One arena, because memory that one lane's thread frees should serve the
    # next job's region, which another's may allocate.
    options = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_ARENA_MAX: 1}
    done = [tune(option, value) for option, value in options.items()]
    return all(done)


def trim_malloc() -> None:
    """Returns memory that is free within this process to the machine.

    The C library keeps what gRPC's buffers took in a burst. Where it offers
    no way to let go of it (only glibc does), nothing happens.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
