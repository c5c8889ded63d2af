"""The layout of a job's matrices in its device memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.job_spec import JobSpec
from gradwire_protocol.matrices import OPERANDS, ROW_OPERANDS, ROW_RESULTS, Matrix
from gradwire_server.backends.async_device.gemm import DeviceMatrix, computes_into
from gradwire_server.backends.base import RowBlock
from gradwire_server.backends.row_blocks import ALIGNMENT, held_in


@dataclass(frozen=True, slots=True)
class SumLayout:
    """Byte offsets of a result summed over row blocks; None: not needed."""

    total: int
    """The sum, in the dtype `Layout.held_in`."""
    share: int | None
    """A block's contribution, if it is added to the sum or has another dtype."""
    rounded: int | None
    """The result as sent, if it has another dtype than the sum."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Byte offsets in the job's memory; None: not needed, or in the session's memory.

    All are multiples of `ALIGNMENT`.
    """

    w: int | None
    ones: int | None
    """A one for each row of a block, to compute dB."""
    held_in: Dtype
    """Dtype of the sums over row blocks; see `row_blocks.held_in`."""
    sums: dict[Matrix, SumLayout]
    unrounded: int | None
    """Rows of Y or dX in the dtype of the sums, if cuBLAS cannot round them itself. One
    is enough, because a block's products are computed one after the other."""
    slots: tuple[dict[Matrix, int], ...]
    """Offsets of x, dy, y and dx for each row block in progress. Kept operands have
    one if row blocks do not begin at multiples of `ALIGNMENT`: they are copied there,
    because products of other addresses may have other bits."""
    size_bytes: int


def make_layout(spec: JobSpec, block_rows: int, pipeline_depth: int) -> Layout:
    """Return the layout of a job.

    Args:
        spec: The job.
        block_rows: Most rows of a row block.
        pipeline_depth: Most row blocks in progress.
    """
    end = 0

    def place(elements: int, dtype: Dtype) -> int:
        nonlocal end
        start = end
        end += -(-elements * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        return start

    n, k, dtype = spec.n, spec.k, spec.dtype
    held = held_in(spec, block_rows)
    w = place(n * k, dtype) if Matrix.W in spec.sent_operands else None
    ones = place(block_rows, dtype) if Matrix.DB in spec.results else None
    spare_w = w
    adds = spec.m is None or spec.m > block_rows or spec.brings_sums
    sums = {}
    for matrix in spec.sums:
        size, result = math.prod(matrix.shape(0, n, k)), spec.results[matrix]
        total = place(size, held)
        share = rounded = None
        if adds or held != dtype.sums_in:
            share = place(size, dtype.sums_in)
        if result != held:
            # After the last block, W and the contribution are no longer needed.
            fits_w = size * result.itemsize <= n * k * dtype.itemsize
            if share is not None and result.itemsize <= dtype.sums_in.itemsize:
                rounded = share
            elif spare_w is not None and fits_w:
                rounded, spare_w = spare_w, None
            else:
                rounded = place(size, result)
        sums[matrix] = SumLayout(total, share, rounded)
    lengths = [
        spec.row_length(matrix)
        for matrix in ROW_RESULTS
        if matrix in spec.results and not computes_into(dtype, spec.results[matrix])
    ]
    unrounded = place(block_rows * max(lengths), dtype.sums_in) if lengths else None
    slots = tuple(
        {
            matrix: place(block_rows * spec.row_length(matrix), spec.dtype_of(matrix))
            for matrix in (*ROW_OPERANDS, *ROW_RESULTS)
            if matrix in spec.results
            or (
                matrix in spec.operands and not _read_in_place(spec, matrix, block_rows)
            )
        }
        for _ in range(_slots(spec, block_rows, pipeline_depth))
    )
    return Layout(w, ones, held, sums, unrounded, slots, end)


@dataclass(frozen=True, slots=True)
class SumMatrices:
    """A result summed over row blocks, at the address of the job's memory."""

    total: DeviceMatrix
    """The sum, in the dtype `Layout.held_in`."""
    share: DeviceMatrix
    """A block's contribution; `total` itself if there is one, of the same dtype."""
    leaves: DeviceMatrix
    """The result as sent; `total` itself if it has the same dtype."""


@dataclass(frozen=True, slots=True)
class JobMatrices:
    """The matrices of a layout, at the address of the job's memory."""

    spec: JobSpec
    layout: Layout
    address: int
    kept: Mapping[Matrix, int] = field(default_factory=dict)
    """Addresses of the operands in the session's memory."""

    def of_rows(
        self, slot: int, matrix: Matrix, block: RowBlock
    ) -> DeviceMatrix | None:
        """Return a row block's matrix for products; None if it is empty or absent."""
        offset = self.layout.slots[slot].get(matrix)
        if offset is None:
            return self._of_kept_rows(matrix, block)
        return self._of_rows(matrix, self.address + offset, block)

    def received(
        self, slot: int, matrix: Matrix, block: RowBlock
    ) -> DeviceMatrix | None:
        """Return the place of a row block's sent operand; None if it has none."""
        if matrix in self.kept:
            return self._of_kept_rows(matrix, block)
        return self.of_rows(slot, matrix, block)

    def realigned(
        self, slot: int, block: RowBlock
    ) -> Iterator[tuple[DeviceMatrix, DeviceMatrix]]:
        """Yield what has to be copied before a row block's products, and to where."""
        for matrix in self.kept:
            if matrix in self.layout.slots[slot]:
                source = self._of_kept_rows(matrix, block)
                to = self.of_rows(slot, matrix, block)
                if source is not None and to is not None:
                    yield source, to

    @property
    def w(self) -> DeviceMatrix | None:
        """W; None if the job has no W, or it is empty."""
        if not (self.spec.n and self.spec.k):
            return None
        if Matrix.W in self.kept:
            address = self.kept[Matrix.W]
            return DeviceMatrix(address, self.spec.n, self.spec.k, self.spec.dtype)
        if self.layout.w is None:
            return None
        return self._whole(Matrix.W, self.layout.w, self.spec.dtype)

    def ones(self, rows: int) -> DeviceMatrix | None:
        """Return a column of ones; None if the job needs none."""
        if self.layout.ones is None:
            return None
        address = self.address + self.layout.ones
        return DeviceMatrix(address, rows, 1, self.spec.dtype)

    def sums(self) -> dict[Matrix, SumMatrices]:
        """Return the results summed over row blocks."""
        return {
            matrix: self._sum(matrix, layout)
            for matrix, layout in self.layout.sums.items()
        }

    def _of_kept_rows(self, matrix: Matrix, block: RowBlock) -> DeviceMatrix | None:
        if matrix not in self.kept:
            return None
        row_bytes = self.spec.row_length(matrix) * self.spec.dtype.itemsize
        address = self.kept[matrix] + block.first_row * row_bytes
        return self._of_rows(matrix, address, block)

    def _of_rows(
        self, matrix: Matrix, address: int, block: RowBlock
    ) -> DeviceMatrix | None:
        columns = self.spec.row_length(matrix)
        dtype = self.spec.dtype if matrix in OPERANDS else self.spec.results[matrix]
        return DeviceMatrix(address, block.rows, columns, dtype) if columns else None

    def _sum(self, matrix: Matrix, layout: SumLayout) -> SumMatrices:
        spec = self.spec
        total = self._whole(matrix, layout.total, self.layout.held_in)
        share = leaves = total
        if layout.share is not None:
            share = self._whole(matrix, layout.share, spec.dtype.sums_in)
        if layout.rounded is not None:
            leaves = self._whole(matrix, layout.rounded, spec.results[matrix])
        return SumMatrices(total, share, leaves)

    def _whole(self, matrix: Matrix, offset: int, dtype: Dtype) -> DeviceMatrix:
        rows, columns = matrix.shape(0, self.spec.n, self.spec.k)
        return DeviceMatrix(self.address + offset, rows, columns, dtype)


def _read_in_place(spec: JobSpec, operand: Matrix, block_rows: int) -> bool:
    """Return whether products read a kept operand's rows where the session has them."""
    if not (operand in spec.kept or operand in spec.keep):
        return False
    one_block = spec.m is not None and spec.m <= block_rows
    row_bytes = spec.row_length(operand) * spec.dtype.itemsize
    return one_block or block_rows * row_bytes % ALIGNMENT == 0


def _slots(spec: JobSpec, block_rows: int, pipeline_depth: int) -> int:
    # Rows to keep are copied to the device even if nothing is computed with them.
    if not block_rows or not (spec.row_operations or spec.keep):
        return 0
    if spec.m is None:
        return pipeline_depth
    return min(pipeline_depth, -(-spec.m // block_rows))
