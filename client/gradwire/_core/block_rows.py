"""The rows of a block that a job asks for with ``block_rows="auto"``."""

from __future__ import annotations

from gradwire_protocol.dtypes import Dtype

BLOCKS = 8
"""Blocks of a job. The first block's operands arrive before any result can leave, and
the last block's results leave after all operands have arrived: that is an eighth of the
rows, each way."""

MIN_BLOCK_BYTES = 1 << 18
"""Least bytes of a block in the link's busier direction. At 1 Gbit/s they take 2 ms,
ten times what a block costs the server beside its products."""

MIN_BLOCK_ROWS = 64
"""Least rows of a block. Products of fewer rows are slower, because they read all of W
for each block."""


def automatic_block_rows(m: int | None, n: int, k: int, dtype: Dtype) -> int:
    """Return the rows of a block for a job whose link is slower than its device.

    Like the server's own B, it does not depend on the wanted results, on the method or
    on the transport, so that the bits do not. A row counts with the wider of X and dY:
    a session's call sends one of them and receives as many columns as the other has, so
    that is its busier direction. Calls that send or receive both have at most twice the
    bytes.

    Args:
        m: Rows of the job; None: unknown.
        n: Columns of X.
        k: Columns of dY.
        dtype: Dtype in which operands are sent.

    Returns:
        A power of two, or 0 if the server's own B suits the job: m is unknown, or too
        small for two blocks.
    """
    row_bytes = max(n, k, 1) * dtype.itemsize
    least = max(MIN_BLOCK_ROWS, MIN_BLOCK_BYTES // row_bytes)
    if m is None or m <= least:
        return 0
    rows = max(_power_of_two(m // BLOCKS), _power_of_two(2 * least - 1))
    return rows if rows < m else 0


def _power_of_two(number: int) -> int:
    """Return the largest power of two up to a number, at least 1."""
    return 1 << max(number.bit_length() - 1, 0)
