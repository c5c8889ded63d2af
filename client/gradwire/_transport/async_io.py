"""What waits, for programs with an event loop.

`sync_io` has the same names, with Sync instead of Async, for programs that wait in
threads: the client is written once on top of either.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
)
from typing import Any, Generic, TypeVar

from gradwire._core.rows import END_OF_ROWS, iterate_rows

K = TypeVar("K", bound=Hashable)
R = TypeVar("R")

AsyncLock = asyncio.Lock


class AsyncFlag:
    """Something that happens once, and can be waited for."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def set(self) -> None:
        """It has happened."""
        self._event.set()

    async def wait(self, timeout_s: float) -> None:
        """Return once it has happened, or when the time is up."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._event.wait()


async def run_beside(work: Callable[[], R]) -> R:
    """Do work that takes a while where the event loop does not wait for it."""
    return await asyncio.to_thread(work)


async def iterate(messages: Iterable[bytes]) -> AsyncGenerator[bytes]:
    """Messages as an asynchronous iterator; `sync_io` has a plain one."""
    for message in messages:
        yield message


async def look_up(host: str, port: int) -> list[tuple[Any, ...]]:
    """The addresses of a host, as `socket.getaddrinfo` gives them.

    Raises:
        OSError: It has none.
    """
    loop = asyncio.get_running_loop()
    return await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)


class AsyncAnswers(Generic[K, R]):
    """Questions that are asked side by side, and answered in any order.

    Args:
        asks: What asks each of them. It must not raise.
    """

    def __init__(self, asks: Mapping[K, Callable[[], Awaitable[R]]]) -> None:
        async def ask(key: K) -> tuple[K, R]:
            return key, await asks[key]()

        self._waiting = {asyncio.create_task(ask(key)) for key in asks}
        self._done: list[asyncio.Task[tuple[K, R]]] = []

    async def next(self, timeout_s: float | None) -> tuple[K, R] | None:
        """The next answer; None: there are no more, or not in time."""
        if not self._done and self._waiting:
            done, self._waiting = await asyncio.wait(
                self._waiting, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            self._done.extend(done)
        return self._done.pop().result() if self._done else None

    async def aclose(self) -> None:
        """Wait for no more answers."""
        for task in self._waiting:
            task.cancel()
        await asyncio.gather(*self._waiting, return_exceptions=True)


class AsyncItems:
    """The items of the caller's iterable, each asked for once.

    An asynchronous iterable is asked in a task of its own, the same for all items:
    cancelling the task that waits for an item must not reach it, for a generator
    ends with what is raised in it.
    """

    def __init__(self, rows: Iterable[object] | AsyncIterable[object]) -> None:
        self._rows = rows if isinstance(rows, AsyncIterable) else iterate_rows(rows)
        self._wanted = asyncio.Event()
        self._answer: asyncio.Future[object] | None = None
        self._asking: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._error: BaseException | None = None

    async def next(self) -> object:
        """The next item; `END_OF_ROWS` behind the last.

        Raises:
            BaseException: What the iterable raised, each time.
        """
        if self._error is not None:
            raise self._error
        if isinstance(self._rows, Iterator):
            try:
                return next(self._rows, END_OF_ROWS)
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

    async def aclose(self) -> None:
        """Ask for no more items; a question that runs is cancelled."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait([self._asking])

    def abandon(self) -> None:
        """The same, from the thread that collects the owner as garbage."""
        if self._asking is not None and self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop may be closed
                self._loop.call_soon_threadsafe(self._asking.cancel)

    async def _ask(self, items: AsyncIterator[object]) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            try:
                item = await anext(items, END_OF_ROWS)
            except BaseException as error:  # noqa: BLE001 - raised where the item is due
                self._error = error
                if self._answer is not None:
                    self._answer.set_exception(error)
                    # The stream may have ended, and nobody wait for it any more.
                    self._answer.exception()
                return
            if self._answer is not None:
                self._answer.set_result(item)
            if item is END_OF_ROWS:
                return
