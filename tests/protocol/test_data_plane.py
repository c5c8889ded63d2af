"""The bytes on direct connections."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwire_protocol.data_plane.frames import (
    ATTACH_BYTES,
    ATTACHED,
    ATTACHED_BYTES,
    HEADER_BYTES,
    Attach,
    DirectFramingError,
    Direction,
    FrameHeader,
    Kind,
)

_SIZES = st.integers(0, 2**63 - 1)


@given(
    st.sampled_from(Direction),
    st.integers(0, 2**16 - 1),
    st.binary(min_size=32, max_size=32),
)
def test_an_attach_is_read_as_it_was_written(
    direction: Direction, connection: int, token: bytes
) -> None:
    attach = Attach(direction, connection, token)
    data = attach.encode()
    assert len(data) == ATTACH_BYTES
    assert Attach.decode(data) == attach


@given(
    st.integers(0, 127),
    _SIZES,
    _SIZES,
    st.none() | st.integers(0, 2**32 - 1),
)
def test_a_header_is_read_as_it_was_written(
    matrix: int, index: int, length: int, crc: int | None
) -> None:
    header = FrameHeader(Kind.ELEMENTS, matrix, index, length, crc)
    data = header.encode()
    assert len(data) == HEADER_BYTES
    assert FrameHeader.decode(data) == header


def test_the_bytes_are_those_of_the_page() -> None:
    """Clients in other languages are written from the page."""
    assert Attach(Direction.DOWN, 3, b"t" * 32).encode() == (
        b"GWDA" + bytes([1, 2, 3, 0]) + b"t" * 32
    )
    assert len(ATTACHED) == ATTACHED_BYTES
    assert b"GWDK" + bytes([1, 0, 0, 0]) == ATTACHED
    assert FrameHeader(Kind.ELEMENTS, 3, 5, 6, 7).encode() == b"".join(
        (
            b"GWDF",
            bytes([1, 1, 3, 1]),
            struct.pack("<I", 7),
            bytes(4),
            struct.pack("<q", 5),
            struct.pack("<q", 6),
        )
    )


def _changed(data: bytes, at: int, byte: int) -> bytes:
    return data[:at] + bytes([byte]) + data[at + 1 :]


@pytest.mark.parametrize(("at", "byte"), [(0, 0), (4, 2), (5, 9), (7, 2), (12, 1)])
def test_an_unknown_header_is_refused(at: int, byte: int) -> None:
    data = FrameHeader(Kind.ELEMENTS, 1, 2, 3).encode()
    with pytest.raises(DirectFramingError):
        FrameHeader.decode(_changed(data, at, byte))


@pytest.mark.parametrize("at", [23, 31])
def test_a_negative_size_is_refused(at: int) -> None:
    data = FrameHeader(Kind.ELEMENTS, 1, 2, 3).encode()
    with pytest.raises(DirectFramingError, match="at least 0"):
        FrameHeader.decode(_changed(data, at, 0x80))


def test_only_elements_have_a_payload() -> None:
    data = FrameHeader(Kind.COMPLETE, position=4).encode()
    assert FrameHeader.decode(data).position == 4
    with pytest.raises(DirectFramingError, match="expected none"):
        FrameHeader.decode(_changed(data, 24, 1))


@pytest.mark.parametrize(("at", "byte"), [(0, 0), (4, 2), (5, 3)])
def test_an_unknown_attach_is_refused(at: int, byte: int) -> None:
    data = Attach(Direction.UP, 0, bytes(32)).encode()
    with pytest.raises(DirectFramingError):
        Attach.decode(_changed(data, at, byte))
