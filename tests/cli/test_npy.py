"""Matrices in .npy files: every layout is read right, all else is refused."""

from __future__ import annotations

import io
import os
import re
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from gradwire_cli.errors import CommandError
from gradwire_cli.files.npy import open_npy
from gradwire_protocol.dtypes import Dtype

MATRIX = np.arange(35, dtype=np.float32).reshape(7, 5) - 11


def written(path: Path, array: Any, version: tuple[int, int] | None = None) -> Path:
    with path.open("wb") as file:
        np.lib.format.write_array(file, array, version=version)
    return path


def with_header(text: bytes) -> bytes:
    """A file that says this of its array."""
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def refusal(path: Path, **options: bool) -> str:
    with pytest.raises(CommandError) as caught:
        open_npy(path, **options)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_of_the_format_is_read(
    tmp_path: Path, version: tuple[int, int]
) -> None:
    matrix = open_npy(written(tmp_path / "x.npy", MATRIX, version))
    assert matrix.shape == (7, 5)
    assert matrix.dtype is Dtype.FLOAT32
    np.testing.assert_array_equal(matrix.rows(0, 7), MATRIX)
    matrix.close()


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f2", ">f2", "<f4", ">f4", "<f8", ">f8"])
@pytest.mark.parametrize(("start", "stop"), [(0, 7), (2, 5), (6, 7), (3, 3)])
def test_rows_are_right_in_every_order_of_elements_and_bytes(
    tmp_path: Path, order: Any, dtype: str, start: int, stop: int
) -> None:
    array = np.array(MATRIX, dtype=dtype, order=order)
    matrix = open_npy(written(tmp_path / "x.npy", array))
    rows = matrix.rows(start, stop)
    assert rows.shape == (stop - start, 5)
    np.testing.assert_array_equal(rows, MATRIX[start:stop])
    matrix.close()


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_matrices_without_elements_have_their_shape(
    tmp_path: Path, shape: tuple[int, int]
) -> None:
    matrix = open_npy(written(tmp_path / "x.npy", np.zeros(shape)))
    assert matrix.rows(0, shape[0]).shape == shape
    matrix.close()


def test_raw_two_byte_elements_are_bfloat16_when_they_are_said_to_be(
    tmp_path: Path,
) -> None:
    path = written(tmp_path / "x.npy", MATRIX.astype(ml_dtypes.bfloat16))
    assert np.load(path).dtype == np.dtype("V2")
    matrix = open_npy(path, raw_as=Dtype.BFLOAT16)
    assert matrix.dtype is Dtype.BFLOAT16
    np.testing.assert_array_equal(matrix.rows(1, 7).astype(np.float32), MATRIX[1:])
    matrix.close()
    assert "add --dtype bfloat16" in refusal(path)


def test_a_file_of_python_2_is_read_without_a_word(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    text = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1L, 2L), }\n"
    path.write_bytes(with_header(text) + bytes(8))
    matrix = open_npy(path)
    assert matrix.shape == (1, 2)
    matrix.close()


def test_a_file_of_another_dtype_is_not_called_bfloat16(tmp_path: Path) -> None:
    path = written(tmp_path / "x.npy", MATRIX)
    assert "holds float32" in refusal(path, raw_as=Dtype.BFLOAT16)


def test_what_is_no_matrix_of_a_known_dtype_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    assert "does not exist" in refusal(path)
    assert "is a directory" in refusal(tmp_path)
    assert "holds int64" in refusal(written(path, MATRIX.astype(np.int64)))
    assert "holds complex64" in refusal(written(path, MATRIX.astype(np.complex64)))
    assert "1 dimensions" in refusal(written(path, MATRIX[0]))
    assert "3 dimensions" in refusal(written(path, MATRIX[None]))
    assert "0 dimensions" in refusal(written(path, np.float32(3)))
    fields = np.zeros((2, 2), np.dtype([("名", "f4")]))
    with pytest.warns(UserWarning, match="format 3.0"):
        written(path, fields)
    assert "holds" in refusal(path)
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refusal(tmp_path / "pipe")


def test_pickled_objects_are_never_loaded(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.array([[object()]]), allow_pickle=True)
    assert "pickled Python objects" in refusal(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04",
        b"\x93NUMPY",
        b"\x93NUMPY\x01\x00\x10\x00{'descr': '<f4'}",
        b"\x93NUMPY\x01\x00\xff\xffshort",
        bytes(300),
        with_header(b"(" * 9000),
        with_header(b"(" * 150),
        with_header(b"-" * 5000 + b"1"),
        with_header(b"'\\N{no such name}'"),
        with_header(b"{[]: 1}"),
        with_header(b"{'descr': '<f4', 'fortran_order': False, 'shape': [1, 2]}"),
        with_header(b"{'descr': {'a': 1}, 'fortran_order': False, 'shape': (1, 2)}"),
        with_header(b"\x00"),
    ],
)
def test_what_is_no_npy_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.npy"
    path.write_bytes(content)
    assert "not a .npy file" in refusal(path)


def test_a_version_that_is_not_known_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    path.write_bytes(b"\x93NUMPY\x04\x02" + bytes(100))
    assert "version 4.2" in refusal(path)


def test_a_negative_shape_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 3)}\n"
    path.write_bytes(with_header(header))
    assert "shape is negative" in refusal(path)


def test_a_file_that_is_cut_off_is_refused_with_both_sizes(tmp_path: Path) -> None:
    path = written(tmp_path / "x.npy", MATRIX)
    os.truncate(path, path.stat().st_size - 1)
    assert re.search("need 140 bytes, and the file has 139", refusal(path))


def test_a_file_that_shrinks_while_it_is_read_gives_an_error(tmp_path: Path) -> None:
    path = written(tmp_path / "x.npy", MATRIX)
    matrix = open_npy(path)
    os.truncate(path, path.stat().st_size - 40)
    np.testing.assert_array_equal(matrix.rows(0, 5), MATRIX[:5])
    with pytest.raises(CommandError, match="became shorter"):
        matrix.rows(0, 7)
    matrix.close()


def test_bytes_after_the_elements_do_no_harm(tmp_path: Path) -> None:
    path = written(tmp_path / "x.npy", MATRIX)
    with path.open("ab") as file:
        np.save(buffer := io.BytesIO(), MATRIX)
        file.write(buffer.getvalue())
    matrix = open_npy(path)
    np.testing.assert_array_equal(matrix.rows(0, 7), MATRIX)
    matrix.close()
