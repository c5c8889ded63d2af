"""A job on its device, with what it does counted.

It runs in the thread of its lane, but for jobs too small for that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np

from gradwire_protocol.job_spec import JobSpec
from gradwire_protocol.matrices import Matrix
from gradwire_server.backends.base import Array, Backend, BackendJob, RowBlock, Wait
from gradwire_server.backends.row_blocks import Plan
from gradwire_server.scheduling.job_progress import JobProgress


class DeviceExecution:
    """A job of a backend.

    Args:
        spec: What was asked.
        plan: How it is cut.
        backend: What computes it.
        device: On which of its devices.
        progress: Told what was done.
    """

    def __init__(
        self,
        spec: JobSpec,
        plan: Plan,
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

    def open(self, dw: Array | None = None) -> None:
        """Takes the memory that the job needs on its device.

        Args:
            dw: Where dW will lie, for a job that has places.
        """
        self._job = self._backend.open_job(
            self._spec,
            self._plan.slot_rows,
            self._device,
            times=self._progress.times,
            dw=dw,
        )

    def close(self) -> None:
        """Gives it back."""
        job, self._job = self._job, None
        if job is not None:
            job.close()

    def take_w(self, w: Array) -> None:
        """Takes W, before any row block."""
        self._opened.take_w(w)

    def take_dw_sum(self, dw: Array) -> None:
        """Takes dW's sum over the rows before the first block, before that."""
        self._opened.take_dw_sum(dw)

    def copy_dw_sum(self, out: Array) -> None:
        """Copies dW's sum over the row blocks so far, not rounded."""
        self._opened.copy_dw_sum(out)

    def compute_block(self, block: RowBlock) -> Wait | None:
        """Computes the block's Y and dX, and adds its share to dW.

        Returns:
            What to wait for until that is done; None: it is.
        """
        wait = self._opened.compute_block(block)
        if wait is None:
            self._progress.blocks += 1
            return None
        return partial(self._block_computed, wait)

    def finish(self) -> Array:
        """dW, in its dtype on the wire."""
        return self._opened.finish()

    def run(self, operands: Mapping[Matrix, memoryview]) -> dict[Matrix, Array]:
        """Computes a whole job whose operands are all there.

        Args:
            operands: Elements of each operand.

        Returns:
            The wanted results.
        """
        spec, m = self._spec, self._spec.m or 0
        arrays = {
            operand: np.frombuffer(data, spec.dtype.numpy).reshape(
                spec.n if operand is Matrix.W else m, spec.row_length(operand)
            )
            for operand, data in operands.items()
        }
        for result in spec.results:
            if result is not Matrix.DW:
                shape = (m, spec.row_length(result))
                arrays[result] = np.empty(shape, spec.results[result].numpy)
        self.open()
        try:
            for piece in self.pieces(arrays, m):
                wait = piece()
                if wait is not None:
                    wait()
            if Matrix.DW in spec.results:
                arrays[Matrix.DW] = self.finish()
        finally:
            self.close()
        return {result: arrays[result] for result in spec.results}

    def pieces(
        self, arrays: Mapping[Matrix, Array], m: int
    ) -> Iterator[Callable[[], Wait | None]]:
        """The work between `open` and `finish`, each piece at most a row block.

        Args:
            arrays: Every operand, and room for Y and dX, whole.
            m: Rows of the job.
        """
        if Matrix.W in arrays:
            yield partial(self.take_w, arrays[Matrix.W])
        for block in self._blocks(arrays, m):
            yield partial(self.compute_block, block)

    def _block_computed(self, wait: Wait) -> None:
        wait()
        self._progress.blocks += 1

    def _blocks(self, arrays: Mapping[Matrix, Array], m: int) -> Iterator[RowBlock]:
        for first in range(0, m if self._plan.slot_bytes else 0, self._plan.block_rows):
            rows = slice(first, min(first + self._plan.block_rows, m))
            parts = {
                matrix.label: arrays[matrix][rows] if matrix in arrays else None
                for matrix in (Matrix.X, Matrix.DY, Matrix.Y, Matrix.DX)
            }
            yield RowBlock(rows=rows.stop - rows.start, **parts)

    @property
    def _opened(self) -> BackendJob:
        if self._job is None:
            raise RuntimeError("the job is not open")
        return self._job
