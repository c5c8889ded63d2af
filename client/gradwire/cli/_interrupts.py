"""Being asked to end, as an exception that cleans up on its way."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(KeyboardInterrupt):
    """The process was sent SIGTERM or SIGHUP: Ctrl-C, but for its status."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"ended by {signal.Signals(signum).name}")
        self.status = 128 + signum


@contextmanager
def terminations_raise() -> Iterator[None]:
    """Within this, SIGTERM and SIGHUP raise `Terminated` in the main thread."""

    def on_signal(signum: int, _: FrameType | None) -> None:
        raise Terminated(signum)

    before = {
        signum: signal.signal(signum, on_signal)
        for signum in (signal.SIGTERM, signal.SIGHUP)
        # One that the parent had ignored (nohup) stays ignored.
        if signal.getsignal(signum) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
