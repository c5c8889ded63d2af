"""Frames on a direct connection."""

from __future__ import annotations

from typing import Final, NamedTuple, TypeAlias

from gradwire._api.errors import ProtocolError
from gradwire_protocol import checksum
from gradwire_protocol.data_plane.frames import FrameHeader, Kind
from gradwire_protocol.limits import MAX_PAYLOAD_BYTES

NOTHING: Final = memoryview(b"")
"""The payload of a frame without elements."""


class Frame(NamedTuple):
    """A frame to send."""

    header: FrameHeader
    payload: memoryview


Message: TypeAlias = bytes | Frame
"""A message of the call, or a frame on its direct connection."""


def elements_frame(
    matrix: int, index: int, payload: memoryview, *, has_checksum: bool = False
) -> Frame:
    """Return the frame with elements of a matrix, or of a tensor (0).

    Args:
        matrix: Number of the matrix.
        index: Index of the first element.
        payload: The elements.
        has_checksum: Whether the frame has a CRC-32C.
    """
    crc = checksum.crc32c(payload) if has_checksum else None
    header = FrameHeader(Kind.ELEMENTS, matrix, index, len(payload), crc)
    return Frame(header, payload)


def complete_frame(position: int) -> Frame:
    """Return the last frame: of a job with that many rows, or of so many elements."""
    return Frame(FrameHeader(Kind.COMPLETE, 0, position), NOTHING)


def check_length(header: FrameHeader) -> None:
    """Check that a frame of the server is no longer than the contract allows.

    Raises:
        ProtocolError: It is.
    """
    if header.length > MAX_PAYLOAD_BYTES:
        raise ProtocolError(
            f"the server sent a frame of {header.length} bytes: expected at most"
            f" {MAX_PAYLOAD_BYTES}"
        )
