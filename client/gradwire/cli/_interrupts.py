"""Being asked to end, as an exception that cleans up on its way."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_DEAF_S = 2.0
"""Another signal so soon after the first (a second Ctrl-C, a shell that
signals its whole group) does not break into the cleaning up."""


class Interrupted(KeyboardInterrupt):
    """The process was asked to end."""

    def __init__(self, signum: int) -> None:
        name = signal.Signals(signum).name
        super().__init__(
            "interrupted" if signum == signal.SIGINT else f"ended by {name}"
        )
        self.status = 128 + signum
        """What the process ends with, as shells count it."""


@contextmanager
def signals_raise() -> Iterator[None]:
    """Within this, SIGINT, SIGTERM and SIGHUP raise `Interrupted`."""
    last = float("-inf")

    def on_signal(signum: int, _: FrameType | None) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        if last - before > _DEAF_S:
            raise Interrupted(signum)

    previous = {
        signum: signal.signal(signum, on_signal)
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        # One that the parent had ignored (nohup) stays ignored.
        if signal.getsignal(signum) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
