"""Checks of a job's three products, a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from gradwire._api.types import Array, Doubles
from gradwire._integrity import non_finite
from gradwire._integrity.freivalds import (
    SuspectRows,
    Wrong,
    column_squares,
    compare,
    row_norms,
    worst_element,
)
from gradwire._integrity.random_sums import RandomSums
from gradwire._integrity.rounding_error import Arithmetic
from gradwire_protocol.dtypes import Dtype

RECHECKED = 16
"""Rows recomputed at once, and most suspicious rows recomputed."""

_PANEL = 512
"""Columns recomputed at once."""

Again: TypeAlias = Callable[[npt.NDArray[np.intp]], tuple[Doubles, Doubles]]
"""Recomputes rows of A B and of |A| |B| in float64."""


class RowProduct:
    """Checks C = A B for a fixed B, a few rows of A and C at a time.

    Args:
        b: B, in the dtype of the sums.
        random_sums: Random sums of B's columns.
    """

    def __init__(self, b: Array, random_sums: RandomSums) -> None:
        self._b = b
        self._random_sums = random_sums
        squares = column_squares(b)
        self._no_numbers = _no_numbers(b, squares)
        self._norms = np.sqrt(squares).astype(np.float64)
        random_sums.mask(np.flatnonzero(self._no_numbers))
        self._projected = random_sums.project(b)
        self._group_norms = random_sums.group_norms(squares)

    def wrong(self, a: Array, c: Array, arithmetic: Arithmetic) -> Wrong | None:
        """Return the most wrong element in rows of C, or None.

        Args:
            a: The same rows of A, in the dtype of the sums.
            c: The received rows.
            arithmetic: How they were computed.
        """
        length, norms = len(self._b), row_norms(a)
        misplaced = non_finite.find(
            c,
            rows=_no_numbers(a.T, norms),
            columns=self._no_numbers,
            row_norms=norms,
            column_norms=self._norms,
            largest=arithmetic.largest,
        )
        if misplaced is not None:
            return Wrong.misplaced(misplaced)
        suspects = compare(
            c,
            a @ self._projected,
            self._random_sums,
            arithmetic,
            length,
            row_norms=norms,
            group_norms=self._group_norms,
        )
        return settle(
            suspects, c, arithmetic, length, lambda rows: self._again(a[rows])
        )

    def _again(self, a: Array) -> tuple[Doubles, Doubles]:
        a = a.astype(np.float64)
        exact, magnitude = [], []
        for first in range(0, self._b.shape[1], _PANEL):
            b = self._b[:, first : first + _PANEL].astype(np.float64)
            exact.append(a @ b)
            magnitude.append(np.abs(a) @ np.abs(b))
        return np.concatenate(exact, axis=1), np.concatenate(magnitude, axis=1)


class SumProduct:
    """Checks C = Aᵀ B, summed over rows of A and B, a few rows at a time.

    Args:
        rows: Rows of C.
        random_sums: Random sums of B's columns.
    """

    def __init__(self, rows: int, random_sums: RandomSums) -> None:
        self._random_sums = random_sums
        self._expected = np.zeros((rows, random_sums.sums), random_sums.wider)
        self._a_squares = np.zeros(rows, np.longdouble)
        self._b_squares = np.zeros(random_sums.columns, np.longdouble)
        self._rows_without_numbers = np.zeros(rows, np.bool_)
        self._columns_without_numbers = np.zeros(random_sums.columns, np.bool_)
        self._longest = self._total = 0

    @property
    def no_numbers(self) -> npt.NDArray[np.intp]:
        """Columns of B with NaN or Inf."""
        return np.flatnonzero(self._columns_without_numbers)

    def add(self, a: Array, b: Array) -> None:
        """Add the next rows, in the dtype of the sums."""
        a, a_squares = self._numbers(a, self._rows_without_numbers)
        b, b_squares = self._numbers(b, self._columns_without_numbers)
        self._expected += self._product(a, b, a_squares, b_squares)
        self._a_squares += a_squares
        self._b_squares += b_squares
        # These rows were summed in the dtype of the sums, then in a wider one.
        self._longest = max(self._longest, len(a))
        self._total += len(a)

    @staticmethod
    def _numbers(
        matrix: Array, without: npt.NDArray[np.bool_]
    ) -> tuple[Array, npt.NDArray[np.longdouble]]:
        """Replace columns that have NaN or Inf by zeros, and flag them in `without`."""
        squares = column_squares(matrix)
        bad = _no_numbers(matrix, squares)
        if bad.any():
            without |= bad
            matrix, squares = np.where(bad, 0, matrix), np.where(bad, 0, squares)
        return matrix, squares

    def _product(
        self,
        a: Array,
        b: Array,
        a_squares: npt.NDArray[np.longdouble],
        b_squares: npt.NDArray[np.longdouble],
    ) -> Array:
        """Aᵀ (B s), in the wider dtype if a sum might overflow."""
        most = np.sqrt(a_squares.max(initial=0)) * np.sqrt(b_squares.max(initial=0))
        largest = Dtype.of(a.dtype).largest
        if most * self._random_sums.size < largest / 2:
            return np.asarray(a.T @ self._random_sums.project(b))
        wide = self._expected.dtype
        signed = self._random_sums.project(b.astype(wide), wide)
        return np.asarray(a.T.astype(wide) @ signed)

    def misplaced(self, c: Array, arithmetic: Arithmetic) -> Wrong | None:
        """Return an element of C that is wrongly NaN, Inf or finite, or None."""
        found = non_finite.find(
            c,
            rows=self._rows_without_numbers,
            columns=self._columns_without_numbers,
            row_norms=np.sqrt(self._a_squares).astype(np.float64),
            column_norms=np.sqrt(self._b_squares).astype(np.float64),
            largest=arithmetic.largest,
        )
        return None if found is None else Wrong.misplaced(found)

    def suspects(self, c: Array, arithmetic: Arithmetic) -> tuple[SuspectRows, int]:
        """Return the suspicious rows of C, and the length of this check's sums."""
        dtype = arithmetic.operands.sums_in.numpy
        narrower = dtype != self._expected.dtype
        length = self._longest if narrower else self._total
        suspects = compare(
            c,
            self._expected,
            self._random_sums,
            arithmetic,
            length,
            row_norms=np.sqrt(self._a_squares).astype(np.float64),
            group_norms=self._random_sums.group_norms(self._b_squares),
        )
        return suspects, length


class ColumnSums:
    """c = 1ᵀ B, summed over rows of B that come and go: cheap enough to do again.

    Args:
        columns: Of B.
    """

    def __init__(self, columns: int) -> None:
        self._exact, self._magnitude = np.zeros((2, 1, columns))
        self._without_numbers = np.zeros(columns, np.bool_)
        self._rows = 0

    def add(self, b: Array) -> None:
        """Take the next rows."""
        wide = b.astype(np.float64)
        self._exact += wide.sum(axis=0)
        self._magnitude += np.abs(wide).sum(axis=0)
        self._without_numbers |= _no_numbers(wide, self._magnitude[0])
        self._rows += len(b)

    def wrong(self, c: Array, arithmetic: Arithmetic) -> Wrong | None:
        """The element that is most wrong, if any is."""
        found = non_finite.find(
            c[None],
            rows=np.zeros(1, np.bool_),
            columns=self._without_numbers,
            row_norms=np.ones(1),
            column_norms=self._magnitude[0],
            largest=arithmetic.largest,
        )
        if found is not None:
            return Wrong.misplaced(found)
        return worst_element(
            np.zeros(1, np.intp),
            c[None],
            arithmetic,
            self._rows,
            exact=self._exact,
            magnitude=self._magnitude,
        )


def _no_numbers(
    matrix: Array, sizes: npt.NDArray[np.floating[Any]]
) -> npt.NDArray[np.bool_]:
    """Which columns of a matrix have NaN or Inf.

    Args:
        matrix: The matrix.
        sizes: Norms of the columns, or their squares: finite where no element is NaN
            or Inf, unless they overflowed.
    """
    bad = np.asarray(~np.isfinite(sizes))
    if bad.any():
        bad[bad] = ~np.isfinite(matrix[:, bad]).all(axis=0)
    return bad


def settle(
    suspects: SuspectRows, c: Array, arithmetic: Arithmetic, length: int, again: Again
) -> Wrong | None:
    """Recompute all certainly wrong rows, and a few suspicious ones.

    Returns:
        The most wrong element of the first wrong rows, or None.
    """
    for rows in _batches(suspects):
        exact, magnitude = again(rows)
        wrong = worst_element(
            rows, c[rows], arithmetic, length, exact=exact, magnitude=magnitude
        )
        if wrong is not None:
            return wrong
    return None


def _batches(suspects: SuspectRows) -> Iterator[npt.NDArray[np.intp]]:
    certain = suspects.rows[suspects.certain]
    for first in range(0, len(certain), RECHECKED):
        yield certain[first : first + RECHECKED]
    merely = suspects.rows[~suspects.certain][:RECHECKED]
    if len(certain) < RECHECKED and merely.size:
        yield merely


def summed_again(
    parts: Iterable[tuple[Array, Array]], rows: npt.NDArray[np.intp], columns: int
) -> tuple[Doubles, Doubles]:
    """Return rows of Aᵀ B and of |A|ᵀ |B|, from rows of A and B."""
    exact, magnitude = np.zeros((2, len(rows), columns))
    for a, b in parts:
        a64, b64 = a[:, rows].astype(np.float64), b.astype(np.float64)
        exact += a64.T @ b64
        magnitude += np.abs(a64).T @ np.abs(b64)
    return exact, magnitude
