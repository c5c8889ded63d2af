"""A streamed job: row blocks on their way from validation to the results.

It does not depend on gRPC. One task feeds it (`take`, `end`), another reads its results
(`results`). Each waits while the other or the device worker is behind.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Self, TypeAlias

import numpy as np

from gradwire_protocol.framing import Chunk
from gradwire_protocol.job_spec import JobSpec
from gradwire_protocol.matrices import ROW_RESULTS, Matrix
from gradwire_server.backends.base import Array, Backend, RowBlock, Sums, Wait
from gradwire_server.backends.row_blocks import RowBlockPlan
from gradwire_server.jobs.device_execution import DeviceExecution
from gradwire_server.jobs.stream.checkpoints import (
    Checkpoint,
    CheckpointReady,
    Checkpoints,
    DrainPoint,
)
from gradwire_server.jobs.stream.request_validator import RequestValidator
from gradwire_server.jobs.stream.ring_buffer import RingBuffer
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


_Computed: TypeAlias = tuple[int, RowBlock, asyncio.Future[None]]
"""A block's number, its matrices, and the future of its computation."""


class StreamedJob:
    """An admitted job.

    Args:
        spec: The job's specification.
        plan: Its row blocks.
        backend: The backend.
        worker: The device worker.
        progress: Counters to update.
        tensors: The kept operands and results.
        observe: Called for each event of a stage.

    Use it as an async context manager: after exit, for any cause, the worker no longer
    uses the job's memory.
    """

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
        self._observe = observe
        self._tensors = tensors
        self._progress = progress
        self.spec = spec
        self._plan = plan
        self._worker = worker
        self._execution = DeviceExecution(spec, plan, backend, worker.device, progress)
        self._validator = RequestValidator(spec, plan)
        self._backend = backend
        self._ring: RingBuffer
        self._submitted = spec.first_row // plan.block_rows
        """Row blocks submitted to the worker, including the blocks before
        `first_row`."""
        self._checkpoints = Checkpoints(spec)
        self._handed_over = False
        self._served_at = 0.0
        self._prepared = False
        self._computed: asyncio.Queue[_Computed | CheckpointReady | DrainPoint | None]
        self._computed = asyncio.Queue()
        self._silent: set[asyncio.Future[None]] = set()
        """Futures of the blocks in computation that have no results to send."""

    async def __aenter__(self) -> Self:
        try:
            self._ring = await self._worker.submit(self, self._open)
        except BaseException:
            await self._worker.discard(self)
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
            await self._worker.discard(self)
        finally:
            self._execution.close()
            self._computed = asyncio.Queue()
            self._ring.free()

    def hand_over(self) -> bool:
        """Make the job end with a checkpoint at the end of a row block.

        The job can resume from there elsewhere. Results of submitted blocks are still
        sent; no further message is taken.

        Returns:
            False if the job does not end this way: the client takes no checkpoints, or
            all rows have arrived and the job ends sooner by itself.
        """
        if self.spec.checkpoint_rows is None or self._last_block_came():
            return False
        if not self._handed_over:
            self._handed_over = True
            rows = self._submitted * self._plan.block_rows
            self._computed.put_nowait(DrainPoint(rows))
        return True

    def idle_since(self) -> float:
        """Return when the last available result was sent; event loop's clock.

        Return the current time while complete row blocks have unsent results.
        """
        if self._ring.released < self._submitted:
            return asyncio.get_running_loop().time()
        return self._served_at

    async def take(self, chunk: Chunk) -> None:
        """Take a message's elements; wait while the ring is full.

        Raises:
            JobError: The message does not continue the stream.
        """
        for span in self._validator.accept(chunk):
            if span.in_row_block:
                await self._ring.wait_for_slot(span.block)
            block_number = span.block if span.in_row_block else None
            await self._unless_handed_over()
            self._observe(Stage.RECEIVING, block_number)
            self._ring.put(span)
            self._observe(Stage.RECEIVING, block_number)
            self._validator.commit(span)
            self._progress.bytes_received += span.payload.nbytes
            await self._submit_complete()

    async def end(self, m: int) -> None:
        """Complete the job's operands, with m rows.

        Raises:
            JobError: The operands are not complete.
        """
        self._validator.end(m)
        self._progress.m = m
        self._progress.ended = True
        await self._submit_complete()
        self._computed.put_nowait(None)

    async def results(self) -> AsyncGenerator[ResultChunk | Checkpoint, None]:
        """Yield the results as they become ready.

        Y and dX come block by block, requested checkpoints in between, and the sums
        at the end.

        Raises:
            JobError: The job was handed over and ends here.
            Exception: The backend's error.
        """
        while (computed := await self._computed.get()) is not None:
            if isinstance(computed, CheckpointReady):
                sums = await computed.sums
                await self._silent_computed()
                for part in self._checkpoint(computed.rows, sums):
                    yield part
                self._checkpoints.left()
                continue
            if isinstance(computed, DrainPoint):
                await self._silent_computed()
                await self._ring.all_released(self._submitted)
                if computed.rows > self._checkpoints.rows:
                    sums = await self._worker.submit(self, self._copy_sums)
                    for part in self._checkpoint(computed.rows, sums):
                        yield part
                self._progress.handed_over = True
                raise computed.error()
            number, block, done = computed
            await done
            first_row = number * self._plan.block_rows
            for matrix, array in zip(ROW_RESULTS, (block.y, block.dx), strict=True):
                if array is not None:
                    for chunk in self._chunks(matrix, first_row, array):
                        yield chunk
            self._ring.release(number)
            self._served_at = asyncio.get_running_loop().time()
        await self._silent_computed()
        if self.spec.sums:
            sums = await self._worker.submit(self, self._finish)
            for matrix, array in sums.items():
                for chunk in self._chunks(matrix, 0, array):
                    yield chunk
        self._tensors.commit()

    def _checkpoint(self, rows: int, sums: Sums) -> Iterator[ResultChunk | Checkpoint]:
        yield Checkpoint(rows)
        for matrix, array in sums.items():
            yield from self._chunks(matrix.partial, 0, array)

    async def _unless_handed_over(self) -> None:
        """Block forever if the job was handed over: this task is about to end."""
        if self._handed_over:
            await asyncio.get_running_loop().create_future()

    def _last_block_came(self) -> bool:
        """Return whether the last row block, possibly a short one, was submitted."""
        rows = self._progress.m if self._progress.ended else self.spec.m
        return rows is not None and self._submitted * self._plan.block_rows >= rows

    async def _submit_complete(self) -> None:
        """Submit to the worker, in order, the blocks that are now complete."""
        if not self._plan.computes:  # rows without elements need no computation
            return
        while (rows := self._next_rows()) is not None:
            number = self._submitted
            await self._ring.wait_for_slot(number)
            await self._unless_handed_over()
            block = self._ring.rows(number, rows)
            if number < self.spec.results_from_row // self._plan.block_rows:
                block = replace(block, y=None, dx=None)
            done = self._worker.begin(self, partial(self._compute, number, block))
            if block.y is None and block.dx is None:
                self._silent.add(done)
                done.add_done_callback(partial(self._release_silent, number, block))
            else:
                self._computed.put_nowait((number, block, done))
            self._submitted += 1
            self._progress.blocks_received += 1
            if rows == self._plan.block_rows:
                self._submit_checkpoint(self._submitted * rows)

    def _release_silent(
        self, number: int, block: RowBlock, done: asyncio.Future[None]
    ) -> None:
        """Release a block without results, even while a checkpoint is being sent.

        So the next rows are read whether or not the client reads.
        """
        if done.cancelled() or done.exception() is not None:
            self._computed.put_nowait((number, block, done))
            return
        self._silent.discard(done)
        self._ring.release(number)
        self._served_at = asyncio.get_running_loop().time()

    async def _silent_computed(self) -> None:
        """Wait for the submitted blocks without results.

        Raises:
            Exception: The backend's error.
        """
        for done in tuple(self._silent):
            await done

    def _submit_checkpoint(self, rows: int) -> None:
        """Queue the sums over the submitted blocks, if a checkpoint is due."""
        if self._checkpoints.begin(rows):
            sums = self._worker.submit(self, self._copy_sums)
            self._computed.put_nowait(CheckpointReady(rows, sums))

    def _next_rows(self) -> int | None:
        """Return the rows of the next block in order; None until it is complete."""
        number, validator = self._submitted, self._validator
        complete = number < validator.blocks_complete
        return validator.rows_of(number) if complete else None

    def _chunks(
        self, matrix: Matrix, first_row: int, array: Array
    ) -> Iterator[ResultChunk]:
        itemsize = array.dtype.itemsize
        size = max(self.spec.max_chunk_bytes // itemsize, 1)
        first = first_row * array.shape[1]
        elements = array.reshape(-1).view(np.uint8).data
        number = first_row // self._plan.block_rows if matrix.row_wise else None
        for start in range(0, array.size, size):
            payload = elements[start * itemsize : (start + size) * itemsize]
            self._progress.bytes_sent += payload.nbytes
            self._observe(Stage.SENDING, number)
            yield ResultChunk(matrix, first + start, payload)
            self._observe(Stage.SENDING, number)

    def _open(self) -> RingBuffer:
        """Allocate the job's memory; runs in the worker thread."""
        region = self._backend.empty(self._plan.region_bytes)
        self._execution.open(self._tensors.on_device)
        return RingBuffer(self.spec, self._plan, region, self._tensors.in_host_memory)

    def _compute(self, number: int, block: RowBlock) -> Wait | None:
        """Compute a row block; runs in the worker thread."""
        self._prepare()
        self._observe(Stage.COMPUTING, number)
        wait = self._execution.compute_block(block)
        if wait is None:
            self._observe(Stage.COMPUTING, number)
            return None
        return partial(self._computed_after, wait, number)

    def _copy_sums(self) -> Sums:
        """Copy the sums into the ring; runs in the worker thread."""
        sums = self._ring.sums()
        self._execution.copy_sums(sums)
        return sums

    def _finish(self) -> Sums:
        """Return the sums to send; runs in the worker thread."""
        self._prepare()
        return self._execution.finish(self._tensors)

    def _prepare(self) -> None:
        """Pass the matrices that precede all rows to the device, once."""
        if self._prepared:
            return
        self._prepared = True
        on_device = self._tensors.on_device
        if Matrix.W in self.spec.operands and Matrix.W not in on_device:
            self._execution.take_w(self._ring.w())
        if self.spec.brings_sums:
            self._execution.take_sums(self._ring.sums())

    def _computed_after(self, wait: Wait, number: int) -> None:
        wait()
        self._observe(Stage.COMPUTING, number)
