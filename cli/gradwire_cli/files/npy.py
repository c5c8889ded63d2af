"""Matrices in ``.npy`` files, read some rows at a time.

Rows are read by position into fresh buffers, so only the current rows are
resident, for any file size and element order. If a file shrinks or becomes
unreadable during a job, reading raises an error; a memory map would end the
process with SIGBUS.
"""

from __future__ import annotations

import os
import stat
import tokenize
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from gradwire_cli.errors import CommandError
from gradwire_protocol.dtypes import Dtype

Array: TypeAlias = npt.NDArray[Any]

*_FIRST, _LAST = (dtype.label for dtype in Dtype)
_LABELS = f"{', '.join(_FIRST)} and {_LAST}"

RAW_DTYPES = tuple(dtype for dtype in Dtype if not dtype.is_numpys_own)
"""Dtypes whose elements NumPy saves as raw bytes (``|V2``)."""


class NpyMatrix:
    """A matrix in a file with random access to rows.

    Thread-safe: reads do not share a file position.
    """

    def __init__(
        self, path: Path, file: BinaryIO, header: _Header, dtype: Dtype
    ) -> None:
        self.path = path
        self.shape: tuple[int, int] = (header.shape[0], header.shape[1])
        self.dtype = dtype
        """Element type, independent of the byte order in the file."""
        self._file = file
        self._offset = file.tell()
        self._by_columns = header.fortran_order
        # Read in the file's byte order; ml_dtypes has only the native order.
        self._in_file = dtype.numpy if dtype in RAW_DTYPES else np.dtype(header.dtype)

    @property
    def size_bytes(self) -> int:
        """Bytes of all elements."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> Array:
        """Rows [start, stop), of shape (stop - start, columns).

        Raises:
            CommandError: The file cannot be read, or is too short.
        """
        count, columns = stop - start, self.shape[1]
        if not self._by_columns:
            block = np.empty((count, columns), self._in_file)
            self._read(block, start * columns)
            return block
        transposed = np.empty((columns, count), self._in_file)
        if count == self.shape[0]:
            self._read(transposed, 0)
        else:
            for column in range(columns):
                self._read(transposed[column], column * self.shape[0] + start)
        return transposed.T

    def _read(self, target: Array, index: int) -> None:
        if not target.size:
            return
        view = target.reshape(-1).view(np.uint8).data
        position = self._offset + index * self.dtype.itemsize
        while view:
            try:
                got = os.preadv(self._file.fileno(), [view], position)
            except OSError as error:
                raise CommandError(
                    f"{self.path} cannot be read: {_reason(error)}"
                ) from error
            if not got:
                raise CommandError(f"{self.path} became shorter while it was read")
            view, position = view[got:], position + got

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class _Header(NamedTuple):
    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype[Any]


def open_npy(path: Path, *, raw_as: Dtype | None = None) -> NpyMatrix:
    """Open the matrix in a ``.npy`` file of format version 1, 2 or 3.

    Args:
        path: The file.
        raw_as: The dtype of raw elements (``|V2``, NumPy's form of bfloat16): one of
            `RAW_DTYPES`.

    Raises:
        CommandError: The file does not exist, cannot be read, is not a .npy
            file, is cut off, or does not hold a matrix of a gradwire dtype. The
            message names the file.
    """
    try:
        # Without O_NONBLOCK, a named pipe would wait forever for a writer.
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
        file = os.fdopen(os.open(path, flags), "rb")
    except FileNotFoundError:
        raise CommandError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise CommandError(f"{path} is a directory, not a .npy file") from None
    except OSError as error:
        raise CommandError(f"{path} cannot be read: {_reason(error)}") from error
    try:
        header = _read_header(path, file)
        dtype = _element_type(path, header, raw_as)
        _check_size(path, file, header)
        return NpyMatrix(path, file, header, dtype)
    except BaseException:
        file.close()
        raise


_READERS: dict[tuple[int, int], Callable[[BinaryIO], Any]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
    # Version 3 differs from 2 only in the encoding of field names, and a matrix
    # has no fields.
    (3, 0): np.lib.format.read_array_header_2_0,
}


# NumPy parses the header as a Python literal, so all of these can occur.
_NO_HEADER = (
    *(ValueError, TypeError, OSError, SyntaxError, tokenize.TokenError),
    *(RecursionError, MemoryError),
)


def _read_header(path: Path, file: BinaryIO) -> _Header:
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        raise CommandError(f"{path} is not a regular file")
    try:
        version = np.lib.format.read_magic(file)
        reader = _READERS.get(version)
        with warnings.catch_warnings():
            # Ignore the warning that Python 2 wrote the file.
            warnings.simplefilter("ignore")
            header = _Header(*reader(file)) if reader else None
    except _NO_HEADER:
        raise CommandError(
            f"{path} is not a .npy file, or is damaged; write one with numpy.save"
        ) from None
    if header is None:
        raise CommandError(
            f"{path} has version {version[0]}.{version[1]} of the .npy format; "
            "gradwire reads 1.0, 2.0 and 3.0"
        )
    if any(length < 0 for length in header.shape):
        raise CommandError(f"{path} is a damaged .npy file: its shape is negative")
    return header


def _element_type(path: Path, header: _Header, raw_as: Dtype | None) -> Dtype:
    dtype, shape = header.dtype, header.shape
    if dtype.hasobject:
        raise CommandError(
            f"{path} holds pickled Python objects, which are never loaded; "
            f"gradwire computes with {_LABELS}"
        )
    if len(shape) != 2:
        raise CommandError(
            f"{path} holds an array of {len(shape)} dimensions, shape "
            f"{format_shape(shape)}; gradwire needs a matrix (2 dimensions)"
        )
    candidates = [each for each in RAW_DTYPES if dtype == f"V{each.itemsize}"]
    if raw_as in candidates:
        return raw_as
    if candidates:
        labels = " or ".join(each.label for each in candidates)
        raise CommandError(
            f"{path} holds raw {dtype.itemsize}-byte elements; add --dtype {labels} if "
            f"they are {labels}, which NumPy saves in this form"
        )
    if raw_as is not None:
        raise CommandError(
            f"{path} holds {dtype.name}; --dtype {raw_as.label} is for files of raw "
            f"{raw_as.itemsize}-byte elements"
        )
    try:
        return Dtype.of(dtype)
    except KeyError:
        raise CommandError(
            f"{path} holds {dtype.name}; gradwire computes with {_LABELS}: "
            "convert it with astype first"
        ) from None


def _check_size(path: Path, file: BinaryIO, header: _Header) -> None:
    rows, columns = header.shape
    promised = rows * columns * header.dtype.itemsize
    present = os.fstat(file.fileno()).st_size - file.tell()
    if present < promised:
        raise CommandError(
            f"{path} is cut off: {format_shape(header.shape)} elements of "
            f"{header.dtype.itemsize} bytes need {promised} bytes, and the file has "
            f"{max(present, 0)}"
        )


def format_shape(shape: tuple[int, ...]) -> str:
    """Format a shape like NumPy."""
    return str(tuple(shape))


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
