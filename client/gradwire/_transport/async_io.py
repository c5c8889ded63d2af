"""Waiting and input for asynchronous clients.

`sync_io` has the same names, with Sync instead of Async, for synchronous clients. The
client's code is written once on top of both.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
)
from queue import SimpleQueue
from typing import Any, Generic, TypeVar, cast

from gradwire._core.rows import END_OF_ROWS, iterate_rows

K = TypeVar("K", bound=Hashable)
R = TypeVar("R")

AsyncLock = asyncio.Lock


class AsyncFlag:
    """An event that happens once, and can be waited for."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def set(self) -> None:
        """Signal the event."""
        self._event.set()

    async def wait(self, timeout_s: float) -> None:
        """Wait for the event, at most `timeout_s` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._event.wait()


class AsyncNews:
    """Events that happen again and again, and can be waited for."""

    def __init__(self) -> None:
        self.count = 0
        self._event = asyncio.Event()

    def tell(self) -> None:
        """Signal an event."""
        self.count += 1
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self, count: int, timeout_s: float) -> None:
        """Wait, at most `timeout_s` seconds, until more than `count` have happened."""
        if self.count == count:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._event.wait()


_in_background: set[asyncio.Task[None]] = set()


class AsyncBackground:
    """Work beside its caller. It must not raise.

    Args:
        work: The work.
    """

    def __init__(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.create_task(work())
        # The event loop alone does not keep a task from the garbage collector.
        _in_background.add(self._task)
        self._task.add_done_callback(_in_background.discard)

    async def aclose(self) -> None:
        """Cancel the work, and wait for its end."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def abandon(self) -> None:
        """Cancel the work from the garbage collector, in any thread."""
        with contextlib.suppress(RuntimeError):  # the loop may be closed
            self._loop.call_soon_threadsafe(self._task.cancel)


class AsyncRepeater:
    """Does something again and again in the background.

    Args:
        interval_s: Seconds between the end of one time and the next.
        work: What to do. It returns whether to go on, and must not raise.
    """

    def __init__(self, interval_s: float, work: Callable[[], Awaitable[bool]]) -> None:
        self._loop = asyncio.get_running_loop()
        self._woken = woken = asyncio.Event()

        async def repeat() -> None:
            again = True
            while again:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(woken.wait(), interval_s)
                woken.clear()
                again = await work()

        self._task = self._loop.create_task(repeat())

    def wake(self) -> None:
        """Do it now. A finalizer may call it, in any thread."""
        with contextlib.suppress(RuntimeError):  # the event loop has ended
            self._loop.call_soon_threadsafe(self._woken.set)

    async def aclose(self) -> None:
        """Stop, unless the work itself calls it."""
        if self._task.done():  # perhaps with its event loop
            return
        if self._task is asyncio.current_task():
            return
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


def close_at_exit(closeable: object) -> None:
    """Do nothing: the event loop has ended before the program does.

    `asyncio.run` cancels the tasks that are left, whose context managers close.
    """
    del closeable


async def run_beside(work: Callable[[], R]) -> R:
    """Run long work in a thread, so that the event loop is not blocked."""
    return await asyncio.to_thread(work)


class AsyncThread:
    """A thread for work that may block for long, such as that of a socket.

    The event loop's own threads are few, and others wait for them. It starts with the
    first work and ends with the process, or with `close` after its last work.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._work: SimpleQueue[Callable[[], None] | None] | None = None

    async def run(self, work: Callable[[], R]) -> R:
        """Run work in the thread."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[R] = loop.create_future()

        def settle(result: R | None, error: BaseException | None) -> None:
            if done.done():
                return
            if error is None:
                done.set_result(cast("R", result))
            else:
                done.set_exception(error)

        def run() -> None:
            result: R | None = None
            error: BaseException | None = None
            try:
                result = work()
            except BaseException as raised:  # noqa: BLE001 - raised by the caller
                error = raised
            with contextlib.suppress(RuntimeError):  # the loop may be closed
                loop.call_soon_threadsafe(settle, result, error)

        if self._work is None:
            self._work = SimpleQueue()
            threading.Thread(
                target=_run_all, args=(self._work,), name=self._name, daemon=True
            ).start()
        self._work.put(run)
        return await done

    def close(self) -> None:
        """Run nothing more."""
        if self._work is not None:
            self._work.put(None)


def _run_all(queue: SimpleQueue[Callable[[], None] | None]) -> None:
    while (work := queue.get()) is not None:
        work()
        del work  # and what it refers to


async def run_together(
    work: Callable[[], Awaitable[None]], count: int, stop: Callable[[], object]
) -> None:
    """Run `work` several times concurrently.

    Args:
        work: What to run.
        count: How many times, at least 1.
        stop: Called if one fails. The others are cancelled, too, and have ended when
            this function returns.

    Raises:
        BaseException: The first exception of one of them.
    """
    if count == 1:
        await work()
        return
    tasks = [asyncio.ensure_future(work()) for _ in range(count)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks:
            if task.done():
                task.result()
    except BaseException:
        stop()
        for task in tasks:
            task.cancel()
        await _all_ended(tasks)
        raise
    finally:
        del task, tasks  # their errors refer to this frame


async def _all_ended(tasks: Collection[asyncio.Task[None]]) -> None:
    """Wait for cancelled tasks.

    If the waiting is cancelled, too, it still goes on: the tasks are not cancelled once
    more while they close what they have.
    """
    cancelled: asyncio.CancelledError | None = None
    while not all(task.done() for task in tasks):
        try:
            await asyncio.wait(tasks)
        except asyncio.CancelledError as error:
            cancelled = error
    for task in tasks:
        if not task.cancelled():
            task.exception()  # only the first one is raised
    if cancelled is not None:
        try:
            raise cancelled
        finally:
            del cancelled  # it refers to this frame


async def iterate(messages: Iterable[bytes]) -> AsyncGenerator[bytes]:
    """Return the messages as an asynchronous iterator (in `sync_io`: an iterator)."""
    for message in messages:
        yield message


async def look_up(host: str, port: int) -> list[tuple[Any, ...]]:
    """Look up the addresses of a host with `getaddrinfo`.

    Raises:
        OSError: The host has no address.
    """
    loop = asyncio.get_running_loop()
    return await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)


class AsyncAnswers(Generic[K, R]):
    """Calls that run concurrently, with results in any order.

    Args:
        asks: The calls. They must not raise.
    """

    def __init__(self, asks: Mapping[K, Callable[[], Awaitable[R]]]) -> None:
        async def ask(key: K) -> tuple[K, R]:
            return key, await asks[key]()

        self._waiting = {asyncio.create_task(ask(key)) for key in asks}
        self._done: list[asyncio.Task[tuple[K, R]]] = []

    async def next(self, timeout_s: float | None) -> tuple[K, R] | None:
        """Return the next result; None if there are no more, or after the timeout."""
        if not self._done and self._waiting:
            done, self._waiting = await asyncio.wait(
                self._waiting, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            self._done.extend(done)
        return self._done.pop().result() if self._done else None

    async def aclose(self) -> None:
        """Cancel the remaining calls."""
        for task in self._waiting:
            task.cancel()
        await asyncio.gather(*self._waiting, return_exceptions=True)


class AsyncItems:
    """The items of the caller's iterable, each requested once.

    An asynchronous iterable runs in its own task. So cancelling the task that waits for
    an item does not raise in the iterable, which would end a generator.
    """

    def __init__(self, rows: Iterable[object] | AsyncIterable[object]) -> None:
        self._rows = rows if isinstance(rows, AsyncIterable) else iterate_rows(rows)
        self._wanted = asyncio.Event()
        self._answer: asyncio.Future[object] | None = None
        self._asking: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._error: BaseException | None = None

    async def next(self) -> object:
        """Return the next item, or `END_OF_ROWS` after the last.

        Raises:
            BaseException: An exception of the iterable. Further calls raise it again.
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

    def stop(self) -> bool:
        """Return whether a thread is in the iterable: never, `aclose` cancels that."""
        return False

    async def aclose(self) -> None:
        """Request no more items, and cancel the current request.

        Forget the items' error: its frames hold the rows.
        """
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait([self._asking])
        self._error = self._answer = None

    def abandon(self) -> None:
        """Do the same from the garbage collector, in any thread."""
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
                    # Marks the error as retrieved: the stream may have ended.
                    self._answer.exception()
                return
            if self._answer is not None:
                self._answer.set_result(item)
            if item is END_OF_ROWS:
                return
