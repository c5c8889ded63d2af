"""The bytes on direct connections: Attach, its answer, and frames.

All numbers are little-endian. The client begins each use of a socket with an Attach of
40 bytes:

    magic "GWDA", version (1 byte), direction (1), connection (2), token (32)

The server answers with 8 bytes, magic "GWDK", version, 3 zero bytes, or closes the
socket. From then on one side sends frames, with a header of 32 bytes:

    magic "GWDF", version (1), kind (1), matrix (1), flags (1), crc32c (4), zero (4),
    index (8), length (8)

Kinds are `ELEMENTS`, of one row block or of a matrix without row blocks: index is that
of the first element in the matrix, and length bytes of payload follow; `CHECKPOINT`:
index is its rows, and its sums follow; and `COMPLETE`, the last frame: index is m.
"""

from __future__ import annotations

import enum
import struct
from typing import Final, NamedTuple

VERSION: Final = 1

ATTACH_BYTES: Final = 40
ATTACHED_BYTES: Final = 8
HEADER_BYTES: Final = 32
TOKEN_BYTES: Final = 32

_ATTACH = struct.Struct("<4sBBH32s")
_ATTACHED = struct.Struct("<4sBxxx")
_HEADER = struct.Struct("<4sBBBBIIqq")

_ATTACH_MAGIC = b"GWDA"
_ATTACHED_MAGIC = b"GWDK"
_FRAME_MAGIC = b"GWDF"

_HAS_CRC: Final = 1


class DirectFramingError(ValueError):
    """The bytes are none of a direct connection; the text is a sentence."""


class Direction(enum.IntEnum):
    """Which side sends frames on a socket."""

    UP = 1
    """The client sends operands."""
    DOWN = 2
    """The server sends results."""


class Attach(NamedTuple):
    """The use of a socket as one direction of a call's connection."""

    direction: Direction
    connection: int
    """Number of the connection, from 0."""
    token: bytes

    def encode(self) -> bytes:
        """Return the bytes."""
        return _ATTACH.pack(
            _ATTACH_MAGIC, VERSION, self.direction, self.connection, self.token
        )

    @classmethod
    def decode(cls, data: bytes) -> Attach:
        """Read `ATTACH_BYTES` bytes.

        Raises:
            DirectFramingError: They are no Attach.
        """
        magic, version, direction, connection, token = _ATTACH.unpack(data)
        if magic != _ATTACH_MAGIC:
            raise DirectFramingError(
                f"a direct connection begins with {magic!r}: expected {_ATTACH_MAGIC!r}"
            )
        if version != VERSION:
            raise DirectFramingError(
                f"a direct connection has version {version}: expected {VERSION}"
            )
        if direction not in _DIRECTIONS:
            raise DirectFramingError(
                f"a direct connection has direction {direction}: expected 1 or 2"
            )
        return cls(Direction(direction), connection, token)


_DIRECTIONS = frozenset(Direction)

ATTACHED: Final = _ATTACHED.pack(_ATTACHED_MAGIC, VERSION)
"""The server's answer to an Attach."""


class Kind(enum.IntEnum):
    """What a frame is."""

    ELEMENTS = 1
    COMPLETE = 2
    CHECKPOINT = 3


class FrameHeader(NamedTuple):
    """The header of a frame."""

    kind: int
    matrix: int = 0
    """Number of the matrix; 0 unless the frame has elements."""
    position: int = 0
    """Index of the first element in the matrix; rows of a checkpoint; m at the end."""
    length: int = 0
    """Bytes of the payload."""
    crc32c: int | None = None
    """Checksum of the payload, if there is one."""

    def encode(self) -> bytes:
        """Return the bytes."""
        crc, flags = self.crc32c, _HAS_CRC
        if crc is None:
            crc = flags = 0
        return _HEADER.pack(
            _FRAME_MAGIC,
            VERSION,
            self.kind,
            self.matrix,
            flags,
            crc,
            0,
            self.position,
            self.length,
        )

    @classmethod
    def decode(cls, data: bytes | bytearray | memoryview) -> FrameHeader:
        """Read `HEADER_BYTES` bytes.

        Raises:
            DirectFramingError: They are no header of a frame.
        """
        magic, version, kind, matrix, flags, crc, zero, index, length = _HEADER.unpack(
            data
        )
        if magic != _FRAME_MAGIC or version != VERSION:
            raise DirectFramingError(
                f"a frame begins with {magic!r} and version {version}: expected"
                f" {_FRAME_MAGIC!r} and {VERSION}"
            )
        if kind not in _KINDS or flags & ~_HAS_CRC or zero:
            raise DirectFramingError(
                f"a frame has kind {kind}, flags {flags:#x} and {zero} in its unused"
                " field: these are unknown"
            )
        if index < 0 or length < 0:
            raise DirectFramingError(
                f"a frame has index {index} and length {length}: expected at least 0"
            )
        if kind != Kind.ELEMENTS and (matrix or length or flags):
            raise DirectFramingError(
                f"a frame of kind {kind} has matrix {matrix}, length {length} and flags"
                f" {flags:#x}: expected none"
            )
        return cls(kind, matrix, index, length, crc if flags else None)


_KINDS = frozenset(Kind)
