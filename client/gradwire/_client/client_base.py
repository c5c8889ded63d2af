"""What both clients have in common, seen from outside."""

from __future__ import annotations

import threading
from typing import Any, Generic, NoReturn, TypeVar

from gradwire._api.types import Receipt
from gradwire._client.engine_base import EngineBase

EngineT = TypeVar("EngineT", bound=EngineBase)


class ClientBase(Generic[EngineT]):
    """A client that does no I/O.

    Args:
        engine: What does it.
    """

    def __init__(self, engine: EngineT) -> None:
        self._engine = engine
        self._greeted = False
        self._local = threading.local()

    @property
    def address(self) -> str:
        """The server's address, as it was given; of several, all of them."""
        return self._engine.address

    @property
    def last_receipt(self) -> Receipt | None:
        """What became of the job that this thread was last done with here.

        None before the first. Where several coroutines share a client, the
        receipt on the result itself is the surer one.
        """
        return getattr(self._local, "receipt", None)

    def __repr__(self) -> str:
        state = " closed" if self._engine.closed else ""
        return f"<gradwire.{type(self).__name__} of {self.address}{state}>"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        kind = type(self).__name__
        raise TypeError(
            f"a gradwire.{kind} holds a connection and cannot be pickled or copied:"
            f" hand over its address, {self.address!r}, and make a client of it there"
        )

    def _remember(self, receipt: Receipt) -> Receipt:
        self._local.receipt = receipt
        return receipt
