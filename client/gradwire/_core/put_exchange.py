"""The client's side of PutTensor, without I/O."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

from gradwire._api.errors import ProtocolError
from gradwire._arrays.operand import Operand
from gradwire._core.frame import Frame, complete_frame, elements_frame
from gradwire._core.tensor_exchange import TensorExchange, TensorShare, parse
from gradwire_protocol.limits import DEFAULT_CHUNK_BYTES, PUT_TENSOR
from gradwire_protocol.matrices import Matrix
from gradwire_protocol.v1.session_service_pb2 import (
    PutTensorRequest,
    PutTensorResponse,
    TensorChunk,
    TensorHeader,
)


class PutExchange(TensorExchange):
    """Puts a tensor.

    Args:
        header: Its header.
        elements: Its elements; None if they are all 0, or perhaps not needed.
        direct: Whether to offer a direct connection for them.
    """

    method = PUT_TENSOR

    def __init__(
        self, header: TensorHeader, elements: Operand | None, *, direct: bool = False
    ) -> None:
        super().__init__(direct=direct and elements is not None)
        self._header = header
        self._elements = elements
        self._kept = False

    def opening(self) -> bytes:
        """Return the message with the header."""
        request = PutTensorRequest(header=self._header, direct=self._direct)
        return request.SerializeToString()

    def requests(self) -> Iterator[bytes]:
        """Yield all messages, if no direct connection is offered."""
        yield self.opening()
        yield from self.messages()

    def receive(self, message: bytes) -> None:
        """Process a message of the server.

        Raises:
            ProtocolError: The message violates the contract.
        """
        response = parse(PutTensorResponse, message)
        if self._kept or (response.accepted and self._settled):
            raise ProtocolError("the server answered a put once more")
        if response.accepted:
            has_access = response.HasField("direct")
            self._answered(response.direct if has_access else None)
        else:
            self._kept = True
            self._settled = True

    def frames(
        self, connection: int, operands: Mapping[Matrix, Operand]
    ) -> Iterator[Frame]:
        """Yield the frames with the elements."""
        del connection, operands
        for index, payload in self._pieces():
            yield elements_frame(0, index, payload)
        count = (
            0
            if self._elements is None
            else self._elements.rows * self._elements.columns
        )
        yield complete_frame(count)

    def share(self, connection: int) -> TensorShare:
        """Return what takes no frames."""
        del connection
        return TensorShare()

    def finish(self) -> None:
        """Check that the tensor was kept, once the server has ended the call with OK.

        Raises:
            ProtocolError: The server did not say so.
        """
        if not self._kept:
            raise ProtocolError("the server ended a put without an answer")

    def _chunks(self) -> Iterator[bytes]:
        for index, payload in () if self._kept else self._pieces():
            chunk = TensorChunk(index=index, data=bytes(payload))
            yield PutTensorRequest(chunk=chunk).SerializeToString()

    def _pieces(self) -> Iterator[tuple[int, memoryview]]:
        return iter(()) if self._elements is None else _pieces(self._elements)


def sha256_of(elements: Operand) -> bytes:
    """Return the hash of a tensor's elements in the order in which they are sent."""
    digest = hashlib.sha256()
    for _, payload in _pieces(elements):
        digest.update(payload)
    return digest.digest()


def _pieces(elements: Operand) -> Iterator[tuple[int, memoryview]]:
    size = max(1, DEFAULT_CHUNK_BYTES // elements.dtype.itemsize)
    return elements.pieces(0, elements.rows, size)
