"""What waits, for programs that wait in threads; see `async_io`."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

from gradwire._core.rows import END_OF_ROWS, iterate_rows

K = TypeVar("K", bound=Hashable)
R = TypeVar("R")

# Reentrant: a stream that fails while it is read closes itself.
SyncLock = threading.RLock


class SyncFlag:
    """Something that happens once, and can be waited for."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        """It has happened."""
        self._event.set()

    def wait(self, timeout_s: float) -> None:
        """Return once it has happened, or when the time is up."""
        self._event.wait(timeout_s)


def run_beside(work: Callable[[], R]) -> R:
    """Do work that takes a while: here, for the caller waits anyway."""
    return work()


def iterate(messages: Iterable[bytes]) -> Iterator[bytes]:
    """Messages as an iterator; `async_io` has an asynchronous one."""
    return iter(messages)


def look_up(host: str, port: int) -> list[tuple[Any, ...]]:
    """The addresses of a host, as `socket.getaddrinfo` gives them.

    Raises:
        OSError: It has none.
    """
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)


class SyncAnswers(Generic[K, R]):
    """Questions that are asked side by side, and answered in any order.

    Args:
        asks: What asks each of them, in a thread. It must not raise.
    """

    def __init__(self, asks: Mapping[K, Callable[[], R]]) -> None:
        self._left = len(asks)
        self._answers: SimpleQueue[tuple[K, R]] = SimpleQueue()

        def ask(key: K) -> None:
            self._answers.put((key, asks[key]()))

        for key in asks:
            threading.Thread(target=ask, args=(key,), daemon=True).start()

    def next(self, timeout_s: float | None) -> tuple[K, R] | None:
        """The next answer; None: there are no more, or not in time."""
        if not self._left:
            return None
        try:
            answer = self._answers.get(timeout=timeout_s)
        except Empty:
            return None
        self._left -= 1
        return answer

    def close(self) -> None:
        """Wait for no more answers."""


class SyncItems:
    """The items of the caller's iterable, each asked for once."""

    def __init__(self, rows: Iterable[object]) -> None:
        self._items = iterate_rows(rows)
        self._error: BaseException | None = None

    def next(self) -> object:
        """The next item; `END_OF_ROWS` behind the last.

        Raises:
            BaseException: What the iterable raised, each time.
        """
        if self._error is not None:
            raise self._error
        try:
            return next(self._items, END_OF_ROWS)
        except BaseException as error:
            self._error = error
            raise

    def close(self) -> None:
        """Ask for no more items."""

    def abandon(self) -> None:
        """The same, where the owner is collected as garbage."""
