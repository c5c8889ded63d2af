"""The order of a session's jobs and steps."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeAlias

from gradwire_server.admission.controller import heartbeat_s

OnWait: TypeAlias = Callable[[int], Awaitable[None]]


class Turns:
    """A lock for jobs, which share it, and steps, which have it alone.

    First come, first served: a step waits for the jobs before it, and the jobs after it
    wait for the step. So no job reads a weight while a step changes it, and no step
    waits forever.
    """

    def __init__(self) -> None:
        self._sharing = 0
        self._alone = False
        self._waiting: deque[tuple[bool, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def shared(self, on_wait: OnWait | None = None) -> AsyncIterator[None]:
        """Hold the lock together with others within this context.

        Args:
            on_wait: Called after `heartbeat_s`, and again, with the number of jobs and
                steps ahead.
        """
        await self._take(alone=False, on_wait=on_wait)
        try:
            yield
        finally:
            self._sharing -= 1
            self._admit()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Hold the lock alone within this context."""
        await self.take_alone()
        try:
            yield
        finally:
            self.release_alone()

    async def take_alone(self) -> None:
        """Take the lock alone, to be returned with `release_alone`."""
        await self._take(alone=True)

    def release_alone(self) -> None:
        """Return the lock taken with `take_alone`."""
        self._alone = False
        self._admit()

    async def _take(self, *, alone: bool, on_wait: OnWait | None = None) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((alone, turn))
        self._admit()
        try:
            while not turn.done():
                await asyncio.wait([turn], timeout=heartbeat_s())
                if on_wait is not None and not turn.done():
                    await on_wait(self._ahead_of(turn))
        except BaseException:
            if not turn.done():
                turn.cancel()
            elif alone:  # the turn came together with the cancellation
                self._alone = False
            else:
                self._sharing -= 1
            self._admit()
            raise

    def _ahead_of(self, turn: asyncio.Future[None]) -> int:
        ahead = self._sharing + self._alone
        for _, other in self._waiting:
            if other is turn:
                break
            ahead += not other.cancelled()
        return ahead

    def _admit(self) -> None:
        while self._waiting:
            alone, turn = self._waiting[0]
            if turn.cancelled():
                self._waiting.popleft()
                continue
            if self._alone or (alone and self._sharing):
                return
            self._waiting.popleft()
            if alone:
                self._alone = True
            else:
                self._sharing += 1
            turn.set_result(None)
