"""Rounding of float32 operands to 16 bits while they are sent."""

from __future__ import annotations

import numpy as np

from gradwire._api.errors import InputError
from gradwire._api.types import Array
from gradwire_protocol.dtypes import WIRE_DTYPES, Dtype


class Rounding:
    """Rounds an operand's elements to nearest, ties to even.

    NaN and Inf are unchanged. A finite element that would become Inf is an error.

    Args:
        dtype: float16 or bfloat16.
        name: Name of the operand, for errors.
        columns: Elements of a row.
        first_row: Number of the operand's first row, for errors.
    """

    __slots__ = ("_columns", "_dtype", "_first_row", "_limit", "_name")

    def __init__(
        self, dtype: Dtype, name: str, columns: int, first_row: int = 0
    ) -> None:
        self._dtype = dtype
        self._name = name
        self._columns = columns
        self._first_row = first_row
        self._limit = overflows_from(dtype)

    def behind(self, rows: int) -> Rounding:
        """Return the rounding of the operand without its first rows."""
        first_row = self._first_row + rows
        return Rounding(self._dtype, self._name, self._columns, first_row)

    def rounded(self, part: Array, index: int) -> Array:
        """Return elements in 16 bits.

        Args:
            part: float32, in C order, of any shape.
            index: Index of the first element within the operand.

        Raises:
            InputError: A finite element is too large.
        """
        # The caller's NumPy error settings are not for this computation.
        with np.errstate(all="ignore"):
            if part.size and not (
                part.min() > -self._limit and part.max() < self._limit
            ):
                self._require_finite(part.reshape(-1), index)
            return part.astype(self._dtype.numpy)

    def _require_finite(self, part: Array, index: int) -> None:
        magnitude = np.abs(part)
        found = np.flatnonzero(np.isfinite(magnitude) & (magnitude >= self._limit))
        if not found.size:
            return
        row, column = divmod(index + int(found[0]), self._columns)
        largest = self._dtype.largest
        wider = [each.label for each in WIRE_DTYPES if each.largest > 2 * largest]
        other = f'wire_dtype="{wider[0]}", or omit it' if wider else "no wire_dtype"
        raise InputError(
            f"{self._name} has {part[found[0]]:g} in row {self._first_row + row},"
            f" column {column}: {self._dtype.label} has at most {largest:g}; use"
            f" {other}"
        )


def overflows_from(dtype: Dtype) -> float:
    """Return the smallest magnitude that rounds to Inf."""
    # It is half a step above the largest number, which is (2 - 2u) 2^e. The step is
    # 2u 2^e.
    u = dtype.unit_roundoff
    return dtype.largest * (1 + u / (2 - 2 * u))
