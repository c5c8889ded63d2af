"""Operands: from whatever holds numbers to rows that can be sent.

Nothing is copied here that need not be: an array in C order and native byte
order is read where it lies, and any other is brought into that form a few
rows at a time, while it is sent.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator, Sequence
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

_COPIED_ELEMENTS = 1 << 18
"""Elements that are rounded at once on their way from memory to memory."""


class Operand:
    """A matrix to be sent: an array whose leading dimensions count as rows.

    Attributes:
        array: As it was given: any layout, any byte order, two dimensions or
            more.
        dtype: The element type in which it travels: the array's, unless
            `rounding` makes it another.
        rounding: Rounds a float32 array's elements to `dtype`; None: they
            have it.
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
        # The array with two dimensions, where that takes no copy.
        self._matrix: Array | None = None
        with contextlib.suppress(ValueError):
            self._matrix = array.reshape(self.rows, self.columns, copy=False)

    @property
    def lead(self) -> tuple[int, ...]:
        """The dimensions that count as rows."""
        return self.array.shape[:-1]

    @property
    def size_bytes(self) -> int:
        """Bytes of all elements, as they travel."""
        return self.rows * self.columns * self.dtype.itemsize

    def take(self, first: int, last: int) -> Array:
        """Rows [first, last) as they travel: in C order and native byte order.

        A view where the array has that form already.

        Raises:
            InputError: An element is too large for 16 bits.
        """
        part = self._read(first, last)
        if self.rounding is None:
            return part
        return self.rounding.rounded(part, first * self.columns)

    def _read(self, first: int, last: int) -> Array:
        """Rows [first, last) in the array's own dtype, C order, native order."""
        if self._matrix is not None:
            part = self._matrix[first:last]
        else:
            part = self.array[np.unravel_index(np.arange(first, last), self.lead)]
        return np.ascontiguousarray(part, dtype=part.dtype.newbyteorder("="))

    def pieces(
        self, first: int, last: int, elements: int
    ) -> Iterator[tuple[int, memoryview]]:
        """The bytes of rows [first, last), in order.

        Args:
            first: The first row.
            last: The row after the last.
            elements: Most elements of a piece, at least 1.

        Yields:
            The index of a piece's first element within the operand, and the
            piece. Its memory may be used again for the next.

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
        """Put all elements, as they travel, into `room`.

        Args:
            room: Their bytes' place, one-dimensional and contiguous.

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


def operand(
    value: object,
    name: str,
    wire_dtype: Dtype | None = None,
    first_row: int = 0,
    copies: HostCopies | None = None,
) -> Operand:
    """An operand from what the caller gave.

    Args:
        value: An array with at least two dimensions of a supported dtype: a
            NumPy array, anything with ``__array__``, ``__dlpack__`` or the
            buffer protocol, or nested sequences of Python floats, which are
            float64 as in NumPy. What lies in a GPU's memory is copied.
        name: What to call it in errors.
        wire_dtype: The 16-bit dtype in which it shall travel, if it shall.
        first_row: Number of its first row, for errors.
        copies: Told of a copy from a GPU's memory.

    Raises:
        InputError: It is no such thing; the text says what to do.
    """
    if is_on_device(value):
        array = _from_device(value, name, HostCopies() if copies is None else copies)
    else:
        array = as_numpy(value, name)
    dtype = _dtype(array, name, value)
    if wire_dtype is not None and wire_dtype not in dtype.travels_as:
        wide = " or ".join(it.label for it in Dtype if wire_dtype in it.travels_as)
        raise InputError(
            f"{name} is {dtype.label}, and wire_dtype is for {wide} operands: convert"
            " them, or leave wire_dtype out"
        )
    if array.ndim < 2:
        text = f"{name} has shape {array.shape}, and a matrix has two dimensions"
        if array.ndim == 1:
            text += f": make it one row with {name}[None, :] or one column with"
            text += f" {name}[:, None]"
        raise InputError(text)
    if wire_dtype is None:
        return Operand(array, dtype)
    rounding = Rounding(wire_dtype, name, array.shape[-1], first_row)
    return Operand(array, wire_dtype, rounding)


def as_numpy(value: object, name: str) -> Array:
    """The NumPy array that shares its memory with `value`, or a copy of it.

    Raises:
        InputError: There is none.
    """
    losses.check(value, name)
    if isinstance(value, np.ndarray):
        return np.asarray(value)
    if is_torch_tensor(value):
        return _from_torch(value, name)
    if value is None or isinstance(value, str | bytes | dict | set):
        raise _no_array(value, name)
    try:
        if hasattr(value, "__array__") or isinstance(value, Sequence):
            array = np.asanyarray(value)  # a subclass, if it makes one
            losses.check(array, name)
            return np.asarray(array)
        if hasattr(value, "__dlpack__"):
            return np.from_dlpack(value)
        return np.asarray(memoryview(value))  # type: ignore[arg-type]
    except InputError:
        raise
    except Exception as error:
        # A foreign type's conversion may raise anything at all.
        if hasattr(value, "__cuda_array_interface__"):
            raise _no_copy(value, name, error) from error
        raise _no_array(value, name, error) from error


def _from_device(value: Any, name: str, copies: HostCopies) -> Array:
    """A copy in host memory of an array on a GPU.

    Raises:
        InputError: Its library makes none.
    """
    try:
        with copies.copying():
            copied = to_host(value)
    except Exception as error:
        # A foreign type's conversion may raise anything at all.
        raise _no_copy(value, name, error) from error
    array = as_numpy(copied, name)
    copies.size_bytes += array.nbytes
    return array


def _from_torch(tensor: Any, name: str) -> Array:
    torch = sys.modules["torch"]
    if tensor.layout is not torch.strided:
        raise InputError(f"{name} is a sparse tensor: pass {name}.to_dense()")
    label = str(tensor.dtype).removeprefix("torch.")
    if label.startswith("float8"):  # which NumPy does not have
        raise InputError(
            f"{name} is {label}; gradwire computes {_COMPUTES}: convert with"
            f" {name}.to(torch.float32)"
        )
    tensor = tensor.detach().resolve_neg()
    if tensor.dtype is torch.bfloat16:
        bits: Array = tensor.view(torch.int16).numpy()
        return bits.view(ml_dtypes.bfloat16)
    try:
        array: Array = tensor.numpy()
    except (TypeError, RuntimeError) as error:
        raise _no_array(tensor, name, error) from error
    return array


def _no_copy(value: object, name: str, cause: BaseException) -> InputError:
    where = getattr(value, "device", "a device")
    return InputError(
        f"{name} is a {type(value).__module__}.{type(value).__qualname__} on {where},"
        f" which gives no copy of itself in host memory ({cause}): pass such a copy"
    )


def _no_array(
    value: object, name: str, cause: BaseException | None = None
) -> InputError:
    kind = "None" if value is None else f"a {type(value).__qualname__}"
    why = f" ({cause})" if cause else ""
    return InputError(
        f"{name} is {kind}, from which no array can be made{why}: pass an array of"
        f" {_COMPUTES}"
    )


def _dtype(array: Array, name: str, value: object) -> Dtype:
    try:
        return Dtype.of(array.dtype)
    except KeyError:
        pass
    text = f"{name} is {array.dtype}; gradwire computes {_COMPUTES}: "
    kind = array.dtype.kind
    if is_torch_tensor(value):
        convert = f"{name}.to(torch.float32)"
    else:
        convert = f"{name}.astype(np.float32)"
    if kind == "c":
        text += f"pass {name}.real and {name}.imag as jobs of their own"
    elif kind == "V" and array.dtype.itemsize == 2:
        text += f"raw 2-byte values may be {name}.view(ml_dtypes.bfloat16)"
    elif kind == "O":
        text += "an array of Python objects has no element type to send"
    else:
        text += f"convert with {convert}"
    raise InputError(text)
