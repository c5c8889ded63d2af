"""The process's memory: its size, and the settings of malloc."""

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
    """Return the highest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def tune_malloc() -> bool:
    """Make the process keep freed memory for later allocations.

    New pages are expensive. On virtual machines, they cost more than the products that
    are written to them, and the C library releases large pages at the end of every job.
    `trim_malloc` can still release them.

    All existing Python objects are excluded from garbage collection, so that
    collections after a job take no time.

    Returns:
        Whether the C library supports it; only glibc does.
    """
    gc.collect()
    gc.freeze()
    tune = getattr(ctypes.CDLL(None), "mallopt", None)
    if tune is None or platform.libc_ver()[0] != "glibc":
        return False
    # One arena, so that memory freed in one device worker's thread can be used for the
    # next job in another thread.
    options = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_ARENA_MAX: 1}
    done = [tune(option, value) for option, value in options.items()]
    return all(done)


def trim_malloc() -> None:
    """Return this process's free memory to the operating system.

    The C library keeps the memory of gRPC's buffers after a burst. Libraries other than
    glibc cannot release it; then nothing happens.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
