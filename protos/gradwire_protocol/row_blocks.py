"""Sizes of row blocks and of segments.

Both follow from n, k and dtypes, never from m: so any part of a job that begins at a
segment's first row has the row blocks of the whole job.
"""

from __future__ import annotations

MAX_BLOCK_ROWS = 8192
"""Most rows of a row block. More rows do not make a product faster, and delay its
results."""

SUM_RATIO = 16
"""Least bytes of a segment's operands, as a multiple of the bytes of its sum of dW: a
server that computes one segment sends its sum, and has to be sent W."""


def rows_of_a_block(
    n: int, k: int, itemsize: int, row_block_bytes: int, *at_most: int | None
) -> int:
    """Return B, the largest power of two whose operand rows fit in `row_block_bytes`.

    Rows of both X and dY count, even if a job sends only one of them. So a result has
    the same bits with any other wanted results. Rows without elements count as one
    byte.

    Args:
        n: Columns of X.
        k: Columns of dY.
        itemsize: Bytes of an element of both.
        row_block_bytes: The server's desired size of a row block's operands, from
            `Limits.row_block_bytes`.
        at_most: Limits of the job, powers of two, which can only make B smaller:
            `Job.block_rows` and `Numerics.dw_segment_rows`. None: no limit.
    """
    row_bytes = (n + k) * itemsize
    rows = min(MAX_BLOCK_ROWS, row_block_bytes // max(row_bytes, 1))
    own = 1 << max(rows.bit_length() - 1, 0)
    return min([own, *(limit for limit in at_most if limit is not None)])


def segment_rows(
    n: int, k: int, itemsize: int, accumulator_itemsize: int, block_rows: int
) -> int:
    """Return S, the rows of a segment.

    It is the smallest power of two of row blocks whose rows of X and dY have at least
    `SUM_RATIO` times the bytes of the sum of dW.

    Args:
        n: Columns of X.
        k: Columns of dY.
        itemsize: Bytes of an element of both.
        accumulator_itemsize: Bytes of an element of the sum.
        block_rows: Rows of a row block, a power of two.
    """
    block_bytes = block_rows * (n + k) * itemsize
    blocks = -(-SUM_RATIO * n * k * accumulator_itemsize // max(block_bytes, 1))
    return block_rows << max(blocks - 1, 0).bit_length()
