"""Where received bytes belong."""

from __future__ import annotations

from dataclasses import dataclass

from gradwire_protocol.matrices import Matrix


@dataclass(frozen=True, slots=True)
class Span:
    """A place in one operand of one row block, or in a matrix without row blocks."""

    matrix: Matrix
    block: int
    """Number of the row block; 0 for W and partial sums."""
    offset: int
    """Byte offset in the matrix, or in the block's operand."""

    @property
    def in_row_block(self) -> bool:
        """Whether the place is in a row block."""
        return self.matrix.row_wise
