"""Sums of a matrix's columns with random signs: the vectors of Freivalds' check.

R. Freivalds, Probabilistic machines can use less running time (IFIP 1977):
C = A B is checked by C s = A (B s) for random s, with three products of a matrix and a
vector. Here, each s covers one group of columns (as in M. Charikar, K. Chen and M.
Farach-Colton, Finding frequent items in data streams, 2002). So the rounding errors of
other groups do not hide an error in this group.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from gradwire._api.types import Array, Doubles
from gradwire._integrity.rounding_error import can_be_squared

_DENSE = 128
"""Largest number of sums computed as one product with a matrix of signs. For few sums,
that is faster than selecting columns."""


class RandomSums:
    """Random groups and signs of a matrix's columns.

    Args:
        columns: Number of columns.
        rounds: Number of independent rounds.
        groups: Number of groups in each round.
        length: Number of terms in each element of the matrix. If it is small, there
            are more groups, because the sums cost no more than the matrix itself.
        dtype: Dtype of the sums.
        rng: Source of random numbers that the server cannot predict.

    Attributes:
        sums: Number of sums in all rounds.
        columns: How many columns there are.
        wider: A dtype with more range than that of the sums, where there is one.
        size: Number of columns in the largest group.
    """

    def __init__(
        self,
        columns: int,
        rounds: int,
        groups: int,
        length: int,
        *,
        dtype: np.dtype[np.generic],
        rng: np.random.Generator,
    ) -> None:
        groups = max(groups, math.ceil(4 * columns / max(1, length)))
        groups = max(1, min(columns, groups))
        self.columns = columns
        self.sums = groups * rounds
        self.wider = np.dtype(np.longdouble if dtype == np.float64 else np.float64)
        self.size = math.ceil(columns / groups)
        self._dtype = dtype
        self._starts = np.arange(groups) * columns // groups
        self._orders = [rng.permutation(columns) for _ in range(rounds)]
        self._signs = rng.choice(np.array([-1, 1]), (rounds, columns))
        self._masked: npt.NDArray[np.intp] | None = None
        self._matrix: Array | None = None
        self._members: Array | None = None
        if self.sums <= _DENSE:
            self._matrix = np.zeros((columns, self.sums), dtype)
            sizes = np.diff(self._starts, append=columns)
            group = np.repeat(np.arange(groups), sizes)
            for number, order in enumerate(self._orders):
                signs = self._signs[number, order]
                self._matrix[order, number * groups + group] = signs
            self._members = np.abs(self._matrix)

    def mask(self, columns: npt.NDArray[np.intp]) -> None:
        """Treat columns as zeros, because they have NaN or Inf."""
        self._masked = columns if columns.size else None

    def project(
        self, matrix: Array, dtype: np.dtype[np.generic] | None = None
    ) -> Array:
        """Return the signed sums of each row's elements.

        Args:
            matrix: The rows.
            dtype: Dtype in which the sums are computed; None: that of all others.
        """
        matrix = self._usable(matrix, dtype)
        if self._matrix is not None:
            return np.asarray(matrix @ self._matrix.astype(matrix.dtype, copy=False))
        return self._added(matrix, signed=True)

    def sums_of_squares(self, matrix: Array) -> Doubles:
        """Return the sums of squares of each row."""
        usable = self._usable(matrix)
        sums = self._squared(usable)
        known = can_be_squared(np.sqrt(sums), self._dtype)
        extreme = np.flatnonzero(~known.all(axis=1))
        if extreme.size:
            sums[extreme] = self._squared(usable[extreme].astype(np.float64))
        return sums

    def touched(self, flags: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Return which sums of each row have a flagged element."""
        counts = self._usable(flags)
        if self._members is not None:
            return np.asarray(counts @ self._members > 0)
        return np.asarray(self._added(counts, signed=False) > 0)

    def group_norms(
        self, values: npt.NDArray[np.longdouble]
    ) -> npt.NDArray[np.longdouble]:
        """Return the root of each group's sum of `values`, one value per column."""
        if self._masked is not None:
            values = values.copy()
            values[self._masked] = 0
        if not values.size:
            return np.zeros(self.sums, np.longdouble)
        sums = [np.add.reduceat(values[order], self._starts) for order in self._orders]
        return np.asarray(np.sqrt(np.concatenate(sums)))

    def _usable(
        self, matrix: Array, dtype: np.dtype[np.generic] | None = None
    ) -> Array:
        matrix = matrix.astype(dtype or self._dtype, copy=False)
        if self._masked is not None:
            matrix = matrix.copy()
            matrix[:, self._masked] = 0
        return matrix

    def _squared(self, matrix: Array) -> Doubles:
        squares = np.square(matrix)
        if self._members is not None:
            return np.asarray(squares @ self._members, np.float64)
        return self._added(squares, signed=False).astype(np.float64)

    def _added(self, matrix: Array, *, signed: bool) -> Array:
        if not matrix.shape[1]:
            return np.zeros((len(matrix), self.sums), matrix.dtype)
        parts = []
        for number, order in enumerate(self._orders):
            taken = matrix[:, order]
            if signed:
                taken *= self._signs[number, order].astype(matrix.dtype)
            parts.append(np.add.reduceat(taken, self._starts, axis=1))
        return np.concatenate(parts, axis=1)
