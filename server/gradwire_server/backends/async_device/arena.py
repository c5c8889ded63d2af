"""Places for arrays in one piece of a device's memory."""

from __future__ import annotations

from bisect import insort

from gradwire_server.backends.kept_memory import NoPieceError
from gradwire_server.backends.row_blocks import ALIGNMENT

ARRAYS = 1 << 13
"""Small arrays that always fit, whatever is lost to alignment."""


def arena_bytes(size_bytes: int) -> int:
    """Return the size of an arena for arrays of so many bytes.

    Each array takes a multiple of `ALIGNMENT`, and freed places between others may be
    too small for the next array: there is a sixteenth more.
    """
    return _aligned(size_bytes) + _aligned(size_bytes // 16) + ARRAYS * ALIGNMENT


class Arena:
    """Takes places from a piece of memory, and takes them back.

    An array goes to the smallest gap that it fits, and freed neighbours become one
    gap. It moves no array.

    Args:
        address: Where the memory starts, a multiple of `ALIGNMENT`.
        size_bytes: Its size.
    """

    def __init__(self, address: int, size_bytes: int) -> None:
        self._gaps = [(address, size_bytes)] if size_bytes else []
        """Start and size of each gap, in the order of the addresses."""
        self._taken: dict[int, int] = {}
        """Size of each place, by its address."""

    @property
    def taken_bytes(self) -> int:
        """Bytes of all places."""
        return sum(self._taken.values())

    def take(self, size_bytes: int) -> int:
        """Return the address of a place for at least one byte.

        Raises:
            NoPieceError: There is no gap of the size.
        """
        size_bytes = max(_aligned(size_bytes), ALIGNMENT)
        fitting = [gap for gap in self._gaps if gap[1] >= size_bytes]
        if not fitting:
            raise NoPieceError(f"there are no {size_bytes} bytes in one piece")
        start, size = gap = min(fitting, key=lambda gap: (gap[1], gap[0]))
        self._gaps.remove(gap)
        if size > size_bytes:
            insort(self._gaps, (start + size_bytes, size - size_bytes))
        self._taken[start] = size_bytes
        return start

    def give(self, address: int) -> None:
        """Take a place back.

        Raises:
            KeyError: There is no place at the address.
        """
        gap = (address, self._taken.pop(address))
        insort(self._gaps, gap)
        index = self._gaps.index(gap)
        for before in (index, index - 1):
            self._join(before)

    def _join(self, before: int) -> None:
        """Join a gap and the next one if they touch."""
        if before < 0 or before + 1 >= len(self._gaps):
            return
        start, size = self._gaps[before]
        next_start, next_size = self._gaps[before + 1]
        if start + size == next_start:
            self._gaps[before : before + 2] = [(start, size + next_size)]


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT) * ALIGNMENT
