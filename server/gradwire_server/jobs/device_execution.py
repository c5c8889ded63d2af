"""A job's execution on its device, with progress counters.

It runs in the device worker's thread, except for jobs small enough to run inline.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np

from gradwire_protocol.job_spec import JobSpec
from gradwire_protocol.matrices import Matrix
from gradwire_server.backends.base import (
    Array,
    Backend,
    BackendJob,
    RowBlock,
    Sums,
    Wait,
)
from gradwire_server.backends.kept_memory import KeptArray
from gradwire_server.backends.row_blocks import RowBlockPlan
from gradwire_server.jobs.segment_total import SegmentTotal
from gradwire_server.scheduling.job_progress import JobProgress
from gradwire_server.sessions.job_tensors import JobTensors


class DeviceExecution:
    """A job on one device of a backend.

    Args:
        spec: The job's specification.
        plan: Its row blocks.
        backend: The backend.
        device: Index of the device.
        progress: Counters to update.
    """

    def __init__(
        self,
        spec: JobSpec,
        plan: RowBlockPlan,
        backend: Backend,
        device: int,
        progress: JobProgress,
    ) -> None:
        self._spec = spec
        self._plan = plan
        self._backend = backend
        self._device = device
        self._progress = progress
        self._job: BackendJob | None = None
        self._total: SegmentTotal | None = None

    def open(self, kept: Mapping[Matrix, KeptArray], sums: Sums | None = None) -> None:
        """Allocate the job's memory on its device.

        Args:
            kept: Operands that are arrays of a session on the device.
            sums: Memory for the sums, for a job in shared memory.
        """
        self._job = self._backend.open_job(
            self._spec,
            self._plan.slot_rows,
            self._device,
            times=self._progress.times,
            sums=sums,
            kept=kept,
        )
        if self._plan.total_bytes:
            memory = self._backend.empty(self._plan.total_bytes)
            self._total = SegmentTotal(
                self._spec, self._plan, memory, self._progress.times
            )

    def close(self) -> None:
        """Free the job's memory on its device."""
        job, self._job, self._total = self._job, None, None
        if job is not None:
            job.close()

    def take_w(self, w: Array) -> None:
        """Take W, before any row block."""
        self._opened.take_w(w)

    def take_sums(self, sums: Sums) -> None:
        """Take the sums over the rows before the first block, before any block."""
        if self._total is None:
            self._opened.take_sums(sums)
        else:
            self._total.take(sums)

    def copy_sums(self, out: Sums) -> None:
        """Copy the sums over the complete segments so far, not rounded."""
        if self._total is None:
            self._opened.copy_sums(out)
        else:
            self._total.copy(self._opened, out)

    def end_segment(self, out: Sums) -> None:
        """Copy the sums over the segment so far, and begin the next one."""
        self._opened.copy_sums(out)
        self._opened.restart_sums()

    def compute_block(self, block: RowBlock) -> Wait | None:
        """Compute the block's Y and dX, and add its share to each sum.

        Returns:
            A wait for asynchronous work, or None if the block is computed.
        """
        stages = self._progress.stages
        if stages is not None:
            stages.compute.since(time.perf_counter())
        if self._total is not None:
            self._total.begin_block(self._opened, block.first_row, block.rows)
        wait = self._opened.compute_block(block)
        if wait is None:
            self._progress.blocks += 1
            if stages is not None:
                stages.compute.since(stages.compute.first)
            return None
        return partial(self._block_computed, wait)

    def finish(self, tensors: JobTensors) -> Sums:
        """Leave the sums that stay in the session, and return the others.

        Each is in its wire dtype.
        """
        if self._total is not None:
            self._total.finish(self._opened)
        if self._spec.into:
            tensors.take(self._opened.kept_sums())
        sums: Sums = {}
        if any(result not in self._spec.into for result in self._spec.sums):
            sums = self._opened.finish()
        if (stages := self._progress.stages) is not None and stages.compute.first:
            stages.compute.since(stages.compute.first)
        return sums

    def run(
        self, operands: Mapping[Matrix, memoryview], tensors: JobTensors
    ) -> dict[Matrix, Array]:
        """Compute a whole job with complete operands.

        Args:
            operands: Elements of each sent operand.
            tensors: The kept operands and results.

        Returns:
            The results to send.
        """
        spec, m = self._spec, self._spec.m or 0
        arrays = {
            operand: np.frombuffer(data, spec.dtype.numpy).reshape(
                spec.n if operand is Matrix.W else m, spec.row_length(operand)
            )
            for operand, data in operands.items()
        }
        for operand, kept in tensors.in_host_memory.items():
            if operand in spec.keep:
                np.copyto(kept, arrays[operand])
            arrays[operand] = kept
        for result in spec.results:
            if result.row_wise:
                shape = (m, spec.row_length(result))
                arrays[result] = np.empty(shape, spec.results[result].numpy)
        self.open(tensors.on_device)
        try:
            for piece in self.pieces(arrays, m):
                wait = piece()
                if wait is not None:
                    wait()
            if spec.sums:
                arrays.update(self.finish(tensors))
        finally:
            self.close()
        return {result: arrays[result] for result in spec.sent_results}

    def pieces(
        self, arrays: Mapping[Matrix, Array], m: int
    ) -> Iterator[Callable[[], Wait | None]]:
        """Yield the work between `open` and `finish`, at most a row block each.

        Args:
            arrays: Every operand that the device has not yet, and memory for Y and dX,
                whole.
            m: Rows of the job.
        """
        if Matrix.W in arrays:
            yield partial(self.take_w, arrays[Matrix.W])
        for block in self._blocks(arrays, m):
            yield partial(self.compute_block, block)

    def _block_computed(self, wait: Wait) -> None:
        wait()
        self._progress.blocks += 1
        if (stages := self._progress.stages) is not None:
            stages.compute.since(stages.compute.first)

    def _blocks(self, arrays: Mapping[Matrix, Array], m: int) -> Iterator[RowBlock]:
        for first in range(0, m if self._plan.computes else 0, self._plan.block_rows):
            rows = slice(first, min(first + self._plan.block_rows, m))
            parts = {
                matrix.label: arrays[matrix][rows] if matrix in arrays else None
                for matrix in (Matrix.X, Matrix.DY, Matrix.Y, Matrix.DX)
            }
            yield RowBlock(rows=rows.stop - first, first_row=first, **parts)

    @property
    def _opened(self) -> BackendJob:
        if self._job is None:
            raise RuntimeError("the job is not open")
        return self._job
