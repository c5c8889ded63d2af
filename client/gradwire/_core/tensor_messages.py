"""The messages with a tensor's elements, without I/O."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from gradwire._api.errors import ProtocolError
from gradwire._api.types import Array
from gradwire._arrays.operand import Operand
from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.limits import DEFAULT_CHUNK_BYTES
from gradwire_protocol.v1.session_service_pb2 import (
    GetTensorResponse,
    PutTensorRequest,
    TensorChunk,
    TensorHeader,
)


def put_requests(
    header: TensorHeader, elements: Operand | None
) -> Iterator[PutTensorRequest]:
    """Yield the requests that put a tensor.

    Args:
        header: Its header.
        elements: Its elements; None if they are all 0, or perhaps not needed.
    """
    yield PutTensorRequest(header=header)
    if elements is None:
        return
    size = max(1, DEFAULT_CHUNK_BYTES // elements.dtype.itemsize)
    for index, payload in elements.pieces(0, elements.rows, size):
        chunk = TensorChunk(index=index, data=bytes(payload))
        yield PutTensorRequest(chunk=chunk)


def sha256_of(elements: Operand) -> bytes:
    """Return the hash of a tensor's elements in the order in which they are sent."""
    digest = hashlib.sha256()
    size = max(1, DEFAULT_CHUNK_BYTES // elements.dtype.itemsize)
    for _, payload in elements.pieces(0, elements.rows, size):
        digest.update(payload)
    return digest.digest()


class TensorReader:
    """Receives a tensor's elements.

    Attributes:
        header: The tensor's header, once received.
        array: Its elements.
    """

    def __init__(self) -> None:
        self.header: TensorHeader | None = None
        self.array: Array = np.empty(0)
        self._bytes = np.empty(0, np.uint8)
        self._received = 0

    def take(self, response: GetTensorResponse) -> None:
        """Process a message of the server.

        Raises:
            ProtocolError: The message violates the contract.
        """
        kind = response.WhichOneof("message")
        if kind == "header" and self.header is None:
            self.header = response.header
            dtype = Dtype(response.header.dtype).numpy
            self.array = np.empty(tuple(response.header.shape), dtype)
            self._bytes = self.array.reshape(-1).view(np.uint8)
        elif kind == "chunk" and self.header is not None:
            data, at = response.chunk.data, self._received
            if response.chunk.index * self.array.itemsize != at:
                raise ProtocolError(
                    f"the server sent a tensor from element {response.chunk.index} on:"
                    f" expected element {at // self.array.itemsize}"
                )
            if at + len(data) > self._bytes.nbytes:
                raise ProtocolError("the server sent more elements than a tensor has")
            self._bytes[at : at + len(data)] = np.frombuffer(data, np.uint8)
            self._received += len(data)
        else:
            raise ProtocolError(
                f"the server sent {kind or 'an unknown message'} of a tensor:"
                f" expected {'a chunk' if self.header else 'its header'}"
            )

    def finish(self) -> Array:
        """Return the elements, once the server has ended the call with OK.

        Raises:
            ProtocolError: Elements are missing.
        """
        if self.header is None or self._received != self._bytes.nbytes:
            raise ProtocolError(
                f"the server sent {self._received} bytes of a tensor with"
                f" {self._bytes.nbytes}"
            )
        return self.array
