"""A stream's items as tasks draw them."""

from __future__ import annotations

import asyncio
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Iterable,
    Iterator,
    Mapping,
)

from gradwire._arrays.operand import Operand
from gradwire._resilience.replay_buffer import ReplayBuffer
from gradwire._resilience.row_reader import iterate
from gradwire_protocol.matrices import Matrix

_NOTHING = object()


class AsyncRowSource:
    """The caller's items, drawn by whichever task needs the next one.

    An asynchronous iterable is asked in a task of its own, the same for all
    items: cancelling the writer of an attempt that has failed must not reach
    it, for a generator ends with what is raised in it.
    """

    def __init__(
        self, rows: Iterable[object] | AsyncIterable[object], held: ReplayBuffer
    ) -> None:
        self._rows = rows if isinstance(rows, AsyncIterable) else iterate(rows)
        self._held = held
        self._turn = asyncio.Lock()
        self._error: BaseException | None = None
        self._wanted = asyncio.Event()
        self._answer: asyncio.Future[object] | None = None
        self._asking: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def portions(self, row: int) -> AsyncGenerator[Mapping[Matrix, Operand]]:
        """The rows from a row on."""
        while True:
            portion = self._held.portion(row)
            if portion is not None:
                yield portion
                row += next(iter(portion.values())).rows
            elif not await self.draw(row):
                return

    async def draw(self, row: int) -> bool:
        """Have an item drawn, unless the rows from a row on are there.

        Returns:
            Whether there is one.

        Raises:
            BaseException: What the caller's iterable raised, each time.
        """
        async with self._turn:
            if self._error is not None:
                raise self._error
            if self._held.drawn_beyond(row):
                return True
            if self._held.complete:
                return False
            self._held.settle()
            item = await self._next()
            try:
                if item is not _NOTHING:
                    self._held.add(item)
            except BaseException as error:
                self._error = error
                raise
            self._held.complete = item is _NOTHING
            return item is not _NOTHING

    async def aclose(self) -> None:
        """Ask for no more items; who was asked is cancelled."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait([self._asking])

    def abandon(self) -> None:
        """The same from wherever the owner was collected."""
        if self._asking is not None and self._loop is not None:
            self._loop.call_soon_threadsafe(self._asking.cancel)

    async def _next(self) -> object:
        if isinstance(self._rows, Iterator):
            try:
                return next(self._rows, _NOTHING)
            except BaseException as error:
                self._error = error
                raise
        self._loop = asyncio.get_running_loop()
        if self._answer is None:
            self._answer = self._loop.create_future()
            self._wanted.set()
        if self._asking is None:
            self._asking = self._loop.create_task(self._ask(aiter(self._rows)))
        item = await asyncio.shield(self._answer)
        self._answer = None
        return item

    async def _ask(self, items: AsyncIterator[object]) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            try:
                item = await anext(items, _NOTHING)
            except BaseException as error:  # noqa: BLE001 - raised again by who asked
                self._error = error
                if self._answer is not None:
                    self._answer.set_exception(error)
                    # Nobody may ask any more.
                    self._answer.exception()
                return
            if self._answer is not None:
                self._answer.set_result(item)
            if item is _NOTHING:
                return
