"""The public attributes that both clients have in common."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any, Generic, NoReturn, Protocol, TypeVar

from gradwire._api.types import Receipt
from gradwire._client.engine_base import EngineBase

EngineT = TypeVar("EngineT", bound=EngineBase)
LeaseT = TypeVar("LeaseT", bound="SessionLease")

_CLOSE_S = 5.0
"""Seconds for closing all sessions of a client: a server that does not answer must not
hold up the end of a program for longer."""


class SessionLease(Protocol):
    """What closes an open session."""

    @property
    def is_open(self) -> bool:
        """Whether the session was not closed, and this process has opened it."""


class ClientBase(Generic[EngineT, LeaseT]):
    """A client that does no I/O.

    Args:
        engine: Makes the calls.
    """

    def __init__(self, engine: EngineT) -> None:
        self._engine = engine
        self._greeted = False
        self._local = threading.local()
        self._leases: weakref.WeakSet[LeaseT] = weakref.WeakSet()
        """Those of its sessions, dropped ones too."""

    @property
    def address(self) -> str:
        """The server's address as given, or the addresses of all servers."""
        return self._engine.address

    @property
    def last_receipt(self) -> Receipt | None:
        """The receipt of the last job that this thread finished with this client.

        None before the first job. If several coroutines share a client, use the
        receipt of the result instead.
        """
        return getattr(self._local, "receipt", None)

    def __repr__(self) -> str:
        state = " closed" if self._engine.closed else ""
        return f"<gradwire.{type(self).__name__} of {self.address}{state}>"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        kind = type(self).__name__
        raise TypeError(
            f"a gradwire.{kind} holds a connection and cannot be pickled or copied:"
            f" pass its address, {self.address!r}, and create a client there"
        )

    def _leases_to_close(self) -> Iterator[tuple[LeaseT, float]]:
        """Yield the leases of open sessions, each with seconds for closing it."""
        deadline = time.monotonic() + _CLOSE_S
        for lease in list(self._leases):
            if lease.is_open:
                yield lease, max(deadline - time.monotonic(), 0.0)

    def _remember(self, receipt: Receipt) -> Receipt:
        self._local.receipt = receipt
        return receipt
