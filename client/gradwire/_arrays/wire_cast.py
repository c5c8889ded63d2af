"""float32 operands that travel in 16 bits: rounded as they are sent."""

from __future__ import annotations

import numpy as np

from gradwire._api.errors import InputError
from gradwire._api.types import Array
from gradwire_protocol.dtypes import WIRE_DTYPES, Dtype


class Rounding:
    """Rounds an operand's elements to nearest, ties to even.

    NaN and Inf stay what they are. A finite element that would become Inf is
    an error: whoever holds float32 did not ask for infinities.

    Args:
        dtype: float16 or bfloat16.
        name: What to call the operand in errors.
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

    def rounded(self, part: Array, index: int) -> Array:
        """These elements in 16 bits.

        Args:
            part: float32, in C order, of any shape.
            index: Of its first element within the operand.

        Raises:
            InputError: One is finite and too large.
        """
        # A caller's own error settings are about the caller's arithmetic.
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
        other = (
            f'wire_dtype="{wider[0]}", or leave it out' if wider else "no wire_dtype"
        )
        raise InputError(
            f"{self._name} has {part[found[0]]:g} in row {self._first_row + row},"
            f" column {column}, and {self._dtype.label} ends at {largest:g}: use"
            f" {other}"
        )


def overflows_from(dtype: Dtype) -> float:
    """The least magnitude that rounds to Inf: half a step past the largest."""
    # The largest number is (2 - 2u) 2^e, and the step up to it is 2u 2^e.
    u = dtype.unit_roundoff
    return dtype.largest * (1 + u / (2 - 2 * u))
