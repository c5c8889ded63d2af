"""Element types: one table of all that both sides know of them.

A new element type is a value of `gradwire.v1.Dtype` and a row here; NumPy computes
with it if NumPy or ml_dtypes has a dtype of that name. For GPUs, it needs a row of
`CUDA_TYPES` and two conversions in the CUDA backend's kernels.
"""

from __future__ import annotations

import enum
import functools
import math
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt


class Dtype(enum.IntEnum):
    """An element type, with its number on the wire (`gradwire.v1.Dtype`).

    A row: that number; the dtype in which products of such operands are
    summed; the default dtype of sums over row blocks; the dtypes in which such
    operands may travel; whether TF32 is for products of them.
    """

    # 16-bit results lose far more in their own rounding than in a float32 sum.
    FLOAT16 = 1, "float32", "float32"
    BFLOAT16 = 2, "float32", "float32"
    FLOAT32 = 3, "float32", "float64", ("float16", "bfloat16"), True
    FLOAT64 = 4, "float64", "float64"

    numpy: np.dtype[Any]
    """The NumPy dtype, in native (little-endian) byte order."""

    itemsize: int
    """Bytes of one element."""

    label: str
    """The name that people use: ``float16``, ``bfloat16``, ..."""

    _sums_in: str
    _default_accumulator: str
    _travels_as: tuple[str, ...]

    has_tf32: bool
    """Whether products of such operands may use TF32, if the job allows it."""

    is_numpys_own: bool
    """Whether NumPy has it without ml_dtypes. NumPy writes the elements of
    others to files as raw bytes."""

    unit_roundoff: float
    """Largest relative error of one rounding to nearest: half the distance from
    1 to the next larger number."""

    smallest_subnormal: float
    """Distance of the numbers around 0."""

    smallest_normal: float
    """The smallest number above 0 with full precision."""

    largest: float
    """The largest finite number."""

    def __new__(
        cls,
        number: int,
        sums_in: str,
        default_accumulator: str,
        travels_as: tuple[str, ...] = (),
        has_tf32: bool = False,
    ) -> Dtype:
        """A row of the table."""
        self = int.__new__(cls, number)
        self._value_ = number
        self._sums_in = sums_in
        self._default_accumulator = default_accumulator
        self._travels_as = travels_as
        self.has_tf32 = has_tf32
        return self

    def __init__(self, *_: object) -> None:
        # Asked for with every message: not worth looking up each time.
        self.label = self.name.lower()
        self.numpy = np.dtype(getattr(ml_dtypes, self.label, self.label))
        self.itemsize = self.numpy.itemsize
        self.is_numpys_own = not hasattr(ml_dtypes, self.label)
        # NumPy's own knows no bfloat16, and ml_dtypes' has no types.
        limits: Any = ml_dtypes.finfo(self.numpy)  # type: ignore[no-untyped-call]
        self.unit_roundoff = float(limits.eps) / 2
        self.smallest_subnormal = float(limits.smallest_subnormal)
        self.smallest_normal = float(limits.smallest_normal)
        self.largest = float(limits.max)

    @property
    def proto_name(self) -> str:
        """The name of the enum's value in the contract: ``DTYPE_FLOAT32``."""
        return f"DTYPE_{self.name}"

    @functools.cached_property
    def sums_in(self) -> Dtype:
        """The dtype in which each product of such operands is computed and summed."""
        return Dtype.named(self._sums_in)

    @functools.cached_property
    def default_accumulator(self) -> Dtype:
        """The dtype in which dW of such operands is summed over row blocks by default.

        Not narrower than `sums_in`.
        """
        return Dtype.named(self._default_accumulator)

    @functools.cached_property
    def accumulators(self) -> tuple[Dtype, ...]:
        """The dtypes in which dW of such operands may be summed over row blocks."""
        least = self.sums_in.itemsize
        return tuple(each for each in ACCUMULATORS if each.itemsize >= least)

    @functools.cached_property
    def travels_as(self) -> tuple[Dtype, ...]:
        """Narrower dtypes to which a client may round such operands for the way."""
        return tuple(map(Dtype.named, self._travels_as))

    @property
    def is_narrow(self) -> bool:
        """Whether products of such operands are summed in a wider dtype."""
        return self.sums_in is not self

    @classmethod
    def of(cls, dtype: np.dtype[Any]) -> Dtype:
        """The element type of a NumPy dtype, in any byte order.

        Raises:
            KeyError: The dtype has no element type on the wire.
        """
        return _FROM_NUMPY[np.dtype(dtype).newbyteorder("=")]

    @classmethod
    def named(cls, label: str) -> Dtype:
        """The element type called `label`.

        Raises:
            KeyError: No element type has that name.
        """
        return _FROM_LABEL[label]


_FROM_NUMPY = {wire.numpy: wire for wire in Dtype}
_FROM_LABEL = {wire.label: wire for wire in Dtype}


def rounded(
    array: npt.NDArray[Any], dtype: Dtype, out: npt.NDArray[Any] | None = None
) -> npt.NDArray[Any]:
    """Round every element once, to nearest, ties to even.

    Overflow gives Inf; NumPy's error settings say whether it warns.

    Args:
        array: Elements of any dtype of the table, of any shape.
        dtype: The dtype of the result.
        out: Where the result goes: an array of that dtype and shape, which may not
            share memory with `array` unless it is `array`.

    Returns:
        `out`, or a new array; `array` itself if it has the dtype already.
    """
    if out is None:
        if array.dtype == dtype.numpy:
            return array
        out = np.empty(array.shape, dtype.numpy)
    if dtype.is_numpys_own or array.dtype != np.float64:
        np.copyto(out, array, casting="unsafe")
        return out
    with np.errstate(all="ignore"):
        # ml_dtypes rounds a float64 to float32 and then once more. Rounding to odd
        # in between loses nothing: S. Boldo and G. Melquiond, Emulation of FMA and
        # correctly rounded sums: proved algorithms using rounding to odd, IEEE
        # Transactions on Computers 57 (2008).
        rows = max(1, _ROUNDED_AT_ONCE // max(1, math.prod(array.shape[1:])))
        if array.ndim < 2:
            rows = _ROUNDED_AT_ONCE
        for first in range(0, len(array) if array.ndim else 1, rows):
            at: Any = slice(first, first + rows) if array.ndim else ...
            np.copyto(out[at], _to_odd(array[at]), casting="unsafe")
    return out


_ROUNDED_AT_ONCE = 1 << 16
"""Elements whose intermediate results are in memory at once."""


def _to_odd(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """float64 to float32, so that the last bit is set if anything was cut off."""
    narrow = np.asarray(array, np.float32)
    back = narrow.astype(np.float64)
    bits = np.asarray(narrow).view(np.uint32)
    # The neighbour of an even number on the side of the exact one is odd. Infinity
    # counts as even: its neighbour is the largest number.
    inexact = (back != array) & np.isfinite(array) & (bits % 2 == 0)
    outward = np.abs(array) > np.abs(back)
    step = np.where(outward, 1, -1).astype(np.int32).view(np.uint32)
    odd = np.where(inexact, bits + step, bits)
    return np.asarray(odd, np.uint32).view(np.float32)


ACCUMULATORS = tuple(wire for wire in Dtype if not wire.is_narrow)
"""The dtypes in which anything is summed, the narrowest first."""

WIRE_DTYPES = tuple(
    wire for wire in Dtype if any(wire in other.travels_as for other in Dtype)
)
"""The dtypes to which a client may round operands for the way."""
