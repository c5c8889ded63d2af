"""NaN and Inf in a product: where they must be, and where they may be.

An element of C = A B is NaN or Inf if its row of A or its column of B has NaN or Inf:
IEEE 754 gives no finite product with either (Inf times 0 is NaN), and no finite sum.
Elsewhere it may be Inf, or NaN from two of them, only if a sum overflows, and no sum
exceeds the product of the norms of the row and of the column (Cauchy and Schwarz).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gradwire._api.types import Array, Doubles

Flags = npt.NDArray[np.bool_]


class Misplaced(NamedTuple):
    """An element that is finite and may not be, or the other way round."""

    row: int
    column: int
    value: float
    swallowed: bool
    """Whether NaN or Inf among the operands is lost. Otherwise the element is NaN or
    Inf for no reason."""


def find(
    c: Array,
    *,
    rows: Flags,
    columns: Flags,
    row_norms: Doubles,
    column_norms: Doubles,
    largest: float,
) -> Misplaced | None:
    """Find the first misplaced element of a product C = A B.

    Args:
        c: Rows of C.
        rows: Which rows of A have NaN or Inf.
        columns: Which columns of B have NaN or Inf.
        row_norms: Of the rows of A; those with NaN or Inf do not matter.
        column_norms: Of the columns of B; the same.
        largest: The largest finite element or sum.
    """
    finite = np.isfinite(c)
    if finite.all() and not rows.any() and not columns.any():
        return None
    must = rows[:, None] | columns[None, :]
    # Twice, for rounding.
    cannot = ~must & (2 * np.outer(row_norms, column_norms) < largest)
    wrong = np.where(finite, must, cannot)
    if not wrong.any():
        return None
    row, column = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
    return Misplaced(
        int(row), int(column), float(c[row, column]), bool(finite[row, column])
    )
