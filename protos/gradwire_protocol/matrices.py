"""Table of a job's matrices: their shapes, and what each result is computed from.

All code that moves, checks or counts matrices uses this table. What else a further
result needs is in docs/architecture.md.
"""

from __future__ import annotations

import enum
import functools
import math
from collections.abc import Iterable
from typing import NamedTuple


class _Row(NamedTuple):
    rows: str
    columns: str
    needs: tuple[str, ...] = ()
    """The operands of a result."""
    partial: str = ""
    """The unrounded partial sum of a result that is summed over row blocks."""

    @property
    def sizes(self) -> set[str]:
        """The sizes that give the matrix its shape."""
        return {self.rows, self.columns}


_TABLE = {
    "X": _Row("m", "n"),
    "W": _Row("n", "k"),
    "DY": _Row("m", "k"),
    "Y": _Row("m", "k", ("X", "W")),
    "DX": _Row("m", "n", ("DY", "W")),
    "DW": _Row("n", "k", ("X", "DY"), "DW_SUM"),
    "DW_SUM": _Row("n", "k"),
    "DB": _Row("1", "k", ("DY",), "DB_SUM"),
    "DB_SUM": _Row("1", "k"),
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
    DB = 8
    DB_SUM = 9

    label: str
    """Name in messages and fields: ``x``, ``w``, ``dy``, ..."""
    row_wise: bool
    """Whether the matrix has the job's m rows."""
    is_sum: bool
    """Whether the matrix is a result summed over row blocks."""
    is_vector: bool
    """Whether the matrix has one row in any job."""

    def __init__(self, _: int) -> None:
        # Computed once: used for every message.
        row = _TABLE[self.name]
        self.label = self.name.lower()
        self._rows, self._columns, self._needs, self._partial = row
        self.row_wise = self._rows == "m"
        self.is_sum = bool(self._partial)
        self.is_vector = self._rows == "1"
        of_operands = (_TABLE[name].sizes for name in self._needs)
        self._terms = set().union(*of_operands) - {"m"}

    @functools.cached_property
    def needs(self) -> tuple[Matrix, ...]:
        """The operands of a result; empty for operands."""
        return tuple(Matrix[name] for name in self._needs)

    @functools.cached_property
    def partial(self) -> Matrix:
        """The unrounded sum over a job's first rows, for a result with `is_sum`."""
        return Matrix[self._partial]

    def row_length(self, n: int, k: int) -> int:
        """Columns of the matrix, in elements."""
        return n if self._columns == "n" else k

    def shape(self, m: int, n: int, k: int) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        rows = m if self.row_wise else 1 if self.is_vector else n
        return rows, self.row_length(n, k)

    def row_operations(self, n: int, k: int) -> int:
        """Multiplications and additions of a result for each of the job's rows."""
        sizes = {"n": n, "k": k}
        return 2 * math.prod(sizes[name] for name in self._terms)


OPERANDS = (Matrix.X, Matrix.W, Matrix.DY)
RESULTS = tuple(matrix for matrix in Matrix if matrix.needs)

DEFAULT_RESULTS = (Matrix.Y, Matrix.DX, Matrix.DW)
"""The results that callers get who name none."""

ROW_OPERANDS = tuple(matrix for matrix in OPERANDS if matrix.row_wise)
"""Operands with m rows, in the order that breaks ties."""

ROW_RESULTS = tuple(matrix for matrix in RESULTS if matrix.row_wise)
"""Results with m rows, in the order of sending for each row block."""

SUMS = tuple(matrix for matrix in RESULTS if matrix.is_sum)
"""Results summed over row blocks, in the order of sending."""

PARTIAL_SUMS = {result.partial: result for result in SUMS}
"""The unrounded partial sums in checkpoints, and what each is a sum of."""


def operands_for(results: Iterable[Matrix]) -> tuple[Matrix, ...]:
    """The operands of the wanted results, in the order X, W, dY."""
    return _operands_for(frozenset(results))


@functools.cache
def _operands_for(results: frozenset[Matrix]) -> tuple[Matrix, ...]:
    needed = {operand for result in results for operand in result.needs}
    return tuple(operand for operand in OPERANDS if operand in needed)
