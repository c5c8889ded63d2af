"""Tensors on their way to and from a client."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from typing import Self, TypeAlias

from gradwire_protocol.checksum import crc32c
from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.limits import (
    DEFAULT_CHUNK_BYTES,
    MAX_PAYLOAD_BYTES,
)
from gradwire_protocol.v1 import matrix_pb2
from gradwire_protocol.v1 import session_service_pb2 as pb2
from gradwire_server.backends.kept_memory import KeptArray, KeptMemory
from gradwire_server.errors import JobError
from gradwire_server.scheduling.device_worker import TenantHandle
from gradwire_server.sessions.session import Session
from gradwire_server.sessions.tensor_headers import (
    check_checksum,
    check_header,
    check_role,
    check_state,
    contents_of,
)
from gradwire_server.sessions.tensors import Contents, Gradient, KeptTensor
from gradwire_server.sessions.windows import ReadWindow, Work, WriteWindow

Do: TypeAlias = Callable[[Work], Awaitable[None]]
"""Does work in the thread of the device worker."""


class IncomingTensor:
    """A tensor, or a state of one, whose elements arrive.

    Args:
        session: Its session.
        header: Its header.
        worker: The worker of the session's device.
        source: A frozen tensor with the same contents, whose memory is kept for this
            one's whole life; no elements arrive then.

    Raises:
        JobError: The header is invalid, or the session has no memory for the tensor.

    Use it as an async context manager: at the end, the device has no more work with it,
    and without `keep` its memory is returned.
    """

    def __init__(
        self,
        session: Session,
        header: pb2.TensorHeader,
        worker: TenantHandle,
        source: KeptTensor | None = None,
    ) -> None:
        self._session = session
        self._memory = session.memory
        self._header = header
        self._worker = worker
        self._window = WriteWindow(session.memory.on_device)
        dtype = check_header(header)
        shape = tuple(header.shape)
        session.check_count(header.tensor, "header.tensor")
        if header.state:
            check_state(session, header, dtype, shape)
        else:
            check_role(session, header)
        self._contents = contents_of(session, header)
        self._hash = hashlib.sha256()
        self._source = source
        self._copy: KeptArray | None = None
        if source is not None and self._memory.on_device.in_host_memory:
            self._memory.share(*source.arrays)
            self._array, self._copy = source.array, source.copy
            self._allocated = source.arrays
            self._received = self._array.nbytes
            return
        self._array = self._memory.allocate(shape, dtype)
        self._allocated = [self._array]
        if header.compute_dtype:
            try:
                self._copy = self._memory.allocate(shape, Dtype(header.compute_dtype))
            except BaseException:
                self._memory.release(self._array)
                raise
            self._allocated.append(self._copy)
        come = header.zeros or source is not None
        self._received = self._array.nbytes if come else 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            await self._worker.discard(self)
        finally:
            self._memory.release(*self._allocated)
            self._allocated = []

    async def take(self, chunk: pb2.TensorChunk) -> None:
        """Store the next elements.

        Raises:
            JobError: They are not the next ones.
        """
        data, itemsize = chunk.data, self._array.dtype.itemsize
        if len(data) % itemsize or len(data) > MAX_PAYLOAD_BYTES:
            raise JobError(
                Reason.PAYLOAD_INVALID,
                f"chunk.data has {len(data)} bytes: expected a multiple of "
                f"{itemsize}, at most {MAX_PAYLOAD_BYTES}",
                field="chunk.data",
            )
        if chunk.index * itemsize != self._received:
            raise JobError(
                Reason.INDEX_INVALID,
                f"chunk.index is {chunk.index}: the next element is "
                f"{self._received // itemsize}",
                field="chunk.index",
            )
        checked = self._header.checksum == matrix_pb2.CHECKSUM_CRC32C
        if chunk.HasField("crc32c") != checked:
            which = "absent, but header.checksum asks for it"
            if not checked:
                which = "present, but header.checksum asks for none"
            raise JobError(
                Reason.PAYLOAD_INVALID,
                f"chunk.crc32c is {which}",
                field="chunk.crc32c",
            )
        if checked and crc32c(memoryview(data)) != chunk.crc32c:
            raise JobError(
                Reason.CHECKSUM_MISMATCH,
                f"chunk.crc32c is {chunk.crc32c:#010x}, but the payload that came has "
                f"another checksum",
                field="chunk.crc32c",
            )
        end = self._received + len(data)
        if end > self._array.nbytes:
            raise JobError(
                Reason.PAYLOAD_EXCESS,
                f"chunk.data brings the tensor to {end} bytes: it has "
                f"{self._array.nbytes}",
                field="chunk.data",
            )
        begin, self._received = self._received, end
        work = self._window.make_room(self._array, begin, end)
        if work is not None:
            await self._worker.submit(self, work)
        self._window.room(self._array, begin, end)[:] = data
        if self._contents is not None:
            # Milliseconds for a chunk, in which others are served.
            await asyncio.to_thread(self._hash.update, data)

    @property
    def is_complete(self) -> bool:
        """Whether every element has come."""
        return self._received == self._array.nbytes

    async def finish(self) -> None:
        """Do the work that is left.

        Raises:
            JobError: Elements are missing, or have another hash.
        """
        if not self.is_complete:
            raise JobError(
                Reason.PAYLOAD_MISSING,
                f"the tensor has {self._array.nbytes} bytes, but {self._received} came",
                field="chunk.data",
            )
        if self._contents is not None and self._source is None:
            self._check_hash(self._contents)
        for work in self._rest(self._tensor()):
            await self._worker.submit(self, work)

    def _check_hash(self, contents: Contents) -> None:
        if self._hash.digest() != contents.sha256:
            raise JobError(
                Reason.CHECKSUM_MISMATCH,
                f"header.sha256 is {contents.sha256.hex()}, but the elements that came "
                f"have another hash",
                field="header.sha256",
            )

    def _rest(self, tensor: KeptTensor) -> Iterator[Work]:
        on_device = self._memory.on_device
        if self._source is not None:
            if not on_device.in_host_memory:
                for source, own in zip(self._source.arrays, tensor.arrays, strict=True):
                    yield partial(on_device.copy, source, own)
            return
        if (rest := self._window.rest()) is not None:
            yield rest
        for part in tensor.pieces(on_device.piece_elements):
            # A gradient without contributions has no elements that anyone reads.
            if self._header.zeros and tensor.gradient is None:
                yield partial(on_device.clear, self._array, part)
            if tensor.copy is not None:
                yield partial(on_device.round, self._array, tensor.copy, part)

    def keep(self) -> None:
        """Make the tensor one of the session's, in place of an earlier one.

        Raises:
            JobError: Another call has changed the session meanwhile, so that it no
                longer has a place for the tensor.
        """
        session, header = self._session, self._header
        session.check_count(header.tensor, "header.tensor")
        if header.state:
            check_state(session, header, Dtype(header.dtype), self._array.shape)
        else:
            check_role(session, header)
        self._share_equal()
        self._allocated = []
        if header.state:
            tensor = session.tensors[header.tensor]
            earlier = tensor.states.get(header.state)
            if earlier is not None:
                self._memory.release(earlier)
            tensor.states[header.state] = self._array
            tensor.updates = header.updates
        else:
            tensor = self._tensor()
            if header.keep_states:
                replaced = session.tensors[header.tensor]
                tensor.states, replaced.states = replaced.states, {}
                tensor.updates = replaced.updates
            session.keep(tensor)
        session.puts.made(header)

    def _share_equal(self) -> None:
        """Use the memory of an equal tensor that has come meanwhile, if possible."""
        if self._contents is None or not self._memory.on_device.in_host_memory:
            return
        found = self._session.shared.find(self._contents)
        if found is not None:
            equal = found[1]
            self._memory.exchange(self._allocated, equal.arrays)
            self._array, self._copy = equal.array, equal.copy

    def _tensor(self) -> KeptTensor:
        header, gradient = self._header, None
        if header.role == pb2.TENSOR_ROLE_GRADIENT:
            gradient = Gradient(self._array, self._memory)
            gradient.empty = header.zeros
        return KeptTensor(
            number=header.tensor,
            name=header.name,
            role=header.role,
            array=self._array,
            copy=self._copy,
            gradient=gradient,
            kept_at=self._session.step,
            frozen=header.frozen,
            contents=self._contents,
        )


async def outgoing(
    tensor: KeptTensor, request: pb2.GetTensorRequest, memory: KeptMemory, do: Do
) -> AsyncIterator[pb2.GetTensorResponse]:
    """Yield a tensor's header and its elements.

    Args:
        tensor: The tensor.
        request: What is asked for.
        memory: The memory of the tensor.
        do: Does work on the session's device.

    Raises:
        JobError: The request is invalid, or the tensor has no such state.
    """
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
    array = tensor.states[request.state] if request.state else tensor.array
    empty = tensor.gradient is not None and tensor.gradient.empty
    header = tensor.header(request.state)
    header.checksum = request.checksum
    yield pb2.GetTensorResponse(header=header)
    size = request.max_chunk_bytes or DEFAULT_CHUNK_BYTES
    window, itemsize = ReadWindow(memory), array.dtype.itemsize
    size = max(size // itemsize, 1) * itemsize
    for first in range(0, array.nbytes, size):
        end = min(first + size, array.nbytes)
        if empty:
            payload = memoryview(bytes(end - first))
        else:
            work = window.load(array, first, end)
            if work is not None:
                await do(work)
            payload = window.seen(array, first, end)
        chunk = pb2.TensorChunk(index=first // itemsize, data=bytes(payload))
        if request.checksum:
            chunk.crc32c = crc32c(payload)
        yield pb2.GetTensorResponse(chunk=chunk)
