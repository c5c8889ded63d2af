"""Division of a job into row blocks, and its memory layout.

Both depend only on n, k, the dtypes, the header's `block_rows` and `segment_rows` and
the server's configuration. So a job on the same server always has the same row blocks,
for any m and any order of arrival. A product's last bits depend on the row blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.job_spec import JobSpec
from gradwire_protocol.matrices import ROW_OPERANDS, ROW_RESULTS, Matrix
from gradwire_protocol.row_blocks import rows_of_a_block

RING_ENDS = 2
"""Row blocks that a job holds in addition to those in progress on the device: one is
being received, one is being sent."""

MAX_READ_AHEAD_BYTES = 4 << 20
"""Most bytes of operands that a job with small row blocks holds beyond those, in whole
blocks. Its client has no more row blocks outstanding than the job holds, and on a long
link the operands and results in transit are outstanding, too: 20 ms at 1 Gbit/s are
2.5 MB. It is gRPC's window for a call, which limits the bytes in transit anyway."""

MAX_EARLY_BYTES = 3 << 20
"""Most bytes of operands that a client may send before its job is accepted. They wait
in gRPC's window for the call, 4 MiB, with room for the header and the frames: a proxy
can pass all of them on, so that they hold up no other call of their connection."""

ALIGNMENT = 256
"""Alignment of every matrix in memory, in bytes: required by cuBLAS's fastest kernels,
and more than any CPU requires."""


@dataclass(frozen=True, slots=True)
class RowBlockPlan:
    """The row blocks and the memory layout of a job."""

    block_rows: int
    """Rows of a row block, B: block b is rows [b * B, (b + 1) * B)."""

    slot_rows: int
    """Rows that fit in a slot of the ring: B, or m if it is smaller."""

    offsets: dict[Matrix, int]
    """Byte offsets of W and of partial sums in the region, and of each row matrix in a
    slot."""

    w_bytes: int
    """Size of W at the start of the region, aligned; 0 if W is not sent."""

    slot_bytes: int
    """Size of one slot, aligned; 0 if rows of sent matrices have no elements."""

    pipeline_depth: int = 1
    """Most row blocks of the job in progress on its device."""

    sum_bytes: int = 0
    """Size of the memory after W for received or sent partial sums, aligned. 0 if there
    are none, or if they are only sent after all row blocks and use their memory."""

    least_bytes: int = 0
    """Smallest size of the region, so that it can hold the partial sums."""

    computes: bool = True
    """Whether row blocks have elements, and so need computation."""

    extra_slots: int = 0
    """Row blocks that the job holds because they are small."""

    segment_rows: int = 0
    """Rows of a segment, S: a multiple of B, or B if the job has no segments."""

    total_bytes: int = 0
    """Size of the host memory for adding the sums of several segments, beside the
    region. 0 if there is one, if it is one row block, or if the client adds them."""

    @property
    def slots(self) -> int:
        """Number of row blocks that the job holds."""
        return self.pipeline_depth + RING_ENDS + self.extra_slots

    @property
    def window_rows(self) -> int:
        """Rows by which one row operand may be ahead of the other.

        It is one slot less than the ring. The operand that is behind may be in the
        middle of a block, whose slot must still exist.
        """
        return (self.slots - 1) * self.block_rows

    @property
    def slots_start(self) -> int:
        """Byte offset of the first slot in the region."""
        return self.w_bytes + self.sum_bytes

    @property
    def region_bytes(self) -> int:
        """Size of the region: W, partial sums, then the slots."""
        return max(self.slots_start + self.slots * self.slot_bytes, self.least_bytes)


def plan_row_blocks(
    spec: JobSpec,
    row_block_bytes: int,
    pipeline_depth: int,
    *,
    keeps_on_device: bool = False,
) -> RowBlockPlan:
    """Plan the row blocks of a job.

    Args:
        spec: The job.
        row_block_bytes: Desired size of a row block's operands.
        pipeline_depth: Most row blocks in progress on the device.
        keeps_on_device: Whether kept operands lie in the device's own memory: rows that
            are sent and kept have a place here, from which they are copied there.
    """
    block_rows = rows_of_a_block(
        spec.n,
        spec.k,
        spec.dtype.itemsize,
        row_block_bytes,
        spec.block_rows,
        spec.segment_rows,
    )
    if spec.m is not None:
        pipeline_depth = min(pipeline_depth, max(-(-spec.m // block_rows), 1))
    slot_rows = block_rows if spec.m is None else min(block_rows, spec.m)
    extra_slots = _extra_slots(
        spec, block_rows, pipeline_depth + RING_ENDS, read_ahead_bytes(row_block_bytes)
    )
    offsets: dict[Matrix, int] = {}
    w_bytes = 0
    if Matrix.W in spec.sent_operands:
        offsets[Matrix.W] = 0
        w_bytes = _aligned(spec.n * spec.k * spec.dtype.itemsize)
    sum_bytes = least_bytes = 0
    if spec.brings_sums or spec.checkpoint_rows is not None or spec.segment_sums:
        least_bytes = w_bytes
        for result in spec.sums:
            offsets[result.partial] = least_bytes
            least_bytes += _aligned(spec.size_bytes(result.partial))
        if spec.brings_sums or spec.checkpoint_rows or spec.segment_sums:
            sum_bytes = least_bytes - w_bytes
    slot_bytes = row_elements = 0
    for matrix in (*ROW_OPERANDS, *ROW_RESULTS):
        if matrix not in spec.operands and matrix not in spec.results:
            continue
        row_elements += spec.row_length(matrix)
        if not spec.is_kept(matrix) or (keeps_on_device and matrix in spec.keep):
            offsets[matrix] = slot_bytes
            row_bytes = spec.row_length(matrix) * spec.dtype_of(matrix).itemsize
            slot_bytes += _aligned(slot_rows * row_bytes)
    return RowBlockPlan(
        block_rows,
        slot_rows,
        offsets,
        w_bytes,
        slot_bytes,
        pipeline_depth,
        sum_bytes,
        least_bytes,
        computes=bool(row_elements and slot_rows),
        extra_slots=extra_slots,
        segment_rows=spec.segment_rows or block_rows,
        total_bytes=_total_bytes(spec, block_rows),
    )


def held_in(spec: JobSpec, block_rows: int) -> Dtype:
    """Return the dtype in which a backend holds a job's sums over row blocks.

    It is the job's accumulator, unless the job is known to have one row block. Then
    nothing is added, and a product that is widened before it is rounded has the same
    bits: it is held as computed, without wider memory.

    Args:
        spec: The job.
        block_rows: Most rows of a row block.
    """
    one_block = spec.m is not None and spec.m <= block_rows
    # Partial sums arrive and leave in the accumulator's dtype, and so may results.
    moves = spec.brings_sums or bool(spec.checkpoint_rows)
    moves |= any(spec.results[result] == spec.accumulator for result in spec.sums)
    return spec.dtype.sums_in if one_block and not moves else spec.accumulator


def read_ahead_bytes(row_block_bytes: int) -> int:
    """Return the bytes of operands that jobs with small row blocks hold in addition.

    They are at most a quarter of a row block's, so that small blocks are no reason for
    much more memory.

    Args:
        row_block_bytes: Desired size of a row block's operands.
    """
    return min(MAX_READ_AHEAD_BYTES, row_block_bytes // 4)


def early_bytes(row_block_bytes: int) -> int:
    """Return the bytes of operands that a client may send before its job is accepted.

    The rows among them fit in the ring of any job, so neither operand can be too far
    ahead of the other.

    Args:
        row_block_bytes: Desired size of a row block's operands.
    """
    return min(MAX_EARLY_BYTES, read_ahead_bytes(row_block_bytes))


def _extra_slots(spec: JobSpec, block_rows: int, slots: int, size_bytes: int) -> int:
    """Return how many row blocks of `size_bytes` together to hold beyond `slots`.

    A row counts with X and dY, even if the job sends one of them: its results are as
    long as the other.
    """
    if not any(operand.row_wise for operand in spec.sent_operands):
        return 0
    row_bytes = max((spec.n + spec.k) * spec.dtype.itemsize, 1)
    extra = size_bytes // (row_bytes * block_rows)
    if spec.m is None:
        return extra
    blocks = -(-spec.m // block_rows)
    return min(extra, max(blocks + 1 - slots, 0))


def _total_bytes(spec: JobSpec, block_rows: int) -> int:
    """Return the bytes of a total over segments and of the sums of one of them."""
    segment_rows = spec.segment_rows or block_rows
    one_segment = spec.m is not None and spec.m <= segment_rows
    if segment_rows == block_rows or one_segment or spec.segment_sums:
        return 0
    return 2 * sum(spec.size_bytes(result.partial) for result in spec.sums)


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT) * ALIGNMENT
