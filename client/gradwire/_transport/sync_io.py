"""Waiting and input for synchronous clients; see `async_io`."""

from __future__ import annotations

import atexit
import contextvars
import socket
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from queue import Empty, SimpleQueue
from typing import Any, Generic, Protocol, TypeVar

from gradwire._core import interrupts
from gradwire._core.rows import END_OF_ROWS, iterate_rows

K = TypeVar("K", bound=Hashable)
R = TypeVar("R")

# Reentrant, because a stream that fails while it is read closes itself.
SyncLock = threading.RLock


class SyncFlag:
    """An event that happens once, and can be waited for."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        """Signal the event."""
        self._event.set()

    def wait(self, timeout_s: float) -> None:
        """Wait for the event, at most `timeout_s` seconds."""
        self._event.wait(timeout_s)


class SyncNews:
    """Events that happen again and again, and can be waited for."""

    def __init__(self) -> None:
        self.count = 0
        self._changed = threading.Condition()

    def tell(self) -> None:
        """Signal an event."""
        with interrupts.held(), self._changed:
            self.count += 1
            self._changed.notify_all()

    def wait(self, count: int, timeout_s: float) -> None:
        """Wait, at most `timeout_s` seconds, until more than `count` have happened."""
        with interrupts.held(waits=True), self._changed:
            if self.count == count:
                self._changed.wait(timeout_s)


class SyncBackground:
    """Work beside its caller, in a thread. It must not raise.

    Args:
        work: The work.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        context = contextvars.copy_context()
        self._thread = threading.Thread(
            name="gradwire-spread", target=context.run, args=(work,), daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Wait for the end of the work, which the caller has told to end."""
        if self._thread is not threading.current_thread():
            self._thread.join()

    def abandon(self) -> None:
        """Do nothing: the work ends by itself."""


class SyncRepeater:
    """Does something again and again in the background.

    The thread ends with the process, and in the child of a fork there is none.

    Args:
        interval_s: Seconds between the end of one time and the next.
        work: What to do. It returns whether to go on, and must not raise.
    """

    def __init__(self, interval_s: float, work: Callable[[], bool]) -> None:
        # An event's lock may be held by the thread in which a finalizer runs.
        self._wakes = wakes = SimpleQueue[bool]()

        def repeat() -> None:
            again = True
            while again:
                try:
                    stop = wakes.get(timeout=interval_s)
                except Empty:
                    stop = False
                again = not stop and work()

        threading.Thread(target=repeat, name="gradwire-lease", daemon=True).start()

    def wake(self) -> None:
        """Do it now. A finalizer may call it, in any thread."""
        self._wakes.put(False)

    def close(self) -> None:
        """Stop after the current time."""
        self._wakes.put(True)


class Closeable(Protocol):
    """What is closed when the program ends."""

    def close(self, *, timeout_s: float | None = None) -> None:
        """Close it, in so many seconds at most; None: its own limit."""


_to_close: weakref.WeakSet[Closeable] = weakref.WeakSet()


def close_at_exit(closeable: Closeable) -> None:
    """Have an object closed when the program ends, however: unless it is killed."""
    # Functions run in the reverse order of their registration: this one must run while
    # the connections, which were made before, are open.
    atexit.unregister(_close_all)
    atexit.register(_close_all)
    _to_close.add(closeable)


def _close_all() -> None:
    deadline = time.monotonic() + _EXIT_S
    for each in list(_to_close):
        each.close(timeout_s=max(deadline - time.monotonic(), 0.0))


_EXIT_S = 2.0
"""Seconds by which a server that does not answer may hold up the program's end."""


def run_beside(work: Callable[[], R]) -> R:
    """Run long work directly, because the caller waits for it."""
    return work()


class SyncThread:
    """Runs work that may block for long, directly: the caller waits for it."""

    def __init__(self, name: str) -> None:
        del name

    def run(self, work: Callable[[], R]) -> R:
        """Run work."""
        return work()

    def close(self) -> None:
        """Do nothing."""


def run_together(
    work: Callable[[], None], count: int, stop: Callable[[], object]
) -> None:
    """Run `work` several times concurrently.

    Args:
        work: What to run.
        count: How many times, at least 1: in threads, unless it is 1.
        stop: Called if one fails, or if this function is interrupted: it must end the
            others, which have ended when this function returns.

    Raises:
        BaseException: The first exception of one of them.
    """
    if count == 1:
        work()
        return
    ended: SimpleQueue[BaseException | None] = SimpleQueue()

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised by the caller's thread
            ended.put(error)
        else:
            ended.put(None)

    threads: list[threading.Thread] = []
    try:
        for _ in range(count):
            context = contextvars.copy_context()
            thread = threading.Thread(
                name="gradwire-job", target=context.run, args=(run,), daemon=True
            )
            thread.start()
            threads.append(thread)
        for _ in threads:
            _raise(ended.get())
    except BaseException:
        stop()
        for thread in threads:
            thread.join()
        while not ended.empty():  # the others' errors refer to it
            ended.get()
        raise


def _raise(error: BaseException | None) -> None:
    if error is not None:
        try:
            raise error
        finally:
            del error  # it refers to this frame


def iterate(messages: Iterable[bytes]) -> Iterator[bytes]:
    """Return the messages as an iterator (in `async_io`: asynchronous)."""
    return iter(messages)


def look_up(host: str, port: int) -> list[tuple[Any, ...]]:
    """Look up the addresses of a host with `getaddrinfo`.

    Raises:
        OSError: The host has no address.
    """
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)


class SyncAnswers(Generic[K, R]):
    """Calls that run concurrently, with results in any order.

    Args:
        asks: The calls, each made in a thread. They must not raise.
    """

    def __init__(self, asks: Mapping[K, Callable[[], R]]) -> None:
        self._left = len(asks)
        self._answers: SimpleQueue[tuple[K, R]] = SimpleQueue()

        def ask(key: K) -> None:
            self._answers.put((key, asks[key]()))

        for key in asks:
            threading.Thread(target=ask, args=(key,), daemon=True).start()

    def next(self, timeout_s: float | None) -> tuple[K, R] | None:
        """Return the next result; None if there are no more, or after the timeout."""
        if not self._left:
            return None
        try:
            answer = self._answers.get(timeout=timeout_s)
        except Empty:
            return None
        self._left -= 1
        return answer

    def close(self) -> None:
        """Do nothing: the remaining threads end by themselves."""


class SyncItems:
    """The items of the caller's iterable, each requested once."""

    def __init__(self, rows: Iterable[object]) -> None:
        self._items = iterate_rows(rows)
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._stopped = False
        self._requesting = False

    def next(self) -> object:
        """Return the next item, or `END_OF_ROWS` after the last.

        Raises:
            BaseException: An exception of the iterable. Further calls raise it again.
        """
        if self._error is not None:
            raise self._error
        with self._lock:
            if self._stopped:
                return END_OF_ROWS
            self._requesting = True
        try:
            return next(self._items, END_OF_ROWS)
        except BaseException as error:
            self._error = error
            raise
        finally:
            self._requesting = False

    def stop(self) -> bool:
        """Request no more items.

        Returns:
            Whether a thread is in the iterable, and may stay there for long.
        """
        with self._lock:
            self._stopped = True
            return self._requesting

    def close(self) -> None:
        """Request no more items, and forget their error: its frames hold the rows."""
        self._error = None

    def abandon(self) -> None:
        """Do the same from the garbage collector."""
