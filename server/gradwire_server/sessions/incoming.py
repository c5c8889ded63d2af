"""Tensors on their way from a client."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from functools import partial
from typing import Self

from gradwire_protocol.checksum import crc32c
from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.limits import MAX_PAYLOAD_BYTES
from gradwire_protocol.v1 import matrix_pb2
from gradwire_protocol.v1 import session_service_pb2 as pb2
from gradwire_server.backends.kept_memory import KeptArray
from gradwire_server.errors import JobError
from gradwire_server.scheduling.device_worker import TenantHandle
from gradwire_server.sessions.session import Session
from gradwire_server.sessions.tensor_headers import (
    check_header,
    check_role,
    check_state,
    contents_of,
)
from gradwire_server.sessions.tensors import Contents, Gradient, KeptTensor
from gradwire_server.sessions.windows import Work, WriteWindow


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
        """Store the next elements, from a message.

        Raises:
            JobError: They are not the next ones.
        """
        data = chunk.data
        crc = chunk.crc32c if chunk.HasField("crc32c") else None
        work = self.make_room(chunk.index, len(data), crc, "chunk", "data")
        if crc is not None and crc32c(memoryview(data)) != crc:
            raise JobError(
                Reason.CHECKSUM_MISMATCH,
                f"chunk.crc32c is {crc:#010x}, but the payload that came has another "
                f"checksum",
                field="chunk.crc32c",
            )
        if work is not None:
            await self._worker.submit(self, work)
        self.room(len(data))[:] = data
        self.commit(len(data))
        if self._contents is not None:
            # Milliseconds for a chunk, in which others are served.
            await asyncio.to_thread(self.digest, memoryview(data))

    # Storing elements step by step, in any thread.

    def make_room(
        self, index: int, length: int, crc: int | None, part: str, payload: str
    ) -> Work | None:
        """Check the next elements by what is said of them.

        Args:
            index: Index of the first one.
            length: Their bytes.
            crc: Their checksum, if one is given.
            part: What brings them, as a path of errors.
            payload: Its field with the bytes, or with their number.

        Returns:
            Work for the device worker that has to be done before `room`, if any.

        Raises:
            JobError: They are not the next ones.
        """
        itemsize = self._array.dtype.itemsize
        if length % itemsize or length > MAX_PAYLOAD_BYTES:
            raise JobError(
                Reason.PAYLOAD_INVALID,
                f"{part} brings {length} bytes: expected a multiple of {itemsize}, at "
                f"most {MAX_PAYLOAD_BYTES}",
                field=f"{part}.{payload}",
            )
        if index * itemsize != self._received:
            raise JobError(
                Reason.INDEX_INVALID,
                f"{part}.index is {index}: the next element is "
                f"{self._received // itemsize}",
                field=f"{part}.index",
            )
        checked = self._header.checksum == matrix_pb2.CHECKSUM_CRC32C
        if (crc is not None) != checked:
            which = "absent, but header.checksum asks for it"
            if not checked:
                which = "present, but header.checksum asks for none"
            raise JobError(
                Reason.PAYLOAD_INVALID,
                f"{part}.crc32c is {which}",
                field=f"{part}.crc32c",
            )
        end = self._received + length
        if end > self._array.nbytes:
            raise JobError(
                Reason.PAYLOAD_EXCESS,
                f"{part} brings the tensor to {end} bytes: it has {self._array.nbytes}",
                field=f"{part}.{payload}",
            )
        return self._window.make_room(self._array, self._received, end)

    def room(self, length: int) -> memoryview:
        """Return the memory for the next elements."""
        begin = self._received
        return self._window.room(self._array, begin, begin + length)

    def commit(self, length: int) -> None:
        """Count the next elements as received."""
        self._received += length

    def digest(self, payload: memoryview) -> None:
        """Add elements to the hash, if the tensor is found by it."""
        if self._contents is not None:
            self._hash.update(payload)

    def complete(self, elements: int) -> None:
        """Check what a client has sent when it says that this is all.

        Args:
            elements: Number of elements, as the client says.

        Raises:
            JobError: The tensor has another number, or elements are missing.
        """
        if elements != self._array.size:
            raise JobError(
                Reason.INDEX_INVALID,
                f"frame.index is {elements}, the number of elements: the tensor has "
                f"{self._array.size}",
                field="frame.index",
            )
        self._require_all("frame.length")

    @property
    def is_complete(self) -> bool:
        """Whether every element has come."""
        return self._received == self._array.nbytes

    async def finish(self) -> None:
        """Do the work that is left.

        Raises:
            JobError: Elements are missing, or have another hash.
        """
        self._require_all("chunk.data")
        if self._contents is not None and self._source is None:
            self._check_hash(self._contents)
        for work in self._rest(self._tensor()):
            await self._worker.submit(self, work)

    def _require_all(self, field: str) -> None:
        if not self.is_complete:
            raise JobError(
                Reason.PAYLOAD_MISSING,
                f"the tensor has {self._array.nbytes} bytes, but {self._received} came",
                field=field,
            )

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
