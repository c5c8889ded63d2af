"""The client's side of GetTensor, without I/O."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from gradwire._api.errors import ProtocolError
from gradwire._api.types import Array
from gradwire._arrays.buffer_pool import ResultPool
from gradwire._arrays.operand import Operand
from gradwire._core.frame import NOTHING, Frame, check_length
from gradwire._core.tensor_exchange import TensorExchange, TensorShare, parse
from gradwire_protocol.data_plane.frames import FrameHeader, Kind
from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.limits import GET_TENSOR
from gradwire_protocol.matrices import Matrix
from gradwire_protocol.v1.session_service_pb2 import (
    GetTensorRequest,
    GetTensorResponse,
    TensorHeader,
)


class GetExchange(TensorExchange, TensorShare):
    """Gets a tensor.

    Args:
        request: The request.
        memory: Creates the array.
        direct: Whether to offer a direct connection for the elements.
    """

    method = GET_TENSOR

    def __init__(
        self, request: GetTensorRequest, memory: ResultPool, *, direct: bool = False
    ) -> None:
        super().__init__(direct=direct)
        self._request = request
        self._memory = memory
        self._header: TensorHeader | None = None
        self._array: Array = np.empty(0)
        self._bytes = memoryview(b"")
        self._received = 0
        self.complete = False

    def opening(self) -> bytes:
        """Return the request."""
        request = GetTensorRequest(direct=self._direct)
        request.MergeFrom(self._request)
        return request.SerializeToString()

    def receive(self, message: bytes) -> None:
        """Process a message of the server.

        Raises:
            ProtocolError: The message violates the contract.
        """
        response = parse(GetTensorResponse, message)
        kind = response.WhichOneof("message")
        if kind == "header" and self._header is None:
            self._header = header = response.header
            dtype = Dtype(header.dtype).numpy
            self._array = self._memory.empty(tuple(header.shape), dtype)
            self._bytes = self._array.reshape(-1).view(np.uint8).data
            has_access = response.HasField("direct")
            self._answered(response.direct if has_access else None)
        elif kind == "chunk" and self._header is not None and not self._on_direct:
            data = response.chunk.data
            self._next(response.chunk.index, len(data))[:] = data
            self._received += len(data)
        else:
            raise ProtocolError(
                f"the server sent {kind or 'an unknown message'} of a tensor:"
                f" expected {'a chunk' if self._header else 'its header'}"
            )

    def frames(
        self, connection: int, operands: Mapping[Matrix, Operand]
    ) -> Iterator[Frame]:
        """Yield no frames."""
        del connection, operands
        return iter(())

    def share(self, connection: int) -> TensorShare:
        """Return what takes the elements."""
        del connection
        return self

    def room(self, header: FrameHeader) -> memoryview:
        """Check a frame's header, and return memory for its payload.

        Raises:
            ProtocolError: The frame is not the next one.
        """
        if header.kind == Kind.COMPLETE:
            return NOTHING
        if header.kind != Kind.ELEMENTS or header.matrix or header.crc32c is not None:
            raise ProtocolError(f"the server sent {header} of a tensor")
        check_length(header)
        return self._next(header.position, header.length)

    def take(self, header: FrameHeader, payload: memoryview) -> None:
        """Take a frame whose payload was received into `room`.

        Raises:
            ProtocolError: The tensor has another number of elements.
        """
        del payload
        self._received += header.length
        if header.kind == Kind.COMPLETE:
            if header.position != self._array.size:
                raise ProtocolError(
                    f"the server completed a tensor of {header.position} elements:"
                    f" expected {self._array.size}"
                )
            self.complete = True

    def finish(self) -> Array:
        """Return the elements, once the server has ended the call with OK.

        Raises:
            ProtocolError: Elements are missing.
        """
        if self._header is None or self._received != len(self._bytes):
            raise ProtocolError(
                f"the server sent {self._received} bytes of a tensor with"
                f" {len(self._bytes)}"
            )
        return self._array

    def _next(self, index: int, length: int) -> memoryview:
        """Return memory for the next elements."""
        at = self._received
        if index * self._array.itemsize != at:
            raise ProtocolError(
                f"the server sent a tensor from element {index} on: expected element"
                f" {at // self._array.itemsize}"
            )
        if at + length > len(self._bytes):
            raise ProtocolError("the server sent more elements than a tensor has")
        return self._bytes[at : at + length]
