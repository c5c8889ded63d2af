"""A streamed job: row blocks on their way from validation to the results.

It does not depend on gRPC. One task feeds it (`take`, `end`), another reads its results
(`results`). Each waits while the other or the device worker is behind.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from functools import partial
from typing import TypeAlias

import numpy as np

from gradwire_protocol.framing import Chunk
from gradwire_protocol.matrices import ROW_RESULTS, Matrix
from gradwire_server.backends.base import Array, RowBlock, Sums
from gradwire_server.jobs.stream.checkpoints import (
    Checkpoint,
    CheckpointReady,
    Checkpoints,
    DrainPoint,
)
from gradwire_server.jobs.stream.pipeline import ResultChunk, RowBlockPipeline
from gradwire_server.jobs.stream.request_validator import RequestValidator
from gradwire_server.jobs.stream.slots import Slots
from gradwire_server.observability.timeline import Stage

_Computed: TypeAlias = tuple[int, RowBlock, asyncio.Future[None]]
"""A block's number, its matrices, and the future of its computation."""


class StreamedJob:
    """Moves an admitted job's elements in messages.

    Args:
        pipeline: The job, opened.
    """

    def __init__(self, pipeline: RowBlockPipeline) -> None:
        self._pipeline = pipeline
        self.spec, self._plan = pipeline.spec, pipeline.plan
        self._worker, self._progress = pipeline.worker, pipeline.progress
        self._validator = RequestValidator(self.spec, self._plan)
        self._submitted = self.spec.first_row // self._plan.block_rows
        """Row blocks submitted to the worker, including the blocks before
        `first_row`."""
        self._slots = Slots(self._plan.slots, self._submitted)
        self._checkpoints = Checkpoints(self.spec, self._plan.segment_rows)
        self._segment_end = 0
        """The row after the last segment whose sums are or were to be sent."""
        self._sums_sent = asyncio.Event()
        """Whether the memory for a segment's sums is free."""
        self._sums_sent.set()
        self._handed_over = False
        self._served_at = 0.0
        self._computed: asyncio.Queue[_Computed | CheckpointReady | DrainPoint | None]
        self._computed = asyncio.Queue()
        self._silent: set[asyncio.Future[None]] = set()
        """Futures of the blocks in computation that have no results to send."""

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
            self._computed.put_nowait(DrainPoint(self._checkpoints.last_rows(rows)))
        return True

    def idle_since(self) -> float:
        """Return when the last available result was sent; event loop's clock.

        Return the current time while complete row blocks have unsent results, or
        segments have unsent sums.
        """
        owes_rows = self._slots.released < self._submitted
        if owes_rows or not self._sums_sent.is_set():
            return asyncio.get_running_loop().time()
        return self._served_at

    async def take(self, chunk: Chunk) -> None:
        """Take a message's elements; wait while the ring is full.

        Raises:
            JobError: The message does not continue the stream.
        """
        observe = self._pipeline.observe
        for piece in self._validator.accept(chunk):
            span, payload = piece.span, piece.payload
            if span.in_row_block:
                await self._slots.wait_for(span.block)
            block_number = span.block if span.in_row_block else None
            await self._unless_handed_over()
            observe(Stage.RECEIVING, block_number)
            room = self._pipeline.memory.room(span, payload.nbytes)
            room[:] = np.frombuffer(payload, np.uint8)
            observe(Stage.RECEIVING, block_number)
            self._validator.commit(piece)
            self._progress.bytes_received += payload.nbytes
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
        if self.spec.segment_sums and self._plan.computes and m > self._segment_end:
            await self._submit_segment(m)
        self._computed.put_nowait(None)

    async def results(self) -> AsyncGenerator[ResultChunk | Checkpoint, None]:
        """Yield the results as they become ready.

        Y and dX come block by block, requested checkpoints or the sums of segments in
        between, and the other sums at the end.

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
                self._sums_sent.set()
                self._served_at = asyncio.get_running_loop().time()
                continue
            if isinstance(computed, DrainPoint):
                await self._silent_computed()
                await self._slots.all_released(self._submitted)
                if computed.rows > self._checkpoints.rows:
                    sums = await self._worker.submit(
                        self._pipeline, self._pipeline.copy_sums
                    )
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
            self._slots.release(number)
            self._served_at = asyncio.get_running_loop().time()
        await self._silent_computed()
        if self.spec.sums and not self.spec.segment_sums:
            sums = await self._worker.submit(self._pipeline, self._pipeline.finish)
            for matrix, array in sums.items():
                for chunk in self._chunks(matrix, 0, array):
                    yield chunk
        self._pipeline.tensors.commit()

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
            await self._slots.wait_for(number)
            await self._unless_handed_over()
            block = self._pipeline.block(number, rows)
            compute = partial(self._pipeline.compute, number, block)
            done = self._worker.begin(self._pipeline, compute)
            if block.y is None and block.dx is None:
                self._silent.add(done)
                done.add_done_callback(partial(self._release_silent, number, block))
            else:
                self._computed.put_nowait((number, block, done))
            self._submitted += 1
            self._progress.blocks_received += 1
            if rows == self._plan.block_rows:
                await self._submit_sums(self._submitted * rows)

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
        self._slots.release(number)
        self._served_at = asyncio.get_running_loop().time()

    async def _silent_computed(self) -> None:
        """Wait for the submitted blocks without results.

        Raises:
            Exception: The backend's error.
        """
        for done in tuple(self._silent):
            await done

    async def _submit_sums(self, rows: int) -> None:
        """Queue the sums over the submitted blocks, if they are due."""
        if self.spec.segment_sums:
            if not rows % self._plan.segment_rows:
                await self._submit_segment(rows)
        elif self._checkpoints.begin(rows):
            sums = self._worker.submit(self._pipeline, self._pipeline.copy_sums)
            self._computed.put_nowait(CheckpointReady(rows, sums))

    async def _submit_segment(self, rows: int) -> None:
        """Queue the sums of a segment, once those of the last one were sent.

        None is left out: until then, no further block is computed.
        """
        await self._sums_sent.wait()
        self._sums_sent.clear()
        self._segment_end = rows
        sums = self._worker.submit(self._pipeline, self._pipeline.end_segment)
        self._computed.put_nowait(CheckpointReady(rows, sums))

    def _next_rows(self) -> int | None:
        """Return the rows of the next block in order; None until it is complete."""
        number, validator = self._submitted, self._validator
        complete = number < validator.blocks_complete
        return validator.rows_of(number) if complete else None

    def _chunks(
        self, matrix: Matrix, first_row: int, array: Array
    ) -> Iterator[ResultChunk]:
        for chunk in self._pipeline.chunks(matrix, first_row, array):
            self._progress.bytes_sent += chunk.payload.nbytes
            yield chunk
