"""Detection of wrong rows of C = A B from random sums of its columns.

For a row and a group of columns s, the difference e = C s - A (B s) is the sum of the
elements' errors with random signs. It is compared with two thresholds:

- *Suspicious*: more than 4 standard deviations of the usual rounding error. Each of the
  l additions in a sum rounds independently (N. J. Higham and T. Mary, A new approach to
  probabilistic rounding error analysis, 2019), and the result's rounding is uniform, up
  to half a step. Suspicious rows are recomputed, and each element is compared with
  Higham's worst-case bound. So a correct result is never reported as wrong.
- *Certain*: more than 9 times the root of the sum of squares of the elements'
  worst-case bounds. The server does not know the signs. So, by Hoeffding's inequality
  (1963), correct elements exceed this with a probability of at most 2 exp(-81 / 2) <
  1e-17.

Both bound |A| |B| by the norms of A's row and B's columns (Cauchy-Schwarz inequality),
which needs no further product.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gradwire._api.types import Array, Doubles
from gradwire._integrity.non_finite import Misplaced
from gradwire._integrity.random_sums import RandomSums
from gradwire._integrity.rounding_error import Arithmetic, can_be_squared, gamma
from gradwire_protocol.dtypes import Dtype

SUSPICIOUS = 4.0
CERTAIN = 9.0


class SuspectRows(NamedTuple):
    """Suspicious rows of a product."""

    rows: npt.NDArray[np.intp]
    """Row indices, the most suspicious first."""

    certain: npt.NDArray[np.bool_]
    """Whether each row is certainly wrong."""

    excess: Doubles
    """Error of each row's worst sum, as a multiple of the threshold *certain*."""


def compare(
    result: Array,
    expected: Array,
    random_sums: RandomSums,
    arithmetic: Arithmetic,
    length: int,
    *,
    row_norms: Doubles,
    group_norms: npt.NDArray[np.longdouble],
) -> SuspectRows:
    """Return the rows of a product with unexpected sums.

    Args:
        result: Rows of C.
        expected: The sums A (B s) of the same rows.
        random_sums: The vectors s.
        arithmetic: How C was computed.
        length: Columns of A.
        row_norms: Norms of A's rows.
        group_norms: Norms of B's columns in each group: the root of the sum of squares.
    """
    u, size = arithmetic.operands.sums_in.unit_roundoff, random_sums.size
    finite = np.isfinite(result)
    unknown = None
    if not finite.all():
        # `non_finite` says whether they are right. The sums that they are part of
        # say nothing.
        unknown = random_sums.touched(~finite)
        result = np.where(finite, result, 0)
    wide = np.result_type(expected.dtype, np.float64)
    off = np.abs(random_sums.project(result).astype(wide) - expected)
    if unknown is not None:
        off[unknown] = 0
    scale = np.outer(row_norms.astype(wide), group_norms.astype(wide))
    # The sums of this check are rounded, too: l elements, and twice `size`.
    own = u * (math.sqrt(length) + 2 * math.sqrt(size))
    usual = (arithmetic.usual + own) * scale
    own = gamma(length + 2 * size + 2, u) * math.sqrt(size)
    worst = (CERTAIN * arithmetic.worst + own) * scale
    if arithmetic.rounding:
        rounded = arithmetic.rounding * np.sqrt(random_sums.sums_of_squares(result))
        usual = np.hypot(usual, rounded / math.sqrt(3))
        worst += CERTAIN * rounded
    tiny = 2 * (size + 1) * arithmetic.tiny
    usual, worst = SUSPICIOUS * usual + tiny, worst + tiny
    # NaN is suspicious, too.
    excess = np.where(off <= usual, 0, off / usual)
    excess = np.where(np.isnan(excess), np.inf, excess)
    if unknown is not None:
        excess[unknown] = 0
    excess = excess.max(axis=1, initial=0)
    rows = np.flatnonzero(excess > 0)
    rows = rows[np.argsort(-excess[rows], kind="stable")]
    off, worst, scale = off[rows], worst[rows], scale[rows]
    # Inf from finite operands is wrong if no sum can be that large. Otherwise it
    # proves nothing.
    finite = np.isfinite(off)
    impossible = ~finite & (4 * size * scale < arithmetic.largest)
    beyond = np.where(finite & (off > worst), off / worst, 0)
    certain = np.asarray(((beyond > 0) | impossible).any(axis=1))
    most = beyond.max(axis=1, initial=0).astype(np.float64)
    return SuspectRows(rows, certain, most)


class Wrong(NamedTuple):
    """An element with an error that rounding cannot explain."""

    row: int
    column: int
    value: float
    exact: float
    """NaN if operands with NaN or Inf make the element NaN or Inf."""
    bound: float
    """Inf if the element is NaN or Inf, and no sum can be as large."""

    @classmethod
    def misplaced(cls, found: Misplaced) -> Wrong:
        """An element that is finite and may not be, or the other way round."""
        exact, bound = (math.nan, 0.0) if found.swallowed else (0.0, math.inf)
        return cls(found.row, found.column, found.value, exact, bound)


def worst_element(
    rows: npt.NDArray[np.intp],
    result: Array,
    arithmetic: Arithmetic,
    length: int,
    *,
    exact: Doubles,
    magnitude: Doubles,
) -> Wrong | None:
    """Return the most wrong element of recomputed rows, or None.

    Args:
        rows: Row indices.
        result: These rows of C.
        arithmetic: How C was computed.
        length: Columns of A.
        exact: These rows of A B, in float64.
        magnitude: These rows of |A| |B|.
    """
    values = result.astype(np.float64)
    allowed = arithmetic.bound(exact, magnitude, length)
    excess = np.abs(values - exact) / allowed
    # NaN and Inf in the operands give NaN or Inf, and overflow gives Inf.
    may_overflow = np.abs(exact) + allowed >= arithmetic.largest
    may_overflow |= magnitude >= arithmetic.operands.sums_in.largest / 2
    wrong = np.where(
        np.isfinite(exact),
        np.where(np.isfinite(values), excess > 1, ~may_overflow),
        np.isfinite(values) & (arithmetic.operands is not Dtype.FLOAT64),
    )
    if not wrong.any():
        return None
    excess = np.where(wrong, np.where(np.isnan(excess), np.inf, excess), 0)
    at, column = np.unravel_index(int(np.argmax(excess)), excess.shape)
    return Wrong(
        int(rows[at]),
        int(column),
        float(values[at, column]),
        float(exact[at, column]),
        float(allowed[at, column]),
    )


def row_norms(matrix: Array) -> Doubles:
    """Return the norm of each row."""
    squares: Array = np.einsum("ij,ij->i", matrix, matrix)
    norms: Doubles = np.sqrt(squares).astype(np.float64)
    extreme = np.flatnonzero(~can_be_squared(norms, matrix.dtype))
    if extreme.size:
        wide = matrix[extreme].astype(np.longdouble)
        norms[extreme] = np.sqrt(np.square(wide).sum(axis=1))
    return norms


def column_squares(matrix: Array) -> npt.NDArray[np.longdouble]:
    """Return the sum of squares of each column."""
    summed: Array = np.einsum("ij,ij->j", matrix, matrix)
    squares: npt.NDArray[np.longdouble] = summed.astype(np.longdouble)
    extreme = np.flatnonzero(~can_be_squared(np.sqrt(squares), matrix.dtype))
    if extreme.size:
        wide = matrix[:, extreme].astype(np.longdouble)
        squares[extreme] = np.square(wide).sum(axis=0)
    return squares
