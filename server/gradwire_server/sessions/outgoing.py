"""Tensors on their way to a client."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TypeAlias

from gradwire_protocol.checksum import crc32c
from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.limits import DEFAULT_CHUNK_BYTES, MAX_PAYLOAD_BYTES
from gradwire_protocol.v1 import session_service_pb2 as pb2
from gradwire_server.backends.kept_memory import KeptMemory
from gradwire_server.errors import JobError
from gradwire_server.sessions.tensor_headers import check_checksum
from gradwire_server.sessions.tensors import KeptTensor
from gradwire_server.sessions.windows import ReadWindow, Work

Do: TypeAlias = Callable[[Work], Awaitable[None]]
"""Does work in the thread of the device worker."""


class OutgoingTensor:
    """A tensor, or a state of one, whose elements leave.

    Args:
        tensor: The tensor.
        request: What is asked for.
        memory: The memory of the tensor.

    Raises:
        JobError: The request is invalid, or the tensor has no such state.

    Attributes:
        header: Its header.
        size: Number of its elements.
        checksum: Whether payloads have a checksum.
    """

    def __init__(
        self, tensor: KeptTensor, request: pb2.GetTensorRequest, memory: KeptMemory
    ) -> None:
        if request.state and request.state not in tensor.states:
            has = ", ".join(tensor.states) or "none"
            raise JobError(
                Reason.TENSOR_UNKNOWN,
                f"state is {request.state[:64]!r}: tensor {tensor.number} has {has}",
                field="state",
            )
        check_checksum(request.checksum, "checksum")
        if not 0 <= request.max_chunk_bytes <= MAX_PAYLOAD_BYTES:
            raise JobError(
                Reason.OPTION_INVALID,
                f"max_chunk_bytes is {request.max_chunk_bytes}: expected 0 to "
                f"{MAX_PAYLOAD_BYTES}",
                field="max_chunk_bytes",
            )
        self._array = tensor.states[request.state] if request.state else tensor.array
        self._empty = tensor.gradient is not None and tensor.gradient.empty
        self.header = tensor.header(request.state)
        self.header.checksum = request.checksum
        self.size = self._array.size
        self.checksum = bool(request.checksum)
        self._piece_bytes = request.max_chunk_bytes or DEFAULT_CHUNK_BYTES
        self._window = ReadWindow(memory)

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self._array.dtype.itemsize

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Yield the first byte of each piece, and the one behind its last."""
        size_bytes, itemsize = self._array.nbytes, self.itemsize
        size = max(self._piece_bytes // itemsize, 1) * itemsize
        for first in range(0, size_bytes, size):
            yield first, min(first + size, size_bytes)

    def load(self, first: int, end: int) -> Work | None:
        """Return work for the device worker before `payload`, if there is any."""
        return None if self._empty else self._window.load(self._array, first, end)

    def payload(self, first: int, end: int) -> memoryview:
        """Return a piece, valid until the next `load`."""
        if self._empty:
            return memoryview(bytes(end - first))
        return self._window.seen(self._array, first, end)

    async def chunks(self, do: Do) -> AsyncIterator[pb2.TensorChunk]:
        """Yield the elements for messages.

        Args:
            do: Does work on the session's device.
        """
        for first, end in self.pieces():
            if (work := self.load(first, end)) is not None:
                await do(work)
            payload = self.payload(first, end)
            chunk = pb2.TensorChunk(index=first // self.itemsize, data=bytes(payload))
            if self.checksum:
                chunk.crc32c = crc32c(payload)
            yield chunk
