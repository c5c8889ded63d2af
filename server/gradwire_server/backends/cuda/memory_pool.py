"""Memory that is dear to take from the system, kept for the next job.

Pinned host memory and device memory cost milliseconds to take and to give
back, during which the device may stand still; and jobs of one client tend to
be of one size. So pieces that jobs give back are kept, up to a bound, and
given to the next job whose size fits. Pieces are never cut: what a job holds is
what it asked for, rounded up, and what is free is free as a whole.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from threading import Lock
from typing import Generic, TypeVar

T = TypeVar("T")

GRAIN_BYTES = 64 * 1024
"""To a multiple of this sizes are rounded up, so that jobs of almost the same
size can use each other's memory."""

_MOST_KEPT = 64
"""Pieces that are kept at most: small ones should not be searched for long."""


def rounded_up(size_bytes: int) -> int:
    """What a piece of that size takes."""
    return -(-size_bytes // GRAIN_BYTES) * GRAIN_BYTES


class Piece(Generic[T]):
    """Memory of a pool, in use until it is given back.

    Attributes:
        memory: What the pool's `allocate` has returned.
        size_bytes: Its size, a multiple of `GRAIN_BYTES`.
    """

    __slots__ = ("_given", "memory", "size_bytes")

    def __init__(self, memory: T, size_bytes: int, given: deque[Piece[T]]) -> None:
        self.memory = memory
        self.size_bytes = size_bytes
        self._given: deque[Piece[T]] | None = given

    def free(self) -> None:
        """Lets others have it; in any thread, and more than once.

        It takes no lock and frees nothing, because it may be called by the
        garbage collector, anywhere.
        """
        given, self._given = self._given, None
        if given is not None:
            given.append(Piece(self.memory, self.size_bytes, given))


class Pool(Generic[T]):
    """Pieces of memory of one kind, in use or kept.

    Args:
        allocate: Takes that many bytes from the system, or raises
            `MemoryError`. They go back when the last reference is dropped,
            which happens in a thread that calls `take` or `clear`.
        max_free_bytes: Most that is kept.
        limit_bytes: Most that is in use and kept; None: what there is.
        spare: By which factor a piece may be larger than what is asked for.
    """

    def __init__(
        self,
        allocate: Callable[[int], T],
        *,
        max_free_bytes: int,
        limit_bytes: int | None = None,
        spare: float = 1.0,
    ) -> None:
        self._allocate = allocate
        self._max_free_bytes = max_free_bytes
        self._limit_bytes = limit_bytes
        self._spare = spare
        self._lock = Lock()
        self._given: deque[Piece[T]] = deque()
        self._kept: deque[Piece[T]] = deque()
        """What may be used again, oldest first."""
        self._taken_bytes = 0
        """In use, given back and kept."""

    @property
    def taken_bytes(self) -> int:
        """Bytes that were taken from the system and not given back to it."""
        return self._taken_bytes

    def take(self, size_bytes: int) -> Piece[T]:
        """A piece of at least that size, which is not cleared.

        Raises:
            MemoryError: There is not so much, within the pool's limit or in
                the system, even if nothing is kept.
        """
        size_bytes = rounded_up(size_bytes)
        with self._lock:
            dropped = self._collect()
            piece = self._fitting(size_bytes)
            if piece is None:
                dropped += self._make_room(size_bytes)
                self._taken_bytes += size_bytes
        del dropped  # freed while others may go on
        if piece is not None:
            return piece
        try:
            memory = self._allocate_or_clear(size_bytes)
        except BaseException:
            with self._lock:
                self._taken_bytes -= size_bytes
            raise
        return Piece(memory, size_bytes, self._given)

    def clear(self) -> None:
        """Gives what is kept back to the system."""
        with self._lock:
            dropped = self._collect()
            dropped += self._drop(lambda: bool(self._kept))
        del dropped

    def _allocate_or_clear(self, size_bytes: int) -> T:
        try:
            return self._allocate(size_bytes)
        except MemoryError:
            pass  # here, so that the error keeps nothing alive
        self.clear()
        return self._allocate(size_bytes)

    def _collect(self) -> list[T]:
        """Takes in what was given back; returns what that is too much for."""
        while self._given:
            self._kept.append(self._given.popleft())
        return self._drop(
            lambda: (
                len(self._kept) > _MOST_KEPT
                or sum(piece.size_bytes for piece in self._kept) > self._max_free_bytes
            )
        )

    def _fitting(self, size_bytes: int) -> Piece[T] | None:
        fitting = [
            piece
            for piece in self._kept
            if size_bytes <= piece.size_bytes <= size_bytes * self._spare
        ]
        if not fitting:
            return None
        piece = min(fitting, key=lambda piece: piece.size_bytes)
        self._kept.remove(piece)
        return piece

    def _make_room(self, size_bytes: int) -> list[T]:
        limit = self._limit_bytes
        if limit is None:
            return []
        dropped = self._drop(
            lambda: bool(self._kept) and self._taken_bytes + size_bytes > limit
        )
        if self._taken_bytes + size_bytes > limit:
            raise MemoryError(
                f"{size_bytes} bytes asked for: {self._taken_bytes} of {limit} are "
                f"in use"
            )
        return dropped

    def _drop(self, too_much: Callable[[], bool]) -> list[T]:
        dropped = []
        while too_much():
            piece = self._kept.popleft()
            self._taken_bytes -= piece.size_bytes
            dropped.append(piece.memory)
        return dropped
