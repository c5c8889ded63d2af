"""Tensors on their way to and from a client."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from typing import Self, TypeAlias

from gradwire_protocol import checksum
from gradwire_protocol.checksum import crc32c
from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.limits import (
    DEFAULT_CHUNK_BYTES,
    MAX_INT64,
    MAX_NAME_LENGTH,
    MAX_PAYLOAD_BYTES,
    MAX_TENSOR_DIMENSIONS,
)
from gradwire_protocol.optimizers import STATES
from gradwire_protocol.v1 import matrix_pb2
from gradwire_protocol.v1 import session_service_pb2 as pb2
from gradwire_server.backends.kept_memory import KeptArray, KeptMemory
from gradwire_server.errors import JobError
from gradwire_server.scheduling.device_worker import TenantHandle
from gradwire_server.sessions.registry import check_key, is_printable
from gradwire_server.sessions.session import Session
from gradwire_server.sessions.tensors import Gradient, KeptTensor
from gradwire_server.sessions.windows import ReadWindow, Work, WriteWindow

Do: TypeAlias = Callable[[Work], Awaitable[None]]
"""Does work in the thread of the device worker."""

_PUT = (pb2.TENSOR_ROLE_WEIGHT, pb2.TENSOR_ROLE_GRADIENT)

_COPIES = (matrix_pb2.DTYPE_UNSPECIFIED, int(Dtype.FLOAT16), int(Dtype.BFLOAT16))


class IncomingTensor:
    """A tensor, or a state of one, whose elements arrive.

    Args:
        session: Its session.
        header: Its header.
        worker: The worker of the session's device.

    Raises:
        JobError: The header is invalid, or the session has no memory for the tensor.

    Use it as an async context manager: at the end, the device has no more work with it,
    and without `keep` its memory is returned.
    """

    def __init__(
        self, session: Session, header: pb2.TensorHeader, worker: TenantHandle
    ) -> None:
        self._session = session
        self._memory = session.memory
        self._header = header
        self._worker = worker
        self._window = WriteWindow(session.memory.on_device)
        dtype = _check(header)
        shape = tuple(header.shape)
        session.check_count(header.tensor, "header.tensor")
        if header.state:
            _check_state(session, header, dtype, shape)
        else:
            _check_role(session, header)
        self._array = self._memory.allocate(shape, dtype)
        self._copy: KeptArray | None = None
        self._allocated = [self._array]
        if header.compute_dtype:
            try:
                self._copy = self._memory.allocate(shape, Dtype(header.compute_dtype))
            except BaseException:
                self._memory.release(self._array)
                raise
            self._allocated.append(self._copy)
        self._received = self._array.nbytes if header.zeros else 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            await self._worker.discard(self)
        finally:
            self._memory.release(*self._allocated)
            self._allocated.clear()

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

    @property
    def is_complete(self) -> bool:
        """Whether every element has come."""
        return self._received == self._array.nbytes

    async def finish(self) -> None:
        """Do the work that is left.

        Raises:
            JobError: Elements are missing.
        """
        if not self.is_complete:
            raise JobError(
                Reason.PAYLOAD_MISSING,
                f"the tensor has {self._array.nbytes} bytes, but {self._received} came",
                field="chunk.data",
            )
        for work in self._rest(self._tensor()):
            await self._worker.submit(self, work)

    def _rest(self, tensor: KeptTensor) -> Iterator[Work]:
        on_device = self._memory.on_device
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
            _check_state(session, header, Dtype(header.dtype), self._array.shape)
        else:
            _check_role(session, header)
        self._allocated.clear()
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
    _check_checksum(request.checksum, "checksum")
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


def _check(header: pb2.TensorHeader) -> Dtype:
    try:
        dtype = Dtype(header.dtype)
    except ValueError:
        names = ", ".join(f"{each.name} ({each.value})" for each in Dtype)
        raise JobError(
            Reason.DTYPE_INVALID,
            f"header.dtype is {header.dtype}: expected one of {names}",
            field="header.dtype",
        ) from None
    shape = tuple(header.shape)
    if len(shape) > MAX_TENSOR_DIMENSIONS or min(shape, default=0) < 0:
        raise JobError(
            Reason.SHAPE_INVALID,
            f"header.shape is {shape[:16]}: expected at most {MAX_TENSOR_DIMENSIONS} "
            f"sizes of at least 0",
            field="header.shape",
        )
    # Without elements, sizes are limited alike: NumPy computes strides with them.
    if math.prod(filter(None, shape)) * dtype.itemsize > MAX_INT64:
        raise JobError(
            Reason.SHAPE_OVERFLOW,
            f"header.shape is {shape}, which has more bytes than 64 bits can count",
            field="header.shape",
        )
    if not is_printable(header.name):
        raise JobError(
            Reason.OPTION_INVALID,
            f"header.name has {len(header.name)} characters or unprintable ones: "
            f"expected at most {MAX_NAME_LENGTH} printable ASCII characters",
            field="header.name",
        )
    _check_checksum(header.checksum, "header.checksum")
    check_key(header.idempotency_key, "header.idempotency_key")
    allowed = _COPIES if dtype is Dtype.FLOAT32 and not header.state else _COPIES[:1]
    if header.compute_dtype not in allowed:
        raise JobError(
            Reason.DTYPE_INVALID,
            f"header.compute_dtype is {header.compute_dtype}: expected DTYPE_FLOAT16 "
            f"or DTYPE_BFLOAT16 with a float32 tensor, or none",
            field="header.compute_dtype",
        )
    return dtype


def _check_checksum(number: int, path: str) -> None:
    known = {matrix_pb2.CHECKSUM_UNSPECIFIED}
    if checksum.AVAILABLE:
        known.add(matrix_pb2.CHECKSUM_CRC32C)
    if number not in known:
        raise JobError(
            Reason.OPTION_UNKNOWN,
            f"{path} is {number}: this server does not offer it",
            field=path,
        )


def _check_role(session: Session, header: pb2.TensorHeader) -> None:
    if header.role not in _PUT:
        names = " or ".join(pb2.TensorRole.Name(role) for role in _PUT)
        raise JobError(
            Reason.OPTION_INVALID,
            f"header.role is {header.role}: expected {names}",
            field="header.role",
        )
    existing = session.tensors.get(header.tensor)
    if header.keep_states:
        same = existing is not None and (
            existing.role == header.role == pb2.TENSOR_ROLE_WEIGHT
            and existing.array.shape == tuple(header.shape)
            and existing.dtype is Dtype(header.dtype)
        )
        if not same:
            raise JobError(
                Reason.TENSOR_MISMATCH,
                f"header.keep_states is true, but tensor {header.tensor} is no weight "
                f"of this shape and dtype",
                field="header.keep_states",
            )
    if existing is not None and existing.role != header.role:
        raise JobError(
            Reason.TENSOR_MISMATCH,
            f"header.tensor is {header.tensor}, which is a tensor with another role: "
            f"drop it first, or choose a new number",
            field="header.tensor",
        )


def _check_state(
    session: Session, header: pb2.TensorHeader, dtype: Dtype, shape: tuple[int, ...]
) -> None:
    if header.state not in STATES:
        raise JobError(
            Reason.OPTION_INVALID,
            f"header.state is {header.state[:64]!r}: expected one of "
            f"{', '.join(STATES)}",
            field="header.state",
        )
    tensor = session.tensor(header.tensor, "header.tensor")
    if tensor.role != pb2.TENSOR_ROLE_WEIGHT:
        raise JobError(
            Reason.TENSOR_MISMATCH,
            f"header.tensor is {header.tensor}, which is no weight: only weights have "
            f"states",
            field="header.tensor",
        )
    if tensor.array.shape != shape or tensor.dtype is not dtype:
        raise JobError(
            Reason.TENSOR_MISMATCH,
            f"header.shape is {shape} and header.dtype {dtype.label}: tensor "
            f"{tensor.number} has shape {tensor.array.shape} and {tensor.dtype.label}",
            field="header.shape",
        )
