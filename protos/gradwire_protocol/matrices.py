"""The matrices of a job: which are needed for which, and their shapes."""

from __future__ import annotations

import enum
import functools
from collections.abc import Iterable


class Matrix(enum.IntEnum):
    """A matrix of a job, with its number on the wire (`gradwire.v1.Matrix`)."""

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

    def __init__(self, _: int) -> None:
        # Asked for with every message: not worth computing each time.
        self.label = self.name.lower()

    def row_length(self, n: int, k: int) -> int:
        """Columns of the matrix, in elements."""
        return n if self in _N_COLUMNS else k


_N_COLUMNS = frozenset({Matrix.X, Matrix.DX})

OPERANDS = (Matrix.X, Matrix.W, Matrix.DY)
RESULTS = (Matrix.Y, Matrix.DX, Matrix.DW)

ROW_OPERANDS = (Matrix.X, Matrix.DY)
"""Operands with m rows, in the order in which a tie between them is broken."""

ROW_RESULTS = (Matrix.Y, Matrix.DX)
"""Results with m rows, in the order in which a row block's leave."""

NEEDS: dict[Matrix, tuple[Matrix, Matrix]] = {
    Matrix.Y: (Matrix.X, Matrix.W),
    Matrix.DX: (Matrix.DY, Matrix.W),
    Matrix.DW: (Matrix.X, Matrix.DY),
}
"""The two operands of which each result is the product."""


def operands_for(results: Iterable[Matrix]) -> tuple[Matrix, ...]:
    """The operands that the wanted results need, in the order X, W, dY."""
    return _operands_for(frozenset(results))


@functools.cache
def _operands_for(results: frozenset[Matrix]) -> tuple[Matrix, ...]:
    needed = {operand for result in results for operand in NEEDS[result]}
    return tuple(operand for operand in OPERANDS if operand in needed)
