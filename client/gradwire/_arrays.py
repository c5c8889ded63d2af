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

from gradwire._exceptions import InputError
from gradwire._types import Array
from gradwire.wire.dtypes import Dtype

_COMPUTES = ", ".join(dtype.label for dtype in Dtype)


class Operand:
    """A matrix to be sent: an array whose leading dimensions count as rows.

    Attributes:
        array: As it was given: any layout, any byte order, two dimensions or
            more.
        dtype: Its element type.
        rows: The product of all dimensions but the last.
        columns: The last dimension.
    """

    __slots__ = ("_flat", "_matrix", "array", "columns", "dtype", "rows")

    def __init__(self, array: Array, dtype: Dtype) -> None:
        self.array = array
        self.dtype = dtype
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
        """Bytes of all elements."""
        return self.rows * self.columns * self.dtype.itemsize

    def take(self, first: int, last: int) -> Array:
        """Rows [first, last) in C order and native byte order.

        A view where the array has that form already.
        """
        if self._matrix is not None:
            part = self._matrix[first:last]
        else:
            part = self.array[np.unravel_index(np.arange(first, last), self.lead)]
        return np.ascontiguousarray(part, dtype=self.dtype.numpy)

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
        """
        if first == last or self.columns == 0:
            return
        group = last - first if self._flat else max(1, elements // self.columns)
        step = elements * self.dtype.itemsize
        for start in range(first, last, group):
            taken = self.take(start, min(start + group, last))
            payload = taken.reshape(-1).view(np.uint8).data
            for at in range(0, len(payload), step):
                index = start * self.columns + at // self.dtype.itemsize
                yield index, payload[at : at + step]


def operand(value: object, name: str) -> Operand:
    """An operand from what the caller gave.

    Args:
        value: An array with at least two dimensions of a supported dtype: a
            NumPy array, anything with ``__array__``, ``__dlpack__`` or the
            buffer protocol, or nested sequences of Python floats, which are
            float64 as in NumPy.
        name: What to call it in errors.

    Raises:
        InputError: It is no such thing; the text says what to do.
    """
    array = as_numpy(value, name)
    dtype = _dtype(array, name, value)
    if array.ndim < 2:
        text = f"{name} has shape {array.shape}, and a matrix has two dimensions"
        if array.ndim == 1:
            text += f": make it one row with {name}[None, :] or one column with"
            text += f" {name}[:, None]"
        raise InputError(text)
    return Operand(array, dtype)


def as_numpy(value: object, name: str) -> Array:
    """The NumPy array that shares its memory with `value`, or a copy of it.

    Raises:
        InputError: There is none.
    """
    if isinstance(value, np.ma.MaskedArray):
        raise InputError(
            f"{name} is a masked array, and the server has no masks: fill it first"
            f" with {name}.filled(...)"
        )
    if isinstance(value, np.ndarray):
        return np.asarray(value)
    if is_torch_tensor(value):
        return _from_torch(value, name)
    if value is None or isinstance(value, str | bytes | dict | set):
        raise _no_array(value, name)
    try:
        if hasattr(value, "__array__") or isinstance(value, Sequence):
            return np.asarray(value)
        if hasattr(value, "__dlpack__"):
            return _from_dlpack(value, name)
        return np.asarray(memoryview(value))  # type: ignore[arg-type]
    except InputError:
        raise
    except Exception as error:
        # A foreign type's conversion may raise anything at all.
        if hasattr(value, "__cuda_array_interface__"):
            raise _on_device(value, name, f"{name}.get()") from error
        raise _no_array(value, name, error) from error


def is_torch_tensor(value: object) -> bool:
    """Whether it is a PyTorch tensor, found out without importing PyTorch."""
    torch = sys.modules.get("torch")
    tensor = getattr(torch, "Tensor", None)
    return tensor is not None and isinstance(value, tensor)


def _from_torch(tensor: Any, name: str) -> Array:
    torch = sys.modules["torch"]
    if tensor.layout is not torch.strided:
        raise InputError(f"{name} is a sparse tensor: pass {name}.to_dense()")
    if tensor.device.type != "cpu":
        raise _on_device(tensor, name, f"{name}.cpu()")
    tensor = tensor.detach().resolve_neg()
    if tensor.dtype is torch.bfloat16:
        bits: Array = tensor.view(torch.int16).numpy()
        return bits.view(ml_dtypes.bfloat16)
    try:
        array: Array = tensor.numpy()
    except (TypeError, RuntimeError) as error:
        raise _no_array(tensor, name, error) from error
    return array


def _from_dlpack(value: Any, name: str) -> Array:
    kind = value.__dlpack_device__()[0]
    if kind != 1:  # kDLCPU
        raise _on_device(value, name, "a copy of it in host memory")
    return np.from_dlpack(value)


def _on_device(value: object, name: str, instead: str) -> InputError:
    where = getattr(value, "device", "a device")
    return InputError(
        f"{name} is a {type(value).__module__}.{type(value).__qualname__} on {where},"
        f" and gradwire reads host memory: pass {instead}"
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
