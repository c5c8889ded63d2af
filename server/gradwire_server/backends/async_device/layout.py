"""Where a job's matrices lie in the one piece of device memory that it takes."""

from __future__ import annotations

from dataclasses import dataclass

from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.job_spec import JobSpec
from gradwire_protocol.matrices import OPERANDS, ROW_OPERANDS, ROW_RESULTS, Matrix
from gradwire_server.backends.async_device.gemm import DeviceMatrix, computes_into
from gradwire_server.backends.row_blocks import ALIGNMENT


@dataclass(frozen=True, slots=True)
class Layout:
    """Offsets in bytes from where the job's memory begins; None: not needed.

    All are multiples of `ALIGNMENT`.
    """

    w: int | None
    dw: int | None
    """The sum of dW, in the accumulator's dtype."""
    share: int | None
    """A block's share of dW, where that is of another dtype than the sum."""
    rounded: int | None
    """dW as it leaves, where it is of another dtype than the sum."""
    sums: int | None
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
    dw = share = rounded = None
    if Matrix.DW in spec.results:
        result, accumulator = spec.results[Matrix.DW], spec.accumulator
        dw = place(n * k, accumulator)
        if accumulator != dtype.sums_in:
            share = place(n * k, dtype.sums_in)
        if result != accumulator:
            # After the last block nothing reads W or a share any more.
            if share is not None and result.itemsize <= dtype.sums_in.itemsize:
                rounded = share
            elif w is not None and result.itemsize <= dtype.itemsize:
                rounded = w
            else:
                rounded = place(n * k, result)
    lengths = [
        spec.row_length(matrix)
        for matrix in ROW_RESULTS
        if matrix in spec.results and not computes_into(dtype, spec.results[matrix])
    ]
    sums = place(block_rows * max(lengths), dtype.sums_in) if lengths else None
    slots = tuple(
        {
            matrix: place(block_rows * spec.row_length(matrix), spec.dtype_of(matrix))
            for matrix in (*ROW_OPERANDS, *ROW_RESULTS)
            if matrix in spec.operands or matrix in spec.results
        }
        for _ in range(_slots(spec, block_rows, pipeline_depth))
    )
    return Layout(w, dw, share, rounded, sums, slots, end)


@dataclass(frozen=True, slots=True)
class Placed:
    """A layout's matrices, where the job's memory is."""

    spec: JobSpec
    layout: Layout
    address: int

    def of_rows(self, slot: int, matrix: Matrix, rows: int) -> DeviceMatrix | None:
        """A row block's matrix in a slot; None: the job has none."""
        offset = self.layout.slots[slot].get(matrix)
        if offset is None:
            return None
        dtype = self.spec.dtype if matrix in OPERANDS else self.spec.results[matrix]
        columns = self.spec.row_length(matrix)
        return DeviceMatrix(self.address + offset, rows, columns, dtype)

    @property
    def w(self) -> DeviceMatrix | None:
        """W."""
        return self._whole(self.layout.w, self.spec.dtype)

    @property
    def dw(self) -> DeviceMatrix | None:
        """The sum of dW."""
        return self._whole(self.layout.dw, self.spec.accumulator)

    @property
    def share(self) -> DeviceMatrix | None:
        """A block's share of dW."""
        return self._whole(self.layout.share, self.spec.dtype.sums_in)

    @property
    def rounded(self) -> DeviceMatrix | None:
        """dW as it leaves."""
        if self.layout.rounded is None:
            return None
        return self._whole(self.layout.rounded, self.spec.results[Matrix.DW])

    def _whole(self, offset: int | None, dtype: Dtype) -> DeviceMatrix | None:
        if offset is None:
            return None
        return DeviceMatrix(self.address + offset, self.spec.n, self.spec.k, dtype)


def _slots(spec: JobSpec, block_rows: int, pipeline_depth: int) -> int:
    if not block_rows or not spec.n or not spec.k:
        return 0
    if spec.m is None:
        return pipeline_depth
    return min(pipeline_depth, -(-spec.m // block_rows))
