"""The public attributes that both clients have in common."""

from __future__ import annotations

import threading
from typing import Any, Generic, NoReturn, TypeVar

from gradwire._api.types import Receipt
from gradwire._client.engine_base import EngineBase

EngineT = TypeVar("EngineT", bound=EngineBase)


class ClientBase(Generic[EngineT]):
    """A client that does no I/O.

    Args:
        engine: Makes the calls.
    """

    def __init__(self, engine: EngineT) -> None:
        self._engine = engine
        self._greeted = False
        self._local = threading.local()

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

    def _remember(self, receipt: Receipt) -> Receipt:
        self._local.receipt = receipt
        return receipt
