"""Sums of a matrix's columns with random signs: the vectors of Freivalds' check.

R. Freivalds, Probabilistic machines can use less running time (IFIP 1977):
C = A B is checked by C s = A (B s) for random s, at the price of three
products of a matrix and a vector. Here s takes one group of columns at a time
(M. Charikar, K. Chen and M. Farach-Colton, Finding frequent items in data
streams, 2002, count columns in the same way), so that what rounding does to the
other groups does not hide an error in this one.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from gradwire._api.types import Array, Doubles
from gradwire._integrity.rounding_error import can_be_squared

_DENSE = 128
"""Most sums that are computed as one product with a matrix of signs: faster
than picking columns as long as there are few."""


class RandomSums:
    """Random groups and signs for so many columns.

    Args:
        columns: How many.
        rounds: Independent ones.
        groups: Of each round.
        length: Length of the sums of which the columns' elements consist.
            Where it is small, there are more groups: the sums cost no more
            than the columns themselves do.
        dtype: In which sums are computed.
        rng: Where the random numbers come from: such as the server cannot
            foresee.

    Attributes:
        sums: How many there are, of all rounds together.
        size: Columns of the largest group.
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
        self.sums = groups * rounds
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
        """Treat these columns as zeros: their elements are no numbers."""
        self._masked = columns if columns.size else None

    def project(self, matrix: Array) -> Array:
        """The sums of each row's elements, with their signs."""
        matrix = self._usable(matrix)
        if self._matrix is not None:
            return np.asarray(matrix @ self._matrix)
        return self._added(matrix, signed=True)

    def sums_of_squares(self, matrix: Array) -> Doubles:
        """The sums of the squares of each row's elements."""
        usable = self._usable(matrix)
        sums = self._squared(usable)
        known = can_be_squared(np.sqrt(sums), self._dtype)
        extreme = np.flatnonzero(~known.all(axis=1))
        if extreme.size:
            sums[extreme] = self._squared(usable[extreme].astype(np.float64))
        return sums

    def group_norms(self, values: npt.NDArray[np.longdouble]) -> Doubles:
        """The root of the sum of each group's values, one a column."""
        if self._masked is not None:
            values = values.copy()
            values[self._masked] = 0
        if not values.size:
            return np.zeros(self.sums)
        sums = [np.add.reduceat(values[order], self._starts) for order in self._orders]
        return np.asarray(np.sqrt(np.concatenate(sums)), np.float64)

    def _usable(self, matrix: Array) -> Array:
        matrix = matrix.astype(self._dtype, copy=False)
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
