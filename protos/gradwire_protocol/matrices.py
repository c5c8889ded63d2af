"""Table of a job's matrices: their shapes, and the operands of each result.

To add a result, add a row: all code that moves, checks or counts matrices uses this
table.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Iterable

_TABLE: dict[str, tuple[str, str, tuple[str, ...]]] = {
    # name: rows, columns, and the operands of a result
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

    Results with m rows are computed row block by row block. Other results are
    summed over row blocks (`is_sum`).
    """

    X = 1
    W = 2
    DY = 3
    Y = 4
    DX = 5
    DW = 6
    DW_SUM = 7
    """The unrounded sum of dW over a job's first rows, as in checkpoints."""

    label: str
    """Name in messages and fields: ``x``, ``w``, ``dy``, ..."""
    row_wise: bool
    """Whether the matrix has the job's m rows."""

    def __init__(self, _: int) -> None:
        # Computed once: used for every message.
        self.label = self.name.lower()
        self._rows, self._columns, self._needs = _TABLE[self.name]
        self.row_wise = self._rows == "m"

    @property
    def needs(self) -> tuple[Matrix, ...]:
        """The operands of a result; empty for operands."""
        return tuple(Matrix[name] for name in self._needs)

    @property
    def is_sum(self) -> bool:
        """Whether the matrix is a result summed over row blocks."""
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
"""Operands with m rows, in the order that breaks ties."""

ROW_RESULTS = tuple(matrix for matrix in RESULTS if matrix.row_wise)
"""Results with m rows, in the order of sending for each row block."""

SUMS = tuple(matrix for matrix in RESULTS if matrix.is_sum)
"""Results summed over row blocks."""


def operands_for(results: Iterable[Matrix]) -> tuple[Matrix, ...]:
    """The operands of the wanted results, in the order X, W, dY."""
    return _operands_for(frozenset(results))


@functools.cache
def _operands_for(results: frozenset[Matrix]) -> tuple[Matrix, ...]:
    needed = {operand for result in results for operand in result.needs}
    return tuple(operand for operand in OPERANDS if operand in needed)
