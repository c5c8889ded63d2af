"""Memory that this process has taken, and how the C library keeps it."""

from __future__ import annotations

import ctypes
import gc
import platform
import resource

# Parameters of mallopt(3), as <malloc.h> numbers them.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8


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
    # One arena, because memory that one device worker's thread frees should serve the
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
