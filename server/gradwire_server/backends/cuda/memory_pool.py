"""A pool of memory that is expensive to allocate.

Allocating and releasing pinned host memory or device memory takes milliseconds, in
which the device may be idle. Jobs of one client usually have the same size. So freed
pieces are kept, up to a limit, and reused for the next job of a similar size. Pieces
are never split.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from threading import Lock
from typing import Generic, TypeVar

T = TypeVar("T")

GRAIN_BYTES = 64 * 1024
"""Sizes are rounded up to a multiple of this, so that jobs of almost the same size can
reuse each other's memory."""

_MOST_KEPT = 64
"""Most pieces kept, so that the search among small pieces is fast."""


def rounded_up(size_bytes: int) -> int:
    """Return the size of a piece for `size_bytes` bytes."""
    return -(-size_bytes // GRAIN_BYTES) * GRAIN_BYTES


class Piece(Generic[T]):
    """Memory of a pool, in use until it is freed.

    Attributes:
        memory: The return value of the pool's `allocate`.
        size_bytes: Size of the memory, a multiple of `GRAIN_BYTES`.
    """

    __slots__ = ("_given", "memory", "size_bytes")

    def __init__(self, memory: T, size_bytes: int, given: deque[Piece[T]]) -> None:
        self.memory = memory
        self.size_bytes = size_bytes
        self._given: deque[Piece[T]] | None = given

    def free(self) -> None:
        """Free the piece. May be called in any thread, and more than once.

        It takes no lock and releases nothing, because the garbage collector may call it
        anywhere.
        """
        given, self._given = self._given, None
        if given is not None:
            given.append(Piece(self.memory, self.size_bytes, given))


class Pool(Generic[T]):
    """Pieces of one kind of memory, in use or kept for reuse.

    Args:
        allocate: Allocates a number of bytes, or raises `MemoryError`. They are
            released with the last reference, in a thread that calls `take` or `clear`.
        max_free_bytes: Most bytes of pieces kept.
        limit_bytes: Most bytes of all pieces; None: no limit.
        spare: Factor by which a reused piece may be larger than requested.
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
        """Pieces kept for reuse, oldest first."""
        self._taken_bytes = 0
        """Bytes of all pieces: in use, freed, and kept."""

    @property
    def taken_bytes(self) -> int:
        """Bytes allocated and not released."""
        return self._taken_bytes

    def take(self, size_bytes: int) -> Piece[T]:
        """Return an uninitialized piece of at least `size_bytes` bytes.

        Raises:
            MemoryError: There is not enough memory, even after all kept pieces are
                released.
        """
        size_bytes = rounded_up(size_bytes)
        with self._lock:
            dropped = self._collect()
            piece = self._fitting(size_bytes)
            if piece is None:
                dropped += self._make_room(size_bytes)
                self._taken_bytes += size_bytes
        del dropped  # released without the lock
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
        """Release all kept pieces."""
        with self._lock:
            dropped = self._collect()
            dropped += self._drop(lambda: bool(self._kept))
        del dropped

    def _allocate_or_clear(self, size_bytes: int) -> T:
        try:
            return self._allocate(size_bytes)
        except MemoryError:
            pass  # left here, so that the error keeps no memory alive
        self.clear()
        return self._allocate(size_bytes)

    def _collect(self) -> list[T]:
        """Collect freed pieces, and return surplus pieces to be released."""
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
                f"{size_bytes} bytes requested, but {self._taken_bytes} of {limit} are "
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
