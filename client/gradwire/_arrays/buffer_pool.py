"""Reuse of memory for results and messages.

New pages are expensive, because the kernel clears each of them: on virtual machines, at
a tenth of the speed of memory in use. A loop with equal sizes reuses its memory from
this pool.
"""

from __future__ import annotations

import math
import sys
import threading
import weakref
from collections import deque

import numpy as np
import numpy.typing as npt

from gradwire._api.types import Array
from gradwire_protocol.limits import MIB

MAX_FREE_BYTES = 256 * MIB
"""Default of `ResultPool.max_free_bytes`."""

_SMALLEST_BYTES = MIB
"""Smallest pooled array. The C library itself reuses the memory of smaller arrays."""

_LARGEST_KEPT_BY_LIBC = 32 * MIB
"""Maximum of glibc's dynamic threshold (DEFAULT_MMAP_THRESHOLD_MAX)."""


class ResultPool:
    """Creates arrays whose memory returns to the pool after their last reference.

    Memory is reused for arrays of the same size. If more than `max_free_bytes` are
    free, the memory that was free for longest is released. Thread-safe.
    """

    def __init__(self, max_free_bytes: int = MAX_FREE_BYTES) -> None:
        self._max_free_bytes = max_free_bytes
        self._died: deque[npt.NDArray[np.uint8]] = deque()
        self._free: list[npt.NDArray[np.uint8]] = []  # the longest free first
        self._lock = threading.Lock()

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> Array:
        """Create an uninitialized, C-contiguous array."""
        size_bytes = math.prod(shape) * dtype.itemsize
        if size_bytes < _SMALLEST_BYTES:
            return np.empty(shape, dtype)
        memory = self._take(size_bytes)
        if memory is None:
            memory = np.empty(size_bytes, np.uint8)
        # Every view refers to this array, which does not own the memory. After it is
        # collected, the memory is no longer accessible.
        lent = np.frombuffer(memory.data, np.uint8)
        weakref.finalize(lent, _died, weakref.ref(self), memory).atexit = False
        return lent.view(dtype).reshape(shape)

    @property
    def free_bytes(self) -> int:
        """Free bytes, available for reuse."""
        with self._lock:
            self._tidy()
            return sum(memory.nbytes for memory in self._free)

    def close(self) -> None:
        """Release free memory, now and in the future."""
        with self._lock:
            self._max_free_bytes = 0
            self._tidy()

    def take_back(self, memory: npt.NDArray[np.uint8]) -> None:
        """Return memory without references to the pool."""
        # The garbage collector may run this anywhere, even while this thread holds the
        # lock. In that case, the lock's owner tidies up later.
        self._died.append(memory)
        if self._lock.acquire(blocking=False):
            try:
                self._tidy()
            finally:
                self._lock.release()

    def _take(self, size_bytes: int) -> npt.NDArray[np.uint8] | None:
        with self._lock:
            self._tidy()
            for at, memory in enumerate(self._free):
                if memory.nbytes == size_bytes:
                    return self._free.pop(at)
            return None

    def _tidy(self) -> None:
        while self._died:
            self._free.append(self._died.popleft())
        free_bytes = sum(memory.nbytes for memory in self._free)
        while free_bytes > self._max_free_bytes:
            free_bytes -= self._free.pop(0).nbytes


def _died(
    pool: weakref.ReferenceType[ResultPool], memory: npt.NDArray[np.uint8]
) -> None:
    if (alive := pool()) is not None:
        alive.take_back(memory)


def raise_mmap_threshold() -> None:
    """Make the C library reuse the memory of messages.

    Where it is glibc: it hands freed memory back to the machine from a size
    on that is 128 KiB at first, and that it raises to the largest which the
    process has freed. Here one is freed that was never touched.
    """
    if sys.platform == "linux":
        np.empty(_LARGEST_KEPT_BY_LIBC - MIB, np.uint8)
