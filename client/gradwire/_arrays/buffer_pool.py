"""Memory for results, and for the messages that bring them, used again.

Pages that a process touches for the first time are dear: the machine clears
each of them, on virtual machines at a tenth of the speed of memory that is
warm. A loop that computes the same sizes again and again finds its memory
here as it was left.
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
"""Most bytes that a pool keeps free."""

_SMALLEST_BYTES = MIB
"""Smaller arrays are left to the C library, which keeps such memory itself."""

_LARGEST_KEPT_BY_LIBC = 32 * MIB
"""What glibc lets its threshold grow to (DEFAULT_MMAP_THRESHOLD_MAX)."""


class ResultPool:
    """Makes arrays whose memory comes back when nobody refers to them any more.

    Memory is used again for arrays of the same size. What lay free for longest
    is given back to the machine when more than `max_free_bytes` are free.

    Safe to use from many threads.
    """

    def __init__(self, max_free_bytes: int = MAX_FREE_BYTES) -> None:
        self._max_free_bytes = max_free_bytes
        self._died: deque[npt.NDArray[np.uint8]] = deque()
        self._free: list[npt.NDArray[np.uint8]] = []  # the longest free first
        self._lock = threading.Lock()

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> Array:
        """An uninitialised array of that shape, C-contiguous."""
        size_bytes = math.prod(shape) * dtype.itemsize
        if size_bytes < _SMALLEST_BYTES:
            return np.empty(shape, dtype)
        memory = self._take(size_bytes)
        if memory is None:
            memory = np.empty(size_bytes, np.uint8)
        # Every view of it refers to this array, which owns nothing: when it
        # dies, nobody can see the memory any more.
        lent = np.frombuffer(memory.data, np.uint8)
        weakref.finalize(lent, _died, weakref.ref(self), memory).atexit = False
        return lent.view(dtype).reshape(shape)

    @property
    def free_bytes(self) -> int:
        """Bytes that wait to be used again."""
        with self._lock:
            self._tidy()
            return sum(memory.nbytes for memory in self._free)

    def close(self) -> None:
        """Give back what is free, and what becomes so."""
        with self._lock:
            self._max_free_bytes = 0
            self._tidy()

    def take_back(self, memory: npt.NDArray[np.uint8]) -> None:
        """Take memory that nobody refers to any more."""
        # It may become so in any thread and in the middle of anything, also
        # while this thread has the lock; who has it tidies up some time.
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
    """Has the C library keep the memory of messages for the next ones.

    Where it is glibc: it hands freed memory back to the machine from a size
    on that is 128 KiB at first, and that it raises to the largest which the
    process has freed. Here one is freed that was never touched.
    """
    if sys.platform == "linux":
        np.empty(_LARGEST_KEPT_BY_LIBC - MIB, np.uint8)
