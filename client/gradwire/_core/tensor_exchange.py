"""What the client's sides of PutTensor and GetTensor have in common, without I/O.

Both take the place of a job's exchange: a call sends `opening()` and `messages()`, and
`receive` takes what comes. On a direct connection, they stand for a `DirectExchange`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import ClassVar, TypeVar

from google.protobuf.message import DecodeError, Message

from gradwire._api.errors import ProtocolError
from gradwire._arrays.operand import Operand
from gradwire._core.frame import Frame
from gradwire._core.sender import WAIT
from gradwire_protocol.data_plane.frames import FrameHeader
from gradwire_protocol.matrices import Matrix
from gradwire_protocol.v1.job_pb2 import DirectAccess, DirectOffer

M = TypeVar("M", bound=Message)


class TensorExchange(ABC):
    """The messages of one call.

    Args:
        direct: Whether to offer a direct connection.

    Attributes:
        method: The called method.
        offered: The direct connection that the server has offered, until `use_direct`
            or `use_messages` is called.
        all_sent: Whether the server has the connection, and all elements that it
            expects there were sent.
    """

    method: ClassVar[str]

    def __init__(self, *, direct: bool) -> None:
        self.offered: DirectAccess | None = None
        self._direct = DirectOffer(connections=1) if direct else None
        self._settled = not direct
        """Whether it is known where the elements are."""
        self._on_direct = False
        self.all_sent = False

    @abstractmethod
    def opening(self) -> bytes:
        """Return the first message."""

    def messages(self) -> Iterator[bytes]:
        """Yield the other messages.

        At an empty message (`WAIT`), wait until another message was received.
        """
        while not self._settled:
            yield WAIT
        if not self._on_direct:
            yield from self._chunks()
        while self._on_direct and not self.all_sent:
            yield WAIT

    @abstractmethod
    def receive(self, message: bytes) -> None:
        """Process a message of the server.

        Raises:
            ProtocolError: The message violates the contract.
        """

    def use_messages(self) -> None:
        """Send or receive the elements in messages of the call."""
        self.offered = None
        self._settled = True

    def use_direct(self) -> None:
        """Send or receive the elements on the direct connection in `offered`."""
        self.offered = None
        self._on_direct = True
        self._settled = True

    @abstractmethod
    def frames(
        self, connection: int, operands: Mapping[Matrix, Operand]
    ) -> Iterator[Frame]:
        """Yield the frames to send."""

    @abstractmethod
    def share(self, connection: int) -> TensorShare:
        """Return what takes the frames that come."""

    def _chunks(self) -> Iterator[bytes]:
        """Yield the messages with elements."""
        return iter(())

    def _answered(self, access: DirectAccess | None) -> None:
        """Use the server's answer to the offer."""
        if self._settled:
            if access is not None:
                raise ProtocolError(
                    "the server offered a direct connection, contrary to the request"
                )
        elif access is None:
            self.use_messages()
        else:
            self.offered = access


class TensorShare:
    """No elements: the frames that come for a tensor that is put.

    Attributes:
        complete: Whether the last frame has come.
    """

    complete = True

    def room(self, header: FrameHeader) -> memoryview:
        """Check a frame's header, and return memory for its payload.

        Raises:
            ProtocolError: The frame is not the next one.
        """
        raise ProtocolError(f"the server sent a frame of kind {header.kind}")

    def take(self, header: FrameHeader, payload: memoryview) -> None:
        """Take a frame whose payload was received into `room`.

        Raises:
            ProtocolError: The frame violates the contract.
        """


def parse(kind: type[M], message: bytes) -> M:
    """Decode a message of the server.

    Raises:
        ProtocolError: The bytes are none.
    """
    try:
        return kind.FromString(message)
    except DecodeError as error:
        raise ProtocolError(f"the server sent an invalid message: {error}") from error
