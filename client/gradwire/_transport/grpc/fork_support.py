"""Forks during calls.

A child process has only the thread that forked. gRPC survives a fork only if its fork
support was enabled at import, and if no other thread is inside gRPC. Therefore:

- gRPC is imported with fork support (`gradwire_protocol.grpc_import`).
- A fork first blocks new calls, and waits a moment for running calls to end. Most calls
  are short. Then it stops all threads before they enter gRPC (`calling`, `waiting`),
  and continues once no thread is inside.
- If that is impossible (on an event loop, gRPC has a thread that is always active), the
  child raises an exception on use, instead of hanging.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined]

from gradwire._api.errors import ClientStateError
from gradwire._core import interrupts
from gradwire_protocol.grpc_import import FORK_SUPPORT

PATIENCE_S = 5.0
"""Longest time that a fork waits for threads to leave gRPC, in seconds. They are inside
only for moments."""

DRAIN_S = 0.5
"""Longest time that a fork waits for running calls to end, in seconds."""

_LOOK_S = 0.01
"""Interval of the check whether threads are idle, in seconds."""

_FIRST_VERSION = (1, 82)
"""The first grpcio whose children go on after a fork (grpc/grpc#41784)."""

_WAIT = threading.Condition.wait.__code__


class _State:
    """The state of this process's calls."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.forking: set[int] = set()
        self.paused = False
        self.calls: dict[object, int] = {}
        self.inside: dict[int, int] = {}
        self.waiting: set[int] = set()
        self.used = False
        self.aio_used = False
        self.aio_calls = 0


_state = _State()
_before_fork: list[Callable[[], None]] = []
_after_in_parent: list[Callable[[], None]] = []
_after_in_child: list[Callable[[], None]] = []

lost: str | None = None
"""Why this process, a child, cannot make calls; None: it can."""

aio_lost: str | None = None
"""Why this process, a child, cannot make calls from an event loop; None: it can."""


def require_calls() -> None:
    """Check that this process can make calls.

    Raises:
        ClientStateError: The process was forked during a call.
    """
    if lost is not None:
        raise ClientStateError(lost)


def at_fork(
    before: Callable[[], None],
    after_in_parent: Callable[[], None],
    after_in_child: Callable[[], None],
) -> None:
    """Register functions to call around every fork, while no thread is inside gRPC."""
    _before_fork.append(before)
    _after_in_parent.append(after_in_parent)
    _after_in_child.append(after_in_child)


@contextlib.contextmanager
def calling() -> Iterator[None]:
    """Mark this thread as inside gRPC, so that forks and signals wait for it."""
    state, thread = _state, threading.get_ident()
    before = interrupts.enter(waits=False)
    try:
        with state.changed:
            # A thread that is already inside, or that forks (and collects garbage
            # meanwhile), would wait for itself.
            if thread not in state.inside and thread not in state.forking:
                state.changed.wait_for(lambda: not state.forking)
            state.inside[thread] = state.inside.get(thread, 0) + 1
            state.used = True
        try:
            yield
        finally:
            with state.changed:
                state.inside[thread] -= 1
                if not state.inside[thread]:
                    del state.inside[thread]
                state.changed.notify_all()
    finally:
        interrupts.leave(before)


class RunningCall:
    """A running call, from its creation until `end`."""

    def __init__(self) -> None:
        self._state = _state
        with _state.changed:
            _state.calls[id(self)] = threading.get_ident()

    def end(self) -> None:
        """Record the end of the call. Further calls do nothing."""
        state = self._state
        if state is _state:
            with interrupts.held(), state.changed:
                state.calls.pop(id(self), None)
                state.changed.notify_all()

    @property
    def inherited(self) -> bool:
        """Whether the call belongs to the parent process."""
        return self._state is not _state


def _why_no_child_survives() -> str | None:
    """Why gRPC, once used, cannot be used in a child; None: it can."""
    spawn = "or start the process with the method spawn"
    version = tuple(map(int, grpc.__version__.split(".")[:2]))
    if version < _FIRST_VERSION:
        return (
            f"this process was forked from one that used grpcio {grpc.__version__},"
            f" which does not survive forks: install grpcio 1.82 or newer, {spawn}"
        )
    # Read from the environment once, when gRPC was imported.
    enabled = getattr(cygrpc, "is_fork_support_enabled", None)
    if enabled is not None and not enabled():
        return (
            "this process was forked from one that used gRPC without its support of"
            f" forks: set {FORK_SUPPORT}=1 before grpc is imported, import gradwire"
            f" before grpc, {spawn}"
        )
    return None


def _why_this_child_does_not() -> str | None:
    """Why gRPC cannot be used in this child; None: it can."""
    # gRPC stops its own threads before a fork, and waits 5 s for them. If one does not
    # stop, on a busy machine or in a callback that blocks, it resets nothing in the
    # child: there every call would wait for ever for the end of the fork.
    if getattr(cygrpc, "_fork_handler_failed", False):
        return (
            "this process was forked while a thread of gRPC did not stop for it, so"
            " gRPC cannot be used in it: fork while no call runs, or start the process"
            " with the method spawn"
        )
    return None


def _pause() -> None:
    state = _state
    if state.paused:
        with state.changed:
            state.changed.wait_for(lambda: not state.paused)


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """Mark this thread as waiting for gRPC: forks and signals wait until it is idle."""
    before = interrupts.enter(waits=True)
    try:
        _pause()
        waiting, thread = _state.waiting, threading.get_ident()
        waiting.add(thread)
        try:
            yield
        finally:
            waiting.discard(thread)
    finally:
        interrupts.leave(before)


@contextlib.contextmanager
def aio_calling() -> Iterator[None]:
    """Count a call on an event loop."""
    state = _state
    state.aio_calls += 1
    try:
        yield
    finally:
        state.aio_calls -= 1


def aio_began() -> None:
    """Record that gRPC is used on an event loop."""
    _state.aio_used = True


def _others_inside(state: _State) -> bool:
    return any(thread != threading.get_ident() for thread in state.inside)


def _all_rest() -> bool:
    """Return whether all threads that wait for gRPC are idle in Python code."""
    frames = sys._current_frames()
    return all(
        frames[thread].f_code is _WAIT
        for thread in _state.waiting - {threading.get_ident()}
        if thread in frames
    )


def _before() -> None:
    with _state.changed:
        me = threading.get_ident()
        _state.forking.add(me)
        _state.changed.wait_for(
            lambda: all(thread == me for thread in _state.calls.values()), DRAIN_S
        )
        _state.paused = True
        _state.changed.wait_for(lambda: not _others_inside(_state), PATIENCE_S)
    deadline = time.monotonic() + PATIENCE_S
    # A thread that wakes up between two checks is not idle.
    while _state.waiting - {threading.get_ident()} and time.monotonic() < deadline:
        rested = _all_rest()
        time.sleep(_LOOK_S)
        if rested and _all_rest():
            break
    for callback in _before_fork:
        callback()


def _after_in_this_process() -> None:
    for callback in _after_in_parent:
        callback()
    with _state.changed:
        _state.forking.discard(threading.get_ident())
        _state.paused = bool(_state.forking)
        _state.changed.notify_all()


def _after_in_this_child() -> None:
    global _state, lost, aio_lost  # noqa: PLW0603 - what a process knows about itself
    parent, _state = _state, _State()
    if lost is None and (_others_inside(parent) or parent.aio_calls):
        lost = (
            "this process was forked while a gradwire call ran in another thread or"
            " on an event loop, so gRPC cannot be used in it: fork while no call runs,"
            " or start the process with the method spawn"
        )
    if lost is None and (parent.used or parent.aio_used):
        lost = _why_no_child_survives() or _why_this_child_does_not()
    if aio_lost is None and parent.aio_used:
        aio_lost = (
            "this process was forked from one that used an AsyncClient, so gRPC"
            " cannot use an event loop in it: use a Client, or start the process with"
            " the method spawn"
        )
    for callback in _after_in_child:
        callback()


def register() -> None:
    """Register the handlers of forks, once gRPC has registered its own.

    The last handlers run first before a fork. gRPC registers its own with the first
    channel, and expects the program's threads to be out of gRPC when they run: if it
    stopped its threads while calls begin and end, one might never stop.
    """
    global _registered  # noqa: PLW0603 - handlers cannot be removed
    with _registering:
        if _registered or not hasattr(os, "register_at_fork"):
            return
        _registered = True
        os.register_at_fork(
            before=_before,
            after_in_parent=_after_in_this_process,
            after_in_child=_after_in_this_child,
        )


_registering = threading.Lock()
_registered = False
