"""The X that a forward pass keeps in a session until its backward pass."""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch

from gradwire._api.errors import SessionFullError
from gradwire._client._sync.session import Session
from gradwire._client.session_base import Context
from gradwire._core.kept import Tensor

T = TypeVar("T")


class KeptX:
    """The context of a forward pass, until its backward pass or the end of its graph.

    A graph may be dropped without a backward pass. What its contexts keep in the
    session is then dropped with the next step, or when the session is full.

    Attributes:
        context: The context.
        contributed: Whether a backward pass has added to the weight's gradient.
    """

    __slots__ = ("_session", "context", "contributed")

    def __init__(self, session: Session, context: Context, *, kept: bool) -> None:
        self.context = context
        self.contributed = False
        self._session = session if kept else None

    def used(self) -> None:
        """Note that the session has dropped X after its last use."""
        self._session = None
        self.contributed = True

    def __del__(self) -> None:
        session = getattr(self, "_session", None)  # none, if Ctrl-C came meanwhile
        if session is not None:
            # No call from here: the garbage collector may run anywhere.
            _left_over_in(session).append(self.context.x)


_held: dict[int, KeptX] = {}

_new_number = itertools.count(1)


def token_of(kept: KeptX) -> torch.Tensor:
    """Return a number as a tensor, which holds what a forward pass keeps.

    The graph of autograd holds the tensor, also where `torch.compile` made the graph,
    which can hold nothing but tensors. With its memory goes what it stands for.

    Returns:
        Shape (), int64, on the CPU.
    """
    number = next(_new_number)
    memory = np.array(number)
    _held[number] = kept
    weakref.finalize(memory, _held.pop, number, None).atexit = False
    return torch.from_numpy(memory)


def held_by(token: torch.Tensor) -> KeptX | None:
    """Return what a token stands for; None if a copy of the token has outlived it."""
    return _held.get(int(token))


_left_over: weakref.WeakKeyDictionary[Session, deque[Tensor]] = (
    weakref.WeakKeyDictionary()
)


def _left_over_in(session: Session) -> deque[Tensor]:
    """Return the X in a session that no backward pass will use."""
    return _left_over.setdefault(session, deque())


def drop_left_over(session: Session) -> bool:
    """Drop the X in a session that no backward pass will use.

    Returns:
        Whether there were any.
    """
    waiting = _left_over_in(session)
    tensors = []
    while waiting:
        tensors.append(waiting.popleft())
    if tensors:
        session.drop(*tensors)
    return bool(tensors)


def with_room(session: Session, call: Callable[[], T]) -> T:
    """Return what a call returns, once more after dropping what nothing will use."""
    try:
        return call()
    except SessionFullError:
        if not drop_left_over(session):
            raise
    return call()
