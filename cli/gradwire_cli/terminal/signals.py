"""Termination signals as an exception, so that commands clean up."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_DEAF_S = 2.0
"""Seconds after a signal in which further signals are ignored (a second Ctrl-C, a
shell that signals its whole group), so that they do not interrupt the cleanup."""


class Interrupted(KeyboardInterrupt):
    """The process was asked to end."""

    def __init__(self, signum: int) -> None:
        name = signal.Signals(signum).name
        super().__init__(
            "interrupted" if signum == signal.SIGINT else f"ended by {name}"
        )
        self.status = 128 + signum
        """Exit status of the process: 128 plus the signal's number, as in shells."""


@contextmanager
def signals_raise() -> Iterator[None]:
    """In this context, SIGINT, SIGTERM and SIGHUP raise `Interrupted`."""
    last = float("-inf")

    def on_signal(signum: int, _: FrameType | None) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        if last - before > _DEAF_S:
            raise Interrupted(signum)

    with _handled_by(on_signal):
        yield


@contextmanager
def signals_call(stop: Callable[[], object]) -> Iterator[None]:
    """In this context, a signal calls `stop` in a thread instead of raising.

    gRPC's call locks are written in Python. A signal's exception between taking
    a lock and recording it would leave the lock taken, and closing the channel
    would then wait forever.

    Args:
        stop: Ends the code in this context, for example by closing its client.
            Called once; a later signal exits the process.

    Raises:
        Interrupted: On exit, if a signal arrived, even after another error.
    """
    asked: list[Interrupted] = []
    listening, telling = os.pipe()
    os.set_blocking(telling, False)

    def listen() -> None:
        asked_at = 0.0
        while signum := os.read(listening, 1)[0]:
            if signum not in _SIGNALS:
                continue
            if not asked:
                asked.append(Interrupted(signum))
                asked_at = time.monotonic()
                stop()
            elif time.monotonic() - asked_at > _DEAF_S:
                sys.stderr.write(f"gradwire: {asked[0]}\n")
                os._exit(asked[0].status)

    listener = threading.Thread(target=listen, name="signals", daemon=True)
    listener.start()
    before = signal.set_wakeup_fd(telling, warn_on_full_buffer=False)
    try:
        with _handled_by(lambda *_: None):
            yield
    finally:
        signal.set_wakeup_fd(before)
        os.write(telling, b"\0")
        listener.join()
        os.close(listening)
        os.close(telling)
        if asked:
            raise asked[0] from None


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    previous = {
        signum: signal.signal(signum, handler)
        for signum in _SIGNALS
        # A signal ignored by the parent (nohup) stays ignored.
        if signal.getsignal(signum) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for signum, earlier in previous.items():
            signal.signal(signum, earlier)
