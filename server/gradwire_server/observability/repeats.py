"""A limit on repeated log lines, which counts what it leaves out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar

Kind = TypeVar("Kind", bound=Hashable)


class CallLater(Protocol):
    """`asyncio.AbstractEventLoop.call_later`."""

    def __call__(
        self, delay: float, callback: Callable[[], object]
    ) -> asyncio.TimerHandle:
        """Call `callback` after `delay` seconds."""


class Repeats(Generic[Kind]):
    """Allows a number of lines of each kind within a window of time.

    The window of a kind begins with its first line. At its end `tell` is called, if
    lines were left out; the next line begins another window.

    Args:
        most: Lines of a kind within a window.
        window_s: Length of a window, seconds.
        call_later: The event loop's; None: the running loop's.

    Attributes:
        window_s: Length of a window, seconds.
        tell: Called with a kind and how many of its lines were left out.
    """

    def __init__(
        self, most: int, window_s: float, call_later: CallLater | None = None
    ) -> None:
        self.window_s = window_s
        self.tell: Callable[[Kind, int], object] = _ignore
        self._most = most
        self._call_later = call_later
        self._counts: dict[Kind, int] = {}
        self._timers: dict[Kind, asyncio.TimerHandle] = {}

    def allows(self, kind: Kind) -> bool:
        """Count a line; return whether it is one of the first in its window."""
        count = self._counts.get(kind, 0) + 1
        self._counts[kind] = count
        if count == 1:
            call_later = self._call_later or asyncio.get_running_loop().call_later
            self._timers[kind] = call_later(self.window_s, lambda: self._end(kind))
        return count <= self._most

    def close(self) -> None:
        """End all windows now."""
        for kind, timer in list(self._timers.items()):
            timer.cancel()
            self._end(kind)

    def _end(self, kind: Kind) -> None:
        del self._timers[kind]
        left_out = self._counts.pop(kind) - self._most
        if left_out > 0:
            self.tell(kind, left_out)


def _ignore(*_: object) -> None:
    pass
