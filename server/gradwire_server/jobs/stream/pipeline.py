"""An admitted job on its device: its memory and its computations.

It moves no elements. A mover brings operands into the memory and takes results from it:
`StreamedJob` in messages of the call, `DirectJob` on direct connections.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Self

import numpy as np

from gradwire_protocol.job_spec import JobSpec
from gradwire_protocol.matrices import Matrix
from gradwire_server.backends.base import Array, Backend, RowBlock, Sums, Wait
from gradwire_server.backends.row_blocks import RowBlockPlan
from gradwire_server.jobs.device_execution import DeviceExecution
from gradwire_server.jobs.stream.job_memory import JobMemory
from gradwire_server.observability.timeline import ObserveJob, Stage
from gradwire_server.scheduling.device_worker import TenantHandle
from gradwire_server.scheduling.job_progress import JobProgress
from gradwire_server.sessions.job_tensors import JobTensors


@dataclass(frozen=True, slots=True)
class ResultChunk:
    """Consecutive elements of a result, ready to send."""

    matrix: Matrix
    index: int
    """Index of the first element within the matrix."""
    payload: memoryview
    """Valid until the next chunk is requested."""


class RowBlockPipeline:
    """An admitted job on its device.

    Args:
        spec: The job's specification.
        plan: Its row blocks.
        backend: The backend.
        worker: The device worker. All work of the job is submitted with this object as
            its key.
        progress: Counters to update.
        tensors: The kept operands and results.
        observe: Called for each event of a stage.

    Use it as an async context manager: after exit, for any cause, the worker no longer
    uses the job's memory.

    Attributes:
        memory: The job's memory, within the context.
    """

    memory: JobMemory

    def __init__(
        self,
        spec: JobSpec,
        plan: RowBlockPlan,
        backend: Backend,
        worker: TenantHandle,
        progress: JobProgress,
        *,
        tensors: JobTensors,
        observe: ObserveJob,
    ) -> None:
        self.spec = spec
        self.plan = plan
        self.worker = worker
        self.progress = progress
        self.tensors = tensors
        self.observe = observe
        self._backend = backend
        self._execution = DeviceExecution(spec, plan, backend, worker.device, progress)
        self._prepared = False

    async def __aenter__(self) -> Self:
        try:
            if self._backend.devices[0].in_host_memory:  # only takes memory
                self.memory = self._open()
            else:
                self.memory = await self.worker.submit(self, self._open)
        except BaseException:
            await self.worker.discard(self)
            self._execution.close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            await self.worker.discard(self)
        finally:
            self._execution.close()
            self.memory.free()

    def block(self, number: int, rows: int) -> RowBlock:
        """Return a row block with its operands, and with its results if wanted."""
        block = self.memory.rows(number, rows)
        if number < self.spec.results_from_row // self.plan.block_rows:
            block = replace(block, y=None, dx=None)
        return block

    def chunks(
        self, matrix: Matrix, first_row: int, array: Array
    ) -> Iterator[ResultChunk]:
        """Yield the elements of a result, each chunk when the last one was sent.

        Args:
            matrix: The result.
            first_row: First row of its row block; 0 for sums.
            array: The elements.
        """
        itemsize = array.dtype.itemsize
        size = max(self.spec.max_chunk_bytes // itemsize, 1)
        first = first_row * array.shape[1]
        elements = array.reshape(-1).view(np.uint8).data
        number = first_row // self.plan.block_rows if matrix.row_wise else None
        for start in range(0, array.size, size):
            payload = elements[start * itemsize : (start + size) * itemsize]
            self.observe(Stage.SENDING, number)
            yield ResultChunk(matrix, first + start, payload)
            self.observe(Stage.SENDING, number)

    def compute(self, number: int, block: RowBlock) -> Wait | None:
        """Compute a row block; runs in the worker thread."""
        self._prepare()
        self.observe(Stage.COMPUTING, number)
        wait = self._execution.compute_block(block)
        if wait is None:
            self.observe(Stage.COMPUTING, number)
            return None
        return partial(self._computed_after, wait, number)

    def copy_sums(self) -> Sums:
        """Copy the sums into the job's memory; runs in the worker thread."""
        sums = self.memory.sums()
        self._execution.copy_sums(sums)
        return sums

    def end_segment(self) -> Sums:
        """Copy a segment's sums into the job's memory; runs in the worker thread."""
        sums = self.memory.sums()
        self._execution.end_segment(sums)
        return sums

    def finish(self) -> Sums:
        """Return the sums to send; runs in the worker thread."""
        self._prepare()
        return self._execution.finish(self.tensors)

    def _open(self) -> JobMemory:
        """Allocate the job's memory; runs in the worker thread, if it is a device's."""
        region = self._backend.empty(self.plan.region_bytes)
        self._execution.open(self.tensors.on_device)
        return JobMemory(self.spec, self.plan, region, self.tensors.in_host_memory)

    def _prepare(self) -> None:
        """Pass the matrices that precede all rows to the device, once."""
        if self._prepared:
            return
        self._prepared = True
        on_device = self.tensors.on_device
        if Matrix.W in self.spec.operands and Matrix.W not in on_device:
            self._execution.take_w(self.memory.w())
        if self.spec.brings_sums:
            self._execution.take_sums(self.memory.sums())

    def _computed_after(self, wait: Wait, number: int) -> None:
        wait()
        self.observe(Stage.COMPUTING, number)
