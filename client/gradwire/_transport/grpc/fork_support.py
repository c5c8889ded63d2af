"""Forks in the middle of calls.

A child has none of its parent's threads but the one that forked. gRPC comes
through that only if it was asked, at its import, to hold its threads still
across forks, and if no other thread is inside it at that moment. So:

- gRPC is imported with fork support (`gradwire_protocol.grpc_import`).
- A fork first lets no new call begin and gives those that run a moment to end;
  most are short, and a gRPC at rest is the surest to survive. Then whatever
  still runs stops before it enters gRPC (`calling`, `waiting`), and the fork
  goes on once no thread is inside.
- Where that cannot be had (on an event loop gRPC has a thread that never
  rests), the child is told so by an exception instead of hanging.
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
from gradwire_protocol.grpc_import import FORK_SUPPORT

PATIENCE_S = 5.0
"""How long a fork waits, at most, for threads to leave gRPC. They enter it for
moments only."""

DRAIN_S = 0.5
"""How long a fork waits for running calls to end."""

_LOOK_S = 0.01
"""Between two looks at whether threads rest."""

_FIRST_VERSION = (1, 82)
"""The first grpcio whose children go on after a fork (grpc/grpc#41784)."""

_WAIT = threading.Condition.wait.__code__


class _State:
    """What this process knows about its calls."""

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
"""Why this process, a child, can make no calls; None: it can."""

aio_lost: str | None = None
"""Why this process, a child, can make no calls from an event loop."""


def require_calls() -> None:
    """Check that this process can make calls.

    Raises:
        ClientStateError: It cannot: it was forked at a moment that gRPC does not
            survive.
    """
    if lost is not None:
        raise ClientStateError(lost)


def at_fork(
    before: Callable[[], None],
    after_in_parent: Callable[[], None],
    after_in_child: Callable[[], None],
) -> None:
    """Have these called around every fork, while no thread is inside gRPC."""
    _before_fork.append(before)
    _after_in_parent.append(after_in_parent)
    _after_in_child.append(after_in_child)


@contextlib.contextmanager
def calling() -> Iterator[None]:
    """While this thread is inside gRPC: forks wait."""
    state, thread = _state, threading.get_ident()
    with state.changed:
        # A thread that is inside already, or that forks (and meanwhile has
        # garbage to collect), would wait for itself.
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


class Running:
    """A call that runs, from now until its end."""

    def __init__(self) -> None:
        self._state = _state
        with _state.changed:
            _state.calls[id(self)] = threading.get_ident()

    def end(self) -> None:
        """It is over; again is no harm."""
        state = self._state
        if state is _state:
            with state.changed:
                state.calls.pop(id(self), None)
                state.changed.notify_all()

    @property
    def inherited(self) -> bool:
        """Whether it is the parent's, and not this process's to touch."""
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


def _pause() -> None:
    state = _state
    if state.paused:
        with state.changed:
            state.changed.wait_for(lambda: not state.paused)


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """While this thread waits for gRPC: forks go on once it rests there."""
    _pause()
    waiting, thread = _state.waiting, threading.get_ident()
    waiting.add(thread)
    try:
        yield
    finally:
        waiting.discard(thread)


@contextlib.contextmanager
def aio_calling() -> Iterator[None]:
    """While a call runs on an event loop."""
    state = _state
    state.aio_calls += 1
    try:
        yield
    finally:
        state.aio_calls -= 1


def aio_began() -> None:
    """gRPC runs on an event loop from now on."""
    _state.aio_used = True


def _others_inside(state: _State) -> bool:
    return any(thread != threading.get_ident() for thread in state.inside)


def _all_rest() -> bool:
    """Whether all threads that wait for gRPC wait outside of it, in Python."""
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
    # A thread that is woken between two looks is not at rest.
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
            "this process was forked while a call of gradwire ran in another thread"
            " or on an event loop, and gRPC cannot go on in it: fork when none runs,"
            " or start the process with the method spawn"
        )
    if lost is None and (parent.used or parent.aio_used):
        lost = _why_no_child_survives()
    if aio_lost is None and parent.aio_used:
        aio_lost = (
            "this process was forked from one that used an AsyncClient, and gRPC"
            " cannot use an event loop in it: use a Client, or start the process with"
            " the method spawn"
        )
    for callback in _after_in_child:
        callback()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before,
        after_in_parent=_after_in_this_process,
        after_in_child=_after_in_this_child,
    )
