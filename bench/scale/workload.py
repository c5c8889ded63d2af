"""A job's row blocks and segments, as far as their sizes go."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from bench.work import Shape
from gradwire_protocol.limits import MIB
from gradwire_protocol.row_blocks import SUM_RATIO, rows_of_a_block

WHOLE = 1 << 40


@dataclass(frozen=True)
class Workload:
    """A job that computes Y, dX and dW, cut into segments.

    Sizes of a row block and of a segment follow from n and k, as on a server.
    """

    shape: Shape
    row_block_bytes: int = 32 * MIB
    """Size of a row block's operands (16 MiB on a CPU, 32 MiB on a GPU)."""
    itemsize: int = 4
    accumulator_itemsize: int = 8
    ratio: int = SUM_RATIO
    """A segment's operands have at least so many times the bytes of its sum. 0: a
    segment is one row block; `WHOLE`: there is one segment."""

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of X and dY, and of Y and dX."""
        return (self.shape.n + self.shape.k) * self.itemsize

    @property
    def w_bytes(self) -> int:
        return self.shape.n * self.shape.k * self.itemsize

    @property
    def sum_bytes(self) -> int:
        """Bytes of dW in the accumulator's dtype."""
        return self.shape.n * self.shape.k * self.accumulator_itemsize

    @cached_property
    def block_rows(self) -> int:
        n, k = self.shape.n, self.shape.k
        return rows_of_a_block(n, k, self.itemsize, self.row_block_bytes)

    @cached_property
    def segment_blocks(self) -> int:
        """Row blocks of a segment, the last one apart."""
        blocks, enough = 1, self.ratio * self.sum_bytes
        while blocks * self.block_rows * self.row_bytes < enough:
            if blocks * self.block_rows >= self.shape.m:
                break  # one segment in any case
            blocks *= 2
        return blocks

    @property
    def segments(self) -> int:
        return -(-self.shape.m // (self.block_rows * self.segment_blocks))

    def blocks_of(self, segment: int) -> list[int]:
        """Rows of each row block of a segment."""
        first = segment * self.segment_blocks * self.block_rows
        end = min(first + self.segment_blocks * self.block_rows, self.shape.m)
        return [
            min(self.block_rows, end - row)
            for row in range(first, end, self.block_rows)
        ]

    @property
    def rows_bytes(self) -> int:
        """Bytes of X and dY, and of Y and dX."""
        return self.shape.m * self.row_bytes

    @property
    def gigabytes(self) -> float:
        """Operands and results of the job on one server, in 10⁹ bytes."""
        return 2 * (self.rows_bytes + self.w_bytes) / 1e9

    def ops(self, rows: int) -> float:
        """Multiplications and additions of so many rows."""
        return 6.0 * rows * self.shape.n * self.shape.k
