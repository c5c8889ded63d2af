"""Files of tensors in the safetensors format, with a checksum.

The format: the header's length in 8 bytes, little-endian; the header, a JSON object
with the dtype, the shape and the place of each tensor, and strings of metadata; the
elements, without gaps. Any safetensors library can read the files. They are written and
read here without it, because it needs all elements in memory a second time, which no
limit counts.

The first string of the metadata is the CRC-32 of the file, taken with zeros in its
place. Only files that begin so are read.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from gradwire_protocol.dtypes import Dtype
from gradwire_server.backends.kept_memory import KeptArray
from gradwire_server.sessions.windows import WINDOW_BYTES

_NAMES = {
    Dtype.FLOAT16: "F16",
    Dtype.BFLOAT16: "BF16",
    Dtype.FLOAT32: "F32",
    Dtype.FLOAT64: "F64",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}

_METADATA = "__metadata__"
_BEFORE_CRC = b'{"__metadata__":{"crc32":"'
_NO_CRC = b"00000000"
_CRC_AT = 8 + len(_BEFORE_CRC)

_MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""

_ALIGNMENT = 64
"""The elements begin at a multiple of it in the file, for those who map it."""


class Access(Protocol):
    """Access to the bytes of arrays, from the thread that reads or writes a file.

    Methods wait for the arrays' device, and raise an exception to stop.
    """

    def bytes_of(self, array: KeptArray, begin: int, end: int) -> memoryview:
        """Return bytes of an array, valid until the next call."""

    def room_for(self, array: KeptArray, begin: int, end: int) -> memoryview:
        """Return bytes of an array, to be filled before the next call."""

    def end(self) -> None:
        """Complete what was filled."""


class TensorFileError(ValueError):
    """A file is not one of these, or is damaged; the text is a part of a sentence."""


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor in a file."""

    dtype: Dtype
    shape: tuple[int, ...]
    begin: int
    """Position of its first byte in the file."""

    @property
    def size_bytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


def write(
    descriptor: int,
    arrays: Mapping[str, KeptArray],
    metadata: Mapping[str, str],
    access: Access,
) -> int:
    """Write a file.

    Args:
        descriptor: An empty file, open for writing.
        arrays: The arrays, by name.
        metadata: Strings about them.
        access: Reads them.

    Returns:
        Its size in bytes.

    Raises:
        OSError: It cannot be written.
    """
    # Elements are aligned if wider ones come first, as the library writes them.
    ordered = sorted(arrays.items(), key=_place_in_file)
    crc = _NO_CRC.decode()
    header: dict[str, Any] = {_METADATA: {"crc32": crc, **metadata}}
    end = 0
    for name, array in ordered:
        begin, end = end, end + array.nbytes
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": array.shape,
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    first = len(text).to_bytes(8, "little") + text
    running = zlib.crc32(first)
    _write_all(descriptor, memoryview(first))
    for _, array in ordered:
        for part in _pieces(array):
            piece = access.bytes_of(array, *part)
            running = zlib.crc32(piece, running)
            _write_all(descriptor, piece)
    os.pwrite(descriptor, f"{running:08x}".encode(), _CRC_AT)
    return len(first) + end


class TensorFile:
    """A file that is read.

    Args:
        descriptor: The file, open for reading from its beginning.

    Raises:
        TensorFileError: It is not one of these files.
        OSError: It cannot be read.

    Attributes:
        metadata: Its strings.
        places: Its tensors, in the order of the file.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        size = os.fstat(descriptor).st_size
        start = os.pread(descriptor, 8 + len(_BEFORE_CRC), 0)
        length = int.from_bytes(start[:8], "little")
        if start[8:] != _BEFORE_CRC:
            raise TensorFileError("was not written by this program")
        if not length <= min(size - 8, _MAX_HEADER_BYTES):
            raise TensorFileError("ends within its header")
        self._first = bytearray(8 + length)
        self._position = 0
        self._read_into(memoryview(self._first))
        try:
            header = json.loads(self._first[8:])
            self.metadata: dict[str, str] = header.pop(_METADATA)
            self._crc = int(self.metadata.pop("crc32"), 16)
            self.places = _places(header, len(self._first), size)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise TensorFileError("has a damaged header") from None
        self._first[_CRC_AT : _CRC_AT + len(_NO_CRC)] = _NO_CRC

    def read(self, into: Mapping[str, KeptArray], access: Access) -> None:
        """Read all elements, and compare the checksum.

        Args:
            into: Arrays for all tensors, of their dtypes and shapes.
            access: Writes them.

        Raises:
            TensorFileError: The file is damaged. The arrays are then of no use.
            OSError: It cannot be read.
        """
        running = zlib.crc32(self._first)
        for name in self.places:
            for part in _pieces(into[name]):
                piece = access.room_for(into[name], *part)
                self._read_into(piece)
                running = zlib.crc32(piece, running)
        access.end()
        if running != self._crc:
            raise TensorFileError("is damaged: its checksum is wrong")

    def _read_into(self, piece: memoryview) -> None:
        while piece:
            count = os.preadv(self._descriptor, [piece], self._position)
            if not count:
                raise TensorFileError("ends too early")
            self._position += count
            piece = piece[count:]


def _place_in_file(item: tuple[str, KeptArray]) -> tuple[int, str]:
    name, array = item
    return -array.dtype.itemsize, name


def _pieces(array: KeptArray) -> Iterator[tuple[int, int]]:
    for begin in range(0, array.nbytes, WINDOW_BYTES):
        yield begin, min(begin + WINDOW_BYTES, array.nbytes)


def _write_all(descriptor: int, piece: memoryview) -> None:
    while piece:
        piece = piece[os.write(descriptor, piece) :]


def _places(header: dict[str, Any], first: int, size: int) -> dict[str, Place]:
    """Return the tensors' places, which follow each other.

    Raises:
        ValueError, KeyError, TypeError: The header is not valid.
    """
    places: dict[str, Place] = {}
    at = first
    for name, about in header.items():
        shape = tuple(about["shape"])
        if not all(type(each) is int and each >= 0 for each in shape):
            raise ValueError(name)
        place = Place(_DTYPES[about["dtype"]], shape, at)
        begin, end = about["data_offsets"]
        if (first + begin, first + end) != (at, at + place.size_bytes):
            raise ValueError(name)
        at = first + end
        places[name] = place
    if at != size:
        raise ValueError("size")
    return places
