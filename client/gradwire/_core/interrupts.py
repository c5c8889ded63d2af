"""Ctrl-C during calls.

Python handles signals in the main thread, between any two instructions, and the handler
of Ctrl-C raises an exception there. In gRPC, that may be an instruction after which a
lock would have been released: `threading.Condition` releases its lock in Python code,
where a signal is handled that arrived in the C code before. No call of the channel ends
then any more, and to close it takes for ever.

So handlers of signals wait while the main thread is inside gRPC, and run as soon as it
has left, or waits for an answer.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # without enums, which take long
import _thread
import contextlib
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from types import FrameType
from typing import Any

PATIENCE_S = 1.0
"""Longest time that a signal waits, in seconds. The main thread is inside gRPC only for
moments."""

_RETRY_S = 0.002

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
"""Signals for which programs have handlers that raise exceptions."""

_WAIT = threading.Condition.wait.__code__

_RELEASED = "gotit"
"""The variable that `_WAIT` sets when it has released its lock, and will take it again
whatever happens."""


class _State:
    """What the main thread does; no other thread handles signals."""

    def __init__(self) -> None:
        self.main_thread = threading.main_thread().ident or 0
        self.depth = 0
        self.waits = False
        self.handlers: dict[int, Any] = {}
        self.arrived_s: dict[int, float] = {}
        self.pending: deque[int] = deque()


_state = _State()


@contextlib.contextmanager
def held(*, waits: bool = False) -> Iterator[None]:
    """Begin and end a block; see `enter`."""
    before = enter(waits=waits)
    try:
        yield
    finally:
        leave(before)


def enter(*, waits: bool) -> bool | None:
    """Begin a block in which handlers of signals wait. Blocks may be nested.

    Outside the main thread, it does nothing.

    Args:
        waits: Whether they run while the thread waits for a condition.

    Returns:
        What `leave` needs at the end of the block.
    """
    state = _state
    if threading.get_ident() != state.main_thread:
        return None
    if not state.depth:
        for number in _SIGNALS:
            handler = _signal.getsignal(number)
            if callable(handler) and handler is not _handle:
                state.handlers[number] = handler
                _signal.signal(number, _handle)
    before, state.waits = state.waits, waits
    # Last: until here, handlers run at once.
    state.depth += 1
    return before


def leave(before: bool | None) -> None:
    """End a block, and run the handlers that wait at the end of the outermost."""
    if before is None:
        return
    state = _state
    state.waits = before
    state.depth -= 1
    if state.depth:
        return
    for number, handler in state.handlers.items():
        # The program may have set another one meanwhile, in a callback.
        if _signal.getsignal(number) is _handle:
            _signal.signal(number, handler)
    with contextlib.suppress(IndexError):
        while True:
            number = state.pending.popleft()
            state.arrived_s.pop(number, None)
            # If it raises an exception, `_again` handles the others.
            state.handlers[number](number, sys._getframe())


def _handle(number: int, frame: FrameType | None) -> None:
    """Run a signal's handler if that does no harm here, and else a little later."""
    state = _state
    now_s = time.monotonic()
    arrived_s = state.arrived_s.setdefault(number, now_s)
    if state.depth and not _rests(frame) and now_s - arrived_s < PATIENCE_S:
        state.pending.append(number)
        # Without the locks of `threading`, which this thread may hold.
        _thread.start_new_thread(_again, (state,))
        return
    del state.arrived_s[number]
    state.handlers[number](number, frame)


def _rests(frame: FrameType | None) -> bool:
    """Return whether the main thread waits, and nothing is amiss if it no longer does.

    Args:
        frame: Where it is.
    """
    return (
        _state.waits
        and frame is not None
        and frame.f_code is _WAIT
        and _RELEASED in frame.f_locals
    )


def _again(state: _State) -> None:
    time.sleep(_RETRY_S)
    # `leave` may have run the handler meanwhile.
    with contextlib.suppress(IndexError):
        # A signal, which wakes the thread up.
        signal.pthread_kill(state.main_thread, state.pending.popleft())


def _after_in_child() -> None:
    """Give the child its handlers back, unless its thread is the main one already."""
    global _state  # noqa: PLW0603 - the parent's is that of another thread
    parent = _state
    if parent.main_thread == threading.get_ident():
        return
    _state = _State()
    if parent.depth:
        for number, handler in parent.handlers.items():
            if _signal.getsignal(number) is _handle:
                _signal.signal(number, handler)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_in_child)
