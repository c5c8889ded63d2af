"""Where a job's matrices lie in the one piece of device memory that it takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.job_spec import JobSpec
from gradwire_protocol.matrices import OPERANDS, ROW_OPERANDS, ROW_RESULTS, Matrix
from gradwire_server.backends.async_device.gemm import DeviceMatrix, computes_into
from gradwire_server.backends.row_blocks import ALIGNMENT


@dataclass(frozen=True, slots=True)
class SumLayout:
    """Offsets of a result that is summed over row blocks; None: not needed."""

    total: int
    """The sum, in the accumulator's dtype."""
    share: int | None
    """A block's share, where that is of another dtype than the sum."""
    rounded: int | None
    """The result as it leaves, where it is of another dtype than the sum."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Offsets in bytes from where the job's memory begins; None: not needed.

    All are multiples of `ALIGNMENT`.
    """

    w: int | None
    ones: int | None
    """As many ones as a block has rows, of which dB is made."""
    sums: dict[Matrix, SumLayout]
    unrounded: int | None
    """Rows of Y or dX in the dtype of the sums, where cuBLAS cannot round
    them itself. One for all: a block's products follow each other."""
    slots: tuple[dict[Matrix, int], ...]
    """Of each row block that the device has begun: x, dy, y and dx."""
    size_bytes: int


def make_layout(spec: JobSpec, block_rows: int, pipeline_depth: int) -> Layout:
    """The layout of a job.

    Args:
        spec: What was asked.
        block_rows: Most rows of a block.
        pipeline_depth: Most row blocks that the device has begun.
    """
    end = 0

    def place(elements: int, dtype: Dtype) -> int:
        nonlocal end
        start = end
        end += -(-elements * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        return start

    n, k, dtype = spec.n, spec.k, spec.dtype
    w = place(n * k, dtype) if Matrix.W in spec.operands else None
    ones = place(block_rows, dtype) if Matrix.DB in spec.results else None
    spare_w = w
    sums = {}
    for matrix in spec.sums:
        size, result = math.prod(matrix.shape(0, n, k)), spec.results[matrix]
        total = place(size, spec.accumulator)
        share = rounded = None
        if spec.accumulator != dtype.sums_in:
            share = place(size, dtype.sums_in)
        if result != spec.accumulator:
            # After the last block nothing reads W or a share any more.
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
            if matrix in spec.operands or matrix in spec.results
        }
        for _ in range(_slots(spec, block_rows, pipeline_depth))
    )
    return Layout(w, ones, sums, unrounded, slots, end)


@dataclass(frozen=True, slots=True)
class PlacedSum:
    """A result that is summed over row blocks, where the job's memory is."""

    total: DeviceMatrix
    """The sum, in the accumulator's dtype."""
    share: DeviceMatrix
    """A block's share; `total` itself where no other dtype is needed."""
    leaves: DeviceMatrix
    """The result as it leaves; `total` itself where no other dtype is needed."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A layout's matrices, where the job's memory is."""

    spec: JobSpec
    layout: Layout
    address: int

    def of_rows(self, slot: int, matrix: Matrix, rows: int) -> DeviceMatrix | None:
        """A row block's matrix in a slot; None: the job has none, or no elements."""
        offset = self.layout.slots[slot].get(matrix)
        columns = self.spec.row_length(matrix)
        if offset is None or not columns:
            return None
        dtype = self.spec.dtype if matrix in OPERANDS else self.spec.results[matrix]
        return DeviceMatrix(self.address + offset, rows, columns, dtype)

    @property
    def w(self) -> DeviceMatrix | None:
        """W; None: the job has none, or no elements."""
        if self.layout.w is None or not (self.spec.n and self.spec.k):
            return None
        return self._whole(Matrix.W, self.layout.w, self.spec.dtype)

    def ones(self, rows: int) -> DeviceMatrix | None:
        """So many ones, one below the other; None: the job needs none."""
        if self.layout.ones is None:
            return None
        address = self.address + self.layout.ones
        return DeviceMatrix(address, rows, 1, self.spec.dtype)

    def sums(self) -> dict[Matrix, PlacedSum]:
        """The results that are summed over row blocks."""
        return {
            matrix: self._sum(matrix, layout)
            for matrix, layout in self.layout.sums.items()
        }

    def _sum(self, matrix: Matrix, layout: SumLayout) -> PlacedSum:
        spec = self.spec
        total = self._whole(matrix, layout.total, spec.accumulator)
        share = leaves = total
        if layout.share is not None:
            share = self._whole(matrix, layout.share, spec.dtype.sums_in)
        if layout.rounded is not None:
            leaves = self._whole(matrix, layout.rounded, spec.results[matrix])
        return PlacedSum(total, share, leaves)

    def _whole(self, matrix: Matrix, offset: int, dtype: Dtype) -> DeviceMatrix:
        rows, columns = matrix.shape(0, self.spec.n, self.spec.k)
        return DeviceMatrix(self.address + offset, rows, columns, dtype)


def _slots(spec: JobSpec, block_rows: int, pipeline_depth: int) -> int:
    if not block_rows or not spec.row_operations:
        return 0
    if spec.m is None:
        return pipeline_depth
    return min(pipeline_depth, -(-spec.m // block_rows))
