"""How a job is cut into row blocks, and what memory that takes.

Both follow from n, k, the dtypes and the server's configuration alone, so
that the same job on the same server is cut in the same places, whatever m is
and however its bytes arrive; a product's last bits depend on the cut.
"""

from __future__ import annotations

from dataclasses import dataclass

from gradwire_protocol.job_spec import JobSpec
from gradwire_protocol.matrices import ROW_OPERANDS, ROW_RESULTS, Matrix

MAX_BLOCK_ROWS = 8192
"""Rows of a block where rows are short. A product does not get faster from
there on, and a block's results should leave soon."""

RING_ENDS = 2
"""Row blocks that a job holds beside those that its device has begun: one
arrives, one leaves."""

ALIGNMENT = 256
"""Bytes to which every matrix in memory is aligned: what cuBLAS asks for its
fastest kernels, and more than any CPU does."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The row blocks of a job, and where its bytes lie."""

    block_rows: int
    """Rows of a block, B: block b is rows [b * B, (b + 1) * B)."""

    slot_rows: int
    """Rows for which a slot of the ring has room: B, or m if that is less."""

    offsets: dict[Matrix, int]
    """Where W and partial sums begin in the region, and each row matrix in a slot;
    bytes."""

    w_bytes: int
    """Bytes at the start of the region that W takes, aligned."""

    slot_bytes: int
    """Bytes of one slot, aligned; 0 where rows have no elements at all."""

    pipeline_depth: int = 1
    """Most row blocks of the job that its device has begun and not done."""

    sum_bytes: int = 0
    """Bytes behind W for partial sums that come or leave, aligned. 0 also where
    they leave when no row block is left, and take the room of those."""

    least_bytes: int = 0
    """Bytes that the region has at least, so that it has room for those sums."""

    @property
    def slots(self) -> int:
        """Row blocks that the job holds."""
        return self.pipeline_depth + RING_ENDS

    @property
    def window_rows(self) -> int:
        """How far one row operand may be ahead of the other.

        One slot less than the ring has: the operand that is behind may stand
        in the middle of a block, and its slot must still be there.
        """
        return (self.slots - 1) * self.block_rows

    @property
    def slots_start(self) -> int:
        """Where the first slot begins in the region; bytes."""
        return self.w_bytes + self.sum_bytes

    @property
    def region_bytes(self) -> int:
        """Bytes of the region: W, partial sums, then the slots."""
        return max(self.slots_start + self.slots * self.slot_bytes, self.least_bytes)


def make_plan(spec: JobSpec, row_block_bytes: int, pipeline_depth: int) -> Plan:
    """The plan of a job.

    Args:
        spec: What was asked.
        row_block_bytes: Bytes of a block's operands at which the server aims.
        pipeline_depth: Most row blocks that its device has begun and not done.
    """
    block_rows = rows_of_a_block(spec, row_block_bytes)
    if spec.m is not None:
        pipeline_depth = min(pipeline_depth, max(-(-spec.m // block_rows), 1))
    slot_rows = block_rows if spec.m is None else min(block_rows, spec.m)
    offsets: dict[Matrix, int] = {}
    w_bytes = 0
    if Matrix.W in spec.operands:
        offsets[Matrix.W] = 0
        w_bytes = _aligned(spec.n * spec.k * spec.dtype.itemsize)
    sum_bytes = least_bytes = 0
    if spec.brings_sums or spec.checkpoint_rows is not None:
        least_bytes = w_bytes
        for result in spec.sums:
            offsets[result.partial] = least_bytes
            least_bytes += _aligned(spec.size_bytes(result.partial))
        if spec.brings_sums or spec.checkpoint_rows:
            sum_bytes = least_bytes - w_bytes
    slot_bytes = 0
    for matrix in (*ROW_OPERANDS, *ROW_RESULTS):
        if matrix in spec.operands or matrix in spec.results:
            offsets[matrix] = slot_bytes
            row_bytes = spec.row_length(matrix) * spec.dtype_of(matrix).itemsize
            slot_bytes += _aligned(slot_rows * row_bytes)
    return Plan(
        block_rows,
        slot_rows,
        offsets,
        w_bytes,
        slot_bytes,
        pipeline_depth,
        sum_bytes,
        least_bytes,
    )


def rows_of_a_block(spec: JobSpec, row_block_bytes: int) -> int:
    """B: the largest power of two whose operand rows fit `row_block_bytes`.

    Rows of X and of dY both count, also when a job sends only one of them,
    so that a result has the same bits whatever else is wanted with it.
    """
    row_bytes = (spec.n + spec.k) * spec.dtype.itemsize
    rows = min(MAX_BLOCK_ROWS, row_block_bytes // max(row_bytes, 1))
    return 1 << max(rows.bit_length() - 1, 0)


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT) * ALIGNMENT
