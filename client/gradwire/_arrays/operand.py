"""Conversion of the caller's arrays to operands.

Arrays in C order and native byte order are sent without a copy. Other arrays are
converted a few rows at a time, while they are sent.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from gradwire._api.errors import InputError
from gradwire._api.types import Array
from gradwire._arrays import losses
from gradwire._arrays.device_copy import (
    HostCopies,
    is_on_device,
    is_torch_tensor,
    to_host,
)
from gradwire._arrays.wire_cast import Rounding
from gradwire_protocol.dtypes import Dtype

_COMPUTES = ", ".join(dtype.label for dtype in Dtype)

_FORMS = ("__array__", "__array_interface__", "__array_struct__")
"""Attributes by which NumPy converts objects. Pillow's images have only the second."""

_COPIED_ELEMENTS = 1 << 18
"""Elements rounded at once in copies from memory to memory."""


class Operand:
    """A matrix to send: an array whose leading dimensions count as rows.

    Attributes:
        array: The array, with any memory layout and byte order, and at least two
            dimensions.
        dtype: Dtype in which the elements are sent: the array's, unless `rounding` is
            set.
        rounding: Rounds the elements of a float32 array to `dtype`; None: no rounding.
        rows: The product of all dimensions but the last.
        columns: The last dimension.
    """

    __slots__ = (
        "_flat",
        "_matrix",
        "array",
        "columns",
        "dtype",
        "rounding",
        "rows",
    )

    def __init__(
        self, array: Array, dtype: Dtype, rounding: Rounding | None = None
    ) -> None:
        self.array = array
        self.dtype = dtype
        self.rounding = rounding
        self.rows: int = math.prod(array.shape[:-1])
        self.columns: int = array.shape[-1]
        self._flat = array.flags.c_contiguous and array.dtype.isnative
        # The array with two dimensions, if that needs no copy.
        self._matrix: Array | None = None
        with contextlib.suppress(ValueError):
            self._matrix = array.reshape(self.rows, self.columns, copy=False)

    @property
    def lead(self) -> tuple[int, ...]:
        """The leading dimensions, which count as rows."""
        return self.array.shape[:-1]

    @property
    def size_bytes(self) -> int:
        """Size of all elements as sent."""
        return self.rows * self.columns * self.dtype.itemsize

    def take(self, first: int, last: int) -> Array:
        """Return rows [first, last) as sent: in C order and native byte order.

        The result is a view, if the array has that form.

        Raises:
            InputError: An element is too large for 16 bits.
        """
        part = self._read(first, last)
        if self.rounding is None:
            return part
        return self.rounding.rounded(part, first * self.columns)

    def part(self, first: int, last: int) -> Operand:
        """Return rows [first, last) as an operand: a view, if that is possible."""
        if self._matrix is not None:
            array = self._matrix[first:last]
        else:
            array = self._read(first, last)
        rounding = None if self.rounding is None else self.rounding.behind(first)
        return Operand(array, self.dtype, rounding)

    def _read(self, first: int, last: int) -> Array:
        """Return rows [first, last) unrounded, in C order and native byte order."""
        if self._matrix is not None:
            part = self._matrix[first:last]
        else:
            part = self.array[np.unravel_index(np.arange(first, last), self.lead)]
        return np.ascontiguousarray(part, dtype=part.dtype.newbyteorder("="))

    def pieces(
        self, first: int, last: int, elements: int
    ) -> Iterator[tuple[int, memoryview]]:
        """Yield the bytes of rows [first, last), in order.

        Args:
            first: The first row.
            last: The row after the last.
            elements: Most elements of a piece, at least 1.

        Yields:
            The index of a piece's first element within the operand, and the piece. The
            piece's memory may be reused for the next one.

        Raises:
            InputError: An element is too large for 16 bits.
        """
        if first == last or self.columns == 0:
            return
        group = last - first if self._flat else max(1, elements // self.columns)
        for start in range(first, last, group):
            taken = self._read(start, min(start + group, last)).reshape(-1)
            for at in range(0, taken.size, elements):
                index = start * self.columns + at
                piece = taken[at : at + elements]
                if self.rounding is not None:
                    piece = self.rounding.rounded(piece, index)
                yield index, piece.view(np.uint8).data

    def copy_to(self, room: Array) -> None:
        """Copy all elements, as sent, to `room`.

        Args:
            room: The destination: one-dimensional, contiguous bytes.

        Raises:
            InputError: An element is too large for 16 bits.
        """
        room = room.view(self.dtype.numpy)
        if self.rounding is None:
            np.copyto(room.reshape(self.array.shape), self.array)
            return
        for index, piece in self.pieces(0, self.rows, _COPIED_ELEMENTS):
            elements = np.frombuffer(piece, self.dtype.numpy)
            room[index : index + elements.size] = elements


@dataclass(slots=True)  # frozen, it would take a microsecond more to make
class Source:
    """An array of the caller, of any dimensions, in host memory."""

    array: Array

    name: str
    """Name of the operand, for errors."""

    dtype: Dtype
    """Dtype in which the elements are sent."""

    rounds: bool
    """Whether elements are rounded to `dtype` while they are sent."""

    def part(self, array: Array, first_row: int = 0) -> Operand:
        """Return a part of the array, with at least two dimensions, as an operand.

        Args:
            array: The part.
            first_row: Number of its first row, for errors.
        """
        if not self.rounds:
            return Operand(array, self.dtype)
        rounding = Rounding(self.dtype, self.name, array.shape[-1], first_row)
        return Operand(array, self.dtype, rounding)

    def whole(self, first_row: int = 0) -> Operand:
        """Return the array as an operand.

        Raises:
            InputError: It has less than two dimensions.
        """
        array, name = self.array, self.name
        if array.ndim < 2:
            text = f"{name} has shape {array.shape}: expected at least two dimensions"
            if array.ndim == 1:
                text += f"; make it one row with {name}[None, :] or one column with"
                text += f" {name}[:, None]"
            raise InputError(text)
        return self.part(array, first_row)


def operand(
    value: object,
    name: str,
    wire_dtype: Dtype | None = None,
    first_row: int = 0,
    copies: HostCopies | None = None,
) -> Operand:
    """Convert a value of the caller with at least two dimensions to an operand.

    Args:
        value: As for `read`.
        name: Name of the operand, for errors.
        wire_dtype: The 16-bit dtype in which to send the elements; None: unchanged.
        first_row: Number of the first row, for errors.
        copies: Counts copies from a GPU.

    Raises:
        InputError: The value is invalid; the message says what to do.
    """
    return read(value, name, wire_dtype, copies).whole(first_row)


def read(
    value: object,
    name: str,
    wire_dtype: Dtype | None = None,
    copies: HostCopies | None = None,
) -> Source:
    """Convert a value of the caller to an array in host memory.

    Args:
        value: An array of a supported dtype: a NumPy
            array, an object with ``__array__``, ``__dlpack__`` or the buffer protocol,
            or nested sequences of Python floats, which are float64 as in NumPy. Arrays
            on a GPU are copied.
        name: Name of the operand, for errors.
        wire_dtype: The 16-bit dtype in which to send the elements; None: unchanged.
        copies: Counts copies from a GPU.

    Raises:
        InputError: The value is invalid; the message says what to do.
    """
    if is_on_device(value):
        array = _from_device(value, name, HostCopies() if copies is None else copies)
    else:
        array = as_numpy(value, name)
    dtype = _dtype(array, name, value)
    if wire_dtype is None:
        return Source(array, name, dtype, rounds=False)
    if wire_dtype not in dtype.travels_as:
        wide = " or ".join(it.label for it in Dtype if wire_dtype in it.travels_as)
        raise InputError(
            f"{name} is {dtype.label}, but wire_dtype is for {wide} operands: convert"
            " them, or omit wire_dtype"
        )
    return Source(array, name, wire_dtype, rounds=True)


def as_numpy(value: object, name: str) -> Array:
    """Return a NumPy array that shares memory with `value`, or a copy.

    Raises:
        InputError: The value cannot be converted.
    """
    losses.check(value, name)
    if isinstance(value, np.ndarray):
        return np.asarray(value)
    if is_torch_tensor(value):
        return _from_torch(value, name)
    if hasattr(value, "toarray") and hasattr(value, "nnz"):  # of SciPy
        raise InputError(f"{name} is a sparse matrix: pass {name}.toarray()")
    if value is None or isinstance(value, str | bytes | dict | set):
        raise _no_array(value, name)
    try:
        if isinstance(value, list | tuple):
            _check_dtypes(value, name)
        if isinstance(value, Sequence) or any(map(partial(hasattr, value), _FORMS)):
            array = np.asanyarray(value)  # a subclass, if it makes one
            losses.check(array, name)
            return np.asarray(array)
        if hasattr(value, "__dlpack__"):
            return _lent(np.from_dlpack(value))
        return np.asarray(memoryview(value))  # type: ignore[arg-type]
    except InputError:
        raise
    except Exception as error:
        # The conversion of a foreign type may raise any exception.
        if hasattr(value, "__cuda_array_interface__"):
            raise _no_copy(value, name, error) from error
        raise _no_array(value, name, error) from error


def _check_dtypes(values: Sequence[object], name: str) -> None:
    """Check that NumPy would not convert arrays of a sequence to a common dtype.

    Raises:
        InputError: There are arrays of two dtypes.
    """
    dtypes = {str(each.dtype): None for each in values if hasattr(each, "dtype")}
    if len(dtypes) > 1:
        raise InputError(
            f"{name} has arrays of {' and '.join(dtypes)}: convert them to one dtype"
        )


def _from_device(value: Any, name: str, copies: HostCopies) -> Array:
    """Copy an array from a GPU to host memory.

    Raises:
        InputError: The array's library cannot copy it.
    """
    try:
        with copies.copying():
            copied = to_host(value)
    except Exception as error:
        # The conversion of a foreign type may raise any exception.
        raise _no_copy(value, name, error) from error
    array = as_numpy(copied, name)
    copies.size_bytes += array.nbytes
    return array


def _from_torch(tensor: Any, name: str) -> Array:
    torch = sys.modules["torch"]
    if type(tensor).__name__.startswith("Uninitialized"):  # of torch.nn.parameter
        raise InputError(
            f"{name} is an uninitialized parameter of a lazy module: call the module"
            " once first"
        )
    if hasattr(tensor, "full_tensor"):  # torch.distributed.tensor.DTensor
        raise InputError(
            f"{name} is a distributed tensor: pass {name}.full_tensor() or"
            f" {name}.to_local()"
        )
    if getattr(tensor, "is_nested", False):
        raise InputError(
            f"{name} is a nested tensor: pass {name}.to_padded_tensor(0.0), or each of"
            f" {name}.unbind()"
        )
    if getattr(tensor, "is_quantized", False):
        raise InputError(f"{name} is a quantized tensor: pass {name}.dequantize()")
    if tensor.layout is not torch.strided:
        raise InputError(f"{name} is a sparse tensor: pass {name}.to_dense()")
    label = str(tensor.dtype).removeprefix("torch.")
    if label.startswith("float8"):  # unknown to NumPy
        raise InputError(
            f"{name} is {label}: expected one of {_COMPUTES}; convert with"
            f" {name}.to(torch.float32)"
        )
    tensor = tensor.detach().resolve_neg()
    if tensor._is_zerotensor():  # of forward differentiation, without memory
        tensor = torch.zeros(tensor.shape, dtype=tensor.dtype)
    try:
        if tensor.dtype is torch.bfloat16:
            return _shared(tensor.view(torch.int16)).view(ml_dtypes.bfloat16)
        return _shared(tensor)
    except (TypeError, RuntimeError) as error:
        raise _no_array(tensor, name, error) from error


def _shared(tensor: Any) -> Array:
    """A tensor's memory as an array.

    By DLPack if possible: ``tensor.numpy()`` forbids for ever to resize the tensor's
    storage, which FSDP2 does.
    """
    array: Array | None = None
    # A subclass may raise anything.
    with contextlib.suppress(Exception):
        array = np.from_dlpack(tensor)
    if array is None or not array.flags.writeable:
        array = tensor.numpy()
    return _lent(array)


def _lent(array: Array) -> Array:
    """Return an array that shows another object's memory, and check that it does.

    Wrappers and tensors that are only traced have no memory: their address is 0. NumPy
    then allocates an array of its own, whose elements are arbitrary.

    Raises:
        TypeError: The array is such a one.
    """
    if array.flags.owndata and array.size:
        raise TypeError(
            "it has no memory of its own, as wrappers and traced tensors have none"
        )
    return array


def _no_copy(value: object, name: str, cause: BaseException) -> InputError:
    where = getattr(value, "device", "a device")
    return InputError(
        f"{name} is a {type(value).__module__}.{type(value).__qualname__} on {where},"
        f" which cannot be copied to host memory ({cause}): pass a copy in host memory"
    )


def _no_array(
    value: object, name: str, cause: BaseException | None = None
) -> InputError:
    kind = "None" if value is None else f"a {type(value).__qualname__}"
    why = f" ({cause})" if cause else ""
    return InputError(
        f"{name} is {kind}, which is not an array{why}: expected an array of"
        f" {_COMPUTES}"
    )


def _dtype(array: Array, name: str, value: object) -> Dtype:
    with contextlib.suppress(KeyError, TypeError):  # StringDType has no byte order
        return Dtype.of(array.dtype)
    text = f"{name} is {array.dtype}: expected one of {_COMPUTES}; "
    kind = array.dtype.kind
    if is_torch_tensor(value):
        convert = f"{name}.to(torch.float32)"
    else:
        convert = f"{name}.astype(np.float32)"
    if kind == "c":
        text += f"pass {name}.real and {name}.imag in separate jobs"
    elif kind == "V" and array.dtype.itemsize == 2:
        text += f"raw 2-byte values may be {name}.view(ml_dtypes.bfloat16)"
    elif kind in "OTUS":
        text += "an array of Python objects or text cannot be sent"
    else:
        text += f"convert with {convert}"
    raise InputError(text)
