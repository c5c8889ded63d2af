"""A job's memory: W, partial sums, and a ring of slots with one row block each.

With s slots, row block b lies in slot b mod s.

All of it is slices of one region, so that a backend can pin the region and another
process can fill it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from gradwire_protocol.job_spec import JobSpec
from gradwire_protocol.matrices import ROW_OPERANDS, ROW_RESULTS, Matrix
from gradwire_server.backends.base import Array, RowBlock, Sums
from gradwire_server.backends.row_blocks import RowBlockPlan
from gradwire_server.jobs.stream.span import Span


class JobMemory:
    """Memory for a job's incoming operands and outgoing row results.

    A slot is free for its next row block once its last one was sent: see `Slots`.

    Args:
        spec: The job's specification.
        plan: Its row blocks.
        region: The memory, `plan.region_bytes` long.
        kept: Operands that are tensors of a session in host memory, whole: they have
            no place in the region, and sent ones are received there.
    """

    def __init__(
        self,
        spec: JobSpec,
        plan: RowBlockPlan,
        region: npt.NDArray[np.uint8],
        kept: Mapping[Matrix, Array] | None = None,
    ) -> None:
        self._kept = dict(kept or {})
        self._spec = spec
        self._plan = plan
        self._region = region

    def w(self) -> Array:
        """Return W, shape (n, k)."""
        kept = self._kept.get(Matrix.W)
        return self._whole(Matrix.W) if kept is None else kept

    def sums(self) -> Sums:
        """Return memory for the partial sums, in the accumulator's dtype."""
        return {result: self._whole(result.partial) for result in self._spec.sums}

    def rows(self, block: int, rows: int) -> RowBlock:
        """Return the matrices of a row block with `rows` rows."""
        start = self._slot_start(block)
        first = block * self._plan.block_rows
        arrays: dict[str, Array | None] = {}
        for matrix in (*ROW_OPERANDS, *ROW_RESULTS):
            array = None
            if matrix in self._kept:
                array = self._kept[matrix][first : first + rows]
            elif matrix in self._plan.offsets:
                array = self._matrix(matrix, start, rows)
            arrays[matrix.label] = array
        return RowBlock(rows=rows, first_row=first, **arrays)

    def room(self, span: Span, size_bytes: int) -> npt.NDArray[np.uint8]:
        """Return the memory of an operand's bytes.

        Args:
            span: Where the bytes belong.
            size_bytes: Number of bytes.
        """
        kept = self._kept.get(span.matrix)
        if kept is not None:
            row = span.block * self._plan.block_rows
            first = row * kept.shape[1] * kept.dtype.itemsize + span.offset
            return kept.reshape(-1).view(np.uint8)[first : first + size_bytes]
        start = self._slot_start(span.block) if span.in_row_block else 0
        first = start + self._plan.offsets[span.matrix] + span.offset
        return self._region[first : first + size_bytes]

    def free(self) -> None:
        """Drop the region; the memory is unusable afterwards."""
        self._region = self._region[:0].copy()
        self._kept.clear()

    def _slot_start(self, block: int) -> int:
        return self._plan.slots_start + block % self._plan.slots * self._plan.slot_bytes

    def _whole(self, matrix: Matrix) -> Array:
        rows, _ = matrix.shape(0, self._spec.n, self._spec.k)
        return self._matrix(matrix, 0, rows)

    def _matrix(self, matrix: Matrix, start: int, rows: int) -> npt.NDArray[Any]:
        columns = self._spec.row_length(matrix)
        dtype = self._spec.dtype_of(matrix).numpy
        first = start + self._plan.offsets[matrix]
        size = rows * columns * dtype.itemsize
        return self._region[first : first + size].view(dtype).reshape(rows, columns)
