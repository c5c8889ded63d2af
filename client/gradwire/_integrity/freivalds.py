"""How far a product C = A B may be off, seen from random sums of its columns.

Two thresholds, both for the difference e = C s - A (B s) of one row and one
group of columns s, for which the elements' errors d_c are added up with random
signs:

- What is *suspicious*: more than 4 standard deviations of what rounding
  usually does, each of the l additions in a sum rounding by itself (N. J.
  Higham and T. Mary, A new approach to probabilistic rounding error analysis,
  2019) and the result by up to half a step, evenly. Rows beyond that are
  computed again, element by element, and held against Higham's worst case: no
  rounding gets past that, so that a right result is never called wrong.
- What is *certain*: more than 9 times the root of the sum of the squares of
  the elements' worst cases. By Hoeffding's inequality (1963) the signs, of
  which the server knows nothing, let right elements come there with a
  probability of at most 2 exp(-81 / 2) < 1e-17.

Both take |A| |B| for at most the product of the norms of A's row and B's
columns, as Cauchy and Schwarz have it, so that neither takes another product.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gradwire._api.types import Array, Doubles
from gradwire._integrity.random_sums import RandomSums
from gradwire._integrity.rounding_error import Arithmetic, can_be_squared, gamma
from gradwire_protocol.dtypes import Dtype

SUSPICIOUS = 4.0
CERTAIN = 9.0


class SuspectRows(NamedTuple):
    """Rows that are not as expected."""

    rows: npt.NDArray[np.intp]
    """Their numbers, the most suspicious first."""

    certain: npt.NDArray[np.bool_]
    """Of these: whether they cannot be right."""

    excess: Doubles
    """Of these: by how much the worst sum is off, in bounds of the certain."""


def compare(
    result: Array,
    expected: Array,
    random_sums: RandomSums,
    arithmetic: Arithmetic,
    length: int,
    *,
    row_norms: Doubles,
    group_norms: Doubles,
) -> SuspectRows:
    """Rows of a product whose sums are not those expected.

    Args:
        result: Rows of C.
        expected: The sums, from A (B s), of the same rows.
        random_sums: s.
        arithmetic: How C was computed.
        length: Columns of A.
        row_norms: Of A's rows.
        group_norms: Of B's columns, by group: the root of the sum of squares.
    """
    u, size = Dtype.of(expected.dtype).unit_roundoff, random_sums.size
    off = np.abs(random_sums.project(result).astype(np.float64) - expected)
    scale = np.outer(row_norms, group_norms)
    # This check's own sums round as well: of l elements, and twice of `size`.
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
    # What is no number is suspicious, too.
    excess = np.where(off <= usual, 0, off / usual)
    excess = np.where(np.isnan(excess), np.inf, excess).max(axis=1, initial=0)
    rows = np.flatnonzero(excess > 0)
    rows = rows[np.argsort(-excess[rows], kind="stable")]
    off, worst, scale = off[rows], worst[rows], scale[rows]
    # Inf from finite operands is wrong where no sum can have come so far, and
    # says nothing elsewhere.
    finite = np.isfinite(off)
    impossible = ~finite & (4 * size * scale < arithmetic.largest)
    beyond = np.where(finite & (off > worst), off / worst, 0)
    certain = np.asarray(((beyond > 0) | impossible).any(axis=1))
    return SuspectRows(rows, certain, beyond.max(axis=1, initial=0))


class Wrong(NamedTuple):
    """An element that no rounding explains."""

    row: int
    column: int
    value: float
    exact: float
    bound: float


def worst_element(
    rows: npt.NDArray[np.intp],
    result: Array,
    arithmetic: Arithmetic,
    length: int,
    *,
    exact: Doubles,
    magnitude: Doubles,
) -> Wrong | None:
    """Of rows that were computed again, the element that is most wrong, if any.

    Args:
        rows: Their numbers.
        result: These rows of C.
        arithmetic: How C was computed.
        length: Columns of A.
        exact: These rows of A B, in float64.
        magnitude: These rows of |A| |B|.
    """
    values = result.astype(np.float64)
    allowed = arithmetic.bound(exact, magnitude, length)
    excess = np.abs(values - exact) / allowed
    # NaN and Inf among the operands lead to the same, and too large is Inf.
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
    """Of each row: the root of the sum of the squares."""
    squares: Array = np.einsum("ij,ij->i", matrix, matrix)
    norms: Doubles = np.sqrt(squares).astype(np.float64)
    extreme = np.flatnonzero(~can_be_squared(norms, matrix.dtype))
    if extreme.size:
        wide = matrix[extreme].astype(np.longdouble)
        norms[extreme] = np.sqrt(np.square(wide).sum(axis=1))
    return norms


def column_squares(matrix: Array) -> npt.NDArray[np.longdouble]:
    """Of each column: the sum of the squares."""
    summed: Array = np.einsum("ij,ij->j", matrix, matrix)
    squares: npt.NDArray[np.longdouble] = summed.astype(np.longdouble)
    extreme = np.flatnonzero(~can_be_squared(np.sqrt(squares), matrix.dtype))
    if extreme.size:
        wide = matrix[:, extreme].astype(np.longdouble)
        squares[extreme] = np.square(wide).sum(axis=0)
    return squares
