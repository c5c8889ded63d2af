"""Which row block may use which slot of a job's memory."""

from __future__ import annotations

import asyncio


class Ring:
    """The slots of a ring: that of block b is free for it once block b - s was sent.

    Args:
        count: Number of slots, s.
        first: The first row block that is received.

    Attributes:
        released: Row blocks sent, including the blocks before `first`.
    """

    def __init__(self, count: int, first: int = 0) -> None:
        self._count = count
        self.released = first
        self._owner = [first + (slot - first) % count for slot in range(count)]

    def is_free_for(self, block: int) -> bool:
        """Return whether the slot of `block` is free for it."""
        return self._owner[block % self._count] == block

    def release(self, block: int) -> None:
        """Free the slot of a block that was sent."""
        self._owner[block % self._count] = block + self._count
        self.released += 1


class Slots(Ring):
    """A ring for the event loop."""

    def __init__(self, count: int, first: int = 0) -> None:
        super().__init__(count, first)
        self._freed = asyncio.Event()

    async def wait_for(self, block: int) -> None:
        """Wait until the slot of `block` is free for it."""
        while not self.is_free_for(block):
            await self._freed.wait()

    async def all_released(self, count: int) -> None:
        """Wait until `released` reaches `count`."""
        while self.released < count:
            await self._freed.wait()

    def release(self, block: int) -> None:
        """Free the slot of a block that was sent."""
        super().release(block)
        self._freed.set()
        self._freed = asyncio.Event()
