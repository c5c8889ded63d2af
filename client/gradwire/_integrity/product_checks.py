"""Checks of a job's three products, a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from gradwire._api.types import Array, Doubles
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
        random_sums.mask(np.flatnonzero(~np.isfinite(squares)))
        self._projected = random_sums.project(b)
        self._group_norms = random_sums.group_norms(squares)

    def wrong(self, a: Array, c: Array, arithmetic: Arithmetic) -> Wrong | None:
        """Return the most wrong element in rows of C, or None.

        Args:
            a: The same rows of A, in the dtype of the sums.
            c: The received rows.
            arithmetic: How they were computed.
        """
        length = len(self._b)
        suspects = compare(
            c,
            a @ self._projected,
            self._random_sums,
            arithmetic,
            length,
            row_norms=row_norms(a),
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
        self._expected = np.zeros((rows, random_sums.sums))
        self._a_squares = np.zeros(rows, np.longdouble)
        self._b_squares: npt.NDArray[np.longdouble] | None = None
        self._longest = self._total = 0

    @property
    def no_numbers(self) -> npt.NDArray[np.intp]:
        """Columns of B with NaN or Inf."""
        if self._b_squares is None:
            return np.zeros(0, np.intp)
        return np.flatnonzero(~np.isfinite(self._b_squares))

    def add(self, a: Array, b: Array) -> None:
        """Add the next rows, in the dtype of the sums."""
        squares = column_squares(b)
        bad = ~np.isfinite(squares)
        if bad.any():
            # Only the sums of their own group become NaN or Inf.
            b = np.where(bad, 0, b)
        self._expected += a.T @ self._random_sums.project(b)
        self._a_squares += column_squares(a)
        self._b_squares = (
            squares if self._b_squares is None else self._b_squares + squares
        )
        # These rows were summed in the dtype of the sums, then in float64.
        self._longest = max(self._longest, len(a))
        self._total += len(a)

    def suspects(self, c: Array, arithmetic: Arithmetic) -> tuple[SuspectRows, int]:
        """Return the suspicious rows of C, and the length of this check's sums."""
        if self._b_squares is None:
            self._b_squares = np.zeros(c.shape[1], np.longdouble)
        dtype = arithmetic.operands.sums_in.numpy
        narrower = dtype != self._expected.dtype
        length = self._longest if narrower else self._total
        group_norms = self._random_sums.group_norms(self._b_squares)
        self._random_sums.mask(self.no_numbers)
        suspects = compare(
            c,
            self._expected.astype(dtype),
            self._random_sums,
            arithmetic,
            length,
            row_norms=np.sqrt(self._a_squares).astype(np.float64),
            group_norms=group_norms,
        )
        return suspects, length


class ColumnSums:
    """c = 1ᵀ B, summed over rows of B that come and go: cheap enough to do again.

    Args:
        columns: Of B.
    """

    def __init__(self, columns: int) -> None:
        self._exact, self._magnitude = np.zeros((2, 1, columns))
        self._rows = 0

    def add(self, b: Array) -> None:
        """Take the next rows."""
        wide = b.astype(np.float64)
        self._exact += wide.sum(axis=0)
        self._magnitude += np.abs(wide).sum(axis=0)
        self._rows += len(b)

    def wrong(self, c: Array, arithmetic: Arithmetic) -> Wrong | None:
        """The element that is most wrong, if any is."""
        return worst_element(
            np.zeros(1, np.intp),
            c[None],
            arithmetic,
            self._rows,
            exact=self._exact,
            magnitude=self._magnitude,
        )


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
