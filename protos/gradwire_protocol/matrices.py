"""The matrices of a job, in one table: shapes, and which are needed for which.

A further result is a row of this table: whatever moves, checks or counts matrices
goes by it.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Iterable

_TABLE: dict[str, tuple[str, str, tuple[str, ...]]] = {
    # name: rows, columns, and for a result the operands that it is computed from
    "X": ("m", "n", ()),
    "W": ("n", "k", ()),
    "DY": ("m", "k", ()),
    "Y": ("m", "k", ("X", "W")),
    "DX": ("m", "n", ("DY", "W")),
    "DW": ("n", "k", ("X", "DY")),
    "DW_SUM": ("n", "k", ()),
}


class Matrix(enum.IntEnum):
    """A matrix of a job, with its number on the wire (`gradwire.v1.Matrix`).

    Results with m rows are computed row block by row block; the others are summed
    over row blocks (`is_sum`).
    """

    X = 1
    W = 2
    DY = 3
    Y = 4
    DX = 5
    DW = 6
    DW_SUM = 7
    """DW over a job's first rows, not rounded: what checkpoints are made of."""

    label: str
    """The name that people and fields use: ``x``, ``w``, ``dy``, ..."""
    row_wise: bool
    """Whether it has the job's m rows."""

    def __init__(self, _: int) -> None:
        # Asked for with every message: not worth computing each time.
        self.label = self.name.lower()
        self._rows, self._columns, self._needs = _TABLE[self.name]
        self.row_wise = self._rows == "m"

    @property
    def needs(self) -> tuple[Matrix, ...]:
        """The operands of which a result is the product; none for operands."""
        return tuple(Matrix[name] for name in self._needs)

    @property
    def is_sum(self) -> bool:
        """Whether it is a result that is summed over row blocks."""
        return bool(self._needs) and not self.row_wise

    def row_length(self, n: int, k: int) -> int:
        """Columns of the matrix, in elements."""
        return n if self._columns == "n" else k

    def shape(self, m: int, n: int, k: int) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return m if self.row_wise else n, self.row_length(n, k)


OPERANDS = (Matrix.X, Matrix.W, Matrix.DY)
RESULTS = tuple(matrix for matrix in Matrix if matrix.needs)

ROW_OPERANDS = tuple(matrix for matrix in OPERANDS if matrix.row_wise)
"""Operands with m rows, in the order in which a tie between them is broken."""

ROW_RESULTS = tuple(matrix for matrix in RESULTS if matrix.row_wise)
"""Results with m rows, in the order in which a row block's leave."""

SUMS = tuple(matrix for matrix in RESULTS if matrix.is_sum)
"""Results that are summed over row blocks."""


def operands_for(results: Iterable[Matrix]) -> tuple[Matrix, ...]:
    """The operands that the wanted results need, in the order X, W, dY."""
    return _operands_for(frozenset(results))


@functools.cache
def _operands_for(results: frozenset[Matrix]) -> tuple[Matrix, ...]:
    needed = {operand for result in results for operand in result.needs}
    return tuple(operand for operand in OPERANDS if operand in needed)
