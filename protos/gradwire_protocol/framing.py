"""Encoding and decoding of stream messages with at most one copy of the payload.

A message with elements is almost all payload, so building a generated message
costs too much. The sender joins a prefix and the payload's buffer once. The
receiver uses a `memoryview` of the received message. This fast path handles the
canonical form, as written by every protobuf library:

    12 <length>            field 2 of the envelope: chunk
      08 <matrix>          Chunk.matrix
      10 <index>           Chunk.index, left out when 0
      1d <4 bytes>         Chunk.crc32c, when present
      7a <length> <data>   Chunk.data, to the end of the message

All other valid protobuf encodings (other orders, repeated or split fields,
unknown fields, longer varints) go through the generated classes, which also
detect malformed messages. Both paths give the same result for every input; a
property test checks this.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from google.protobuf.message import DecodeError

from gradwire_protocol.v1.gradient_service_pb2 import (
    ComputeStreamRequest,
    ComputeStreamResponse,
)
from gradwire_protocol.v1.job_pb2 import Accepted, Checkpoint, End, Job, Queued, Receipt
from gradwire_protocol.v1.matrix_pb2 import Chunk as ChunkMessage

_TAG_CHUNK = 0x12
_TAG_MATRIX = 0x08
_TAG_INDEX = 0x10
_TAG_CRC32C = 0x1D
_TAG_DATA = 0x7A

_CRC32C = struct.Struct("<I")

_NOT_CANONICAL = (-1, 0)


class FramingError(ValueError):
    """The bytes are not a message of the stream."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A received run of elements, not yet checked against a job."""

    matrix: int
    """Number of the matrix; 0 if absent. Unknown numbers are kept."""

    index: int
    """Index of the first element within the matrix."""

    payload: memoryview | None
    """The elements' bytes; None if the payload is absent or of an unknown
    kind."""

    crc32c: int | None = None
    """The payload's checksum, if present."""


RequestMessage: TypeAlias = Job | Chunk | End
ResponseMessage: TypeAlias = Accepted | Queued | Chunk | Receipt | Checkpoint


def encode_chunk(
    matrix: int,
    index: int,
    payload: bytes | memoryview,
    crc32c: int | None = None,
) -> bytes:
    """Encode a request or response message with `payload`.

    Args:
        matrix: The matrix's number on the wire, 1 to 127.
        index: Index of the first element, at least 0.
        payload: Contiguous bytes of the elements, copied once.
        crc32c: The payload's checksum.
    """
    size = memoryview(payload).nbytes
    head = bytearray((_TAG_MATRIX, matrix))
    if index:
        head.append(_TAG_INDEX)
        _append_varint(head, index)
    if crc32c is not None:
        head.append(_TAG_CRC32C)
        head += _CRC32C.pack(crc32c)
    head.append(_TAG_DATA)
    _append_varint(head, size)
    prefix = bytearray((_TAG_CHUNK,))
    _append_varint(prefix, len(head) + size)
    return b"".join((prefix, head, payload))


def encode_job(job: Job) -> bytes:
    """Encode the first request message of a stream."""
    return ComputeStreamRequest(job=job).SerializeToString()


def encode_end(m: int) -> bytes:
    """Encode the last request message of a stream of m rows."""
    return ComputeStreamRequest(end=End(m=m)).SerializeToString()


def encode_accepted(accepted: Accepted) -> bytes:
    """Encode the response message for a started job."""
    return ComputeStreamResponse(accepted=accepted).SerializeToString()


def encode_queued(jobs_ahead: int) -> bytes:
    """Encode the response message for a waiting job."""
    return ComputeStreamResponse(
        queued=Queued(jobs_ahead=jobs_ahead)
    ).SerializeToString()


def encode_checkpoint(rows: int) -> bytes:
    """Encode the response message before dW's sum over `rows` rows."""
    checkpoint = Checkpoint(rows=rows)
    return ComputeStreamResponse(checkpoint=checkpoint).SerializeToString()


def encode_receipt(receipt: Receipt) -> bytes:
    """Encode the last response message of a successful stream."""
    return ComputeStreamResponse(receipt=receipt).SerializeToString()


def decode_request(message: bytes) -> RequestMessage:
    """Decode a client's message.

    In the canonical form, a chunk's payload is a view of `message`.

    Raises:
        FramingError: The bytes do not parse, or no member is set.
    """
    chunk = _canonical_chunk(message)
    return chunk if chunk is not None else decode_request_slow(message)


def decode_response(message: bytes) -> ResponseMessage:
    """Decode a server's message; see `decode_request`."""
    chunk = _canonical_chunk(message)
    return chunk if chunk is not None else decode_response_slow(message)


def decode_request_slow(message: bytes) -> RequestMessage:
    """`decode_request` with the generated class only: correct for any form."""
    envelope = _parse(ComputeStreamRequest, message)
    match envelope.WhichOneof("message"):
        case "job":
            return envelope.job
        case "chunk":
            return _from_class(envelope.chunk)
        case "end":
            return envelope.end
        case _:
            raise FramingError("the message holds neither job, chunk nor end")


def decode_response_slow(message: bytes) -> ResponseMessage:
    """`decode_response` with the generated class only."""
    envelope = _parse(ComputeStreamResponse, message)
    match envelope.WhichOneof("message"):
        case "accepted":
            return envelope.accepted
        case "queued":
            return envelope.queued
        case "chunk":
            return _from_class(envelope.chunk)
        case "receipt":
            return envelope.receipt
        case "checkpoint":
            return envelope.checkpoint
        case _:
            raise FramingError(
                "the message holds neither accepted, queued, chunk, receipt nor"
                " checkpoint"
            )


_Envelope = TypeVar("_Envelope", ComputeStreamRequest, ComputeStreamResponse)


def _parse(envelope: type[_Envelope], message: bytes) -> _Envelope:
    try:
        return envelope.FromString(message)
    except DecodeError:
        name = envelope.DESCRIPTOR.full_name
        raise FramingError(f"the bytes are not a {name}") from None


def _from_class(chunk: ChunkMessage) -> Chunk:
    return Chunk(
        matrix=chunk.matrix,
        index=chunk.index,
        payload=memoryview(chunk.data) if chunk.HasField("data") else None,
        crc32c=chunk.crc32c if chunk.HasField("crc32c") else None,
    )


def _canonical_chunk(message: bytes) -> Chunk | None:
    """The chunk; None unless the message has exactly the canonical form."""
    try:
        if message[0] != _TAG_CHUNK:
            return None
        length, at = _varint(message, 1)
        if at + length != len(message) or message[at] != _TAG_MATRIX:
            return None
        matrix = message[at + 1]
        if matrix >= 0x80:
            return None
        at += 2
        index = 0
        if message[at] == _TAG_INDEX:
            index, at = _varint(message, at + 1)
            if index < 0:
                return None
        crc32c = None
        if message[at] == _TAG_CRC32C:
            (crc32c,) = _CRC32C.unpack_from(message, at + 1)
            at += 5
        if message[at] != _TAG_DATA:
            return None
        length, at = _varint(message, at + 1)
        if at + length != len(message):
            return None
    except (IndexError, struct.error):
        return None
    return Chunk(matrix, index, memoryview(message)[at:], crc32c)


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """The shortest-form varint at `at`, below 2**63, and the offset after it."""
    value = shift = 0
    while shift < 63:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return (value, at) if byte or not shift else _NOT_CANONICAL
        shift += 7
    return _NOT_CANONICAL


def _append_varint(buffer: bytearray, value: int) -> None:
    while value >= 0x80:
        buffer.append(value & 0x7F | 0x80)
        value >>= 7
    buffer.append(value)
