"""A running job: its blocks' way from the intake through a lane to the outlet.

It knows nothing of gRPC. Of each connection, one task feeds it (`take`, `end`
or `half_close`) and another takes its results (`results`); all of them wait
where others or the lane are behind.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Self, TypeAlias

import numpy as np

from gradwire.wire.framing import Block
from gradwire.wire.matrices import ROW_RESULTS, Matrix
from gradwire_server.backends.base import Array, Backend, RowBlock, Wait
from gradwire_server.call import Counts
from gradwire_server.computation import Computation
from gradwire_server.extent import Extent
from gradwire_server.intake import Intake
from gradwire_server.lane import TenantLane
from gradwire_server.plan import Plan
from gradwire_server.ring import Ring
from gradwire_server.spec import JobSpec
from gradwire_server.timeline import ObserveJob, Stage


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive elements of a result, ready to leave."""

    matrix: Matrix
    index: int
    """Index of the first element within the matrix."""
    payload: memoryview
    """Valid until the next run is asked for."""


_Computed: TypeAlias = tuple[int, RowBlock, asyncio.Future[None]]
"""A block's number, its matrices, and when it is computed."""


class RunningJob:
    """An admitted job.

    Args:
        spec: What was asked.
        plan: How it is cut.
        backend: What computes it.
        lane: Where.
        counts: Told what was done.
        observe: Told when it is done.

    Use it as an async context manager: when it is left, for whatever cause,
    the lane has let go of its memory.
    """

    def __init__(
        self,
        spec: JobSpec,
        plan: Plan,
        backend: Backend,
        lane: TenantLane,
        counts: Counts,
        *,
        observe: ObserveJob,
    ) -> None:
        self._observe = observe
        self._counts = counts
        self.spec = spec
        self._plan = plan
        self._lane = lane
        self._computation = Computation(spec, plan, backend, lane.device, counts)
        connections = range(plan.connections)
        extent = Extent()
        self._intakes = [Intake(spec, plan, each, extent) for each in connections]
        self._backend = backend
        self._ring: Ring
        self._submitting = asyncio.Lock()
        self._submitted = 0
        self._heard_at = 0.0
        self._served_at = 0.0
        self._w_taken = Matrix.W not in spec.operands
        self._computed: list[asyncio.Queue[_Computed | None]]
        self._computed = [asyncio.Queue() for _ in connections]
        self._ended = asyncio.Event()
        self._complete = 0

    async def __aenter__(self) -> Self:
        try:
            self._ring = await self._lane.submit(self, self._open)
        except BaseException:
            await self._lane.discard(self)
            self._computation.close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            await self._lane.discard(self)
        finally:
            self._computation.close()
            self._computed = [asyncio.Queue() for _ in self._computed]
            self._ring.free()

    def owes_nothing_since(self) -> float:
        """When the last result that could leave has left; event loop's clock.

        Or when the last message came, if that was later: on one connection
        nothing may be due for long while rows come on another. Now, while row
        blocks are complete whose results have not left.
        """
        if self._ring.released < self._submitted:
            return asyncio.get_running_loop().time()
        return max(self._served_at, self._heard_at)

    async def take(self, block: Block, connection: int = 0) -> None:
        """Takes a message's elements; waits while the ring is full.

        Raises:
            JobError: The message does not continue the stream.
        """
        if block.payload:  # messages without elements are no progress
            self._heard_at = asyncio.get_running_loop().time()
        intake = self._intakes[connection]
        for span in intake.take(block):
            if span.matrix is not Matrix.W:
                await self._ring.wait_for_slot(span.block)
            block_number = None if span.matrix is Matrix.W else span.block
            self._observe(Stage.RECEIVING, block_number)
            self._ring.put(span)
            self._observe(Stage.RECEIVING, block_number)
            intake.placed(span)
            self._counts.bytes_received += span.payload.nbytes
            await self._submit_complete()

    async def end(self, m: int) -> None:
        """Takes the announcement that the job is complete, with m rows.

        Raises:
            JobError: It is not.
        """
        self._intakes[0].end(m)
        self._counts.m = m
        self._counts.ended = True
        self._ended.set()
        await self._connection_complete()

    def half_close(self, connection: int) -> None:
        """Takes it that a joined connection brings no more; End may come later.

        If something is missing the others would fill the ring, and End never
        be read.

        Raises:
            JobError: Something of its share is missing.
        """
        self._intakes[connection].half_close()

    async def ended(self) -> None:
        """Waits until End has come."""
        await self._ended.wait()

    async def share_complete(self, connection: int) -> None:
        """Takes it that a joined connection brought its share; End has come.

        Raises:
            JobError: Something of it is missing.
        """
        self._intakes[connection].end(self._counts.m)
        await self._connection_complete()

    async def results(self, connection: int = 0) -> AsyncGenerator[Run, None]:
        """A connection's results as they are ready.

        Y and dX of its row blocks, block by block; then, on the first, dW.

        Raises:
            Exception: What the backend raised.
        """
        queue = self._computed[connection]
        while (computed := await queue.get()) is not None:
            number, block, done = computed
            await done
            first_row = number * self._plan.block_rows
            for matrix, array in zip(ROW_RESULTS, (block.y, block.dx), strict=True):
                if array is not None:
                    for run in self._runs(matrix, first_row, array):
                        yield run
            self._ring.release(number)
            self._served_at = asyncio.get_running_loop().time()
        if Matrix.DW in self.spec.results and not connection:
            dw = await self._lane.submit(self, self._computation.finish)
            for run in self._runs(Matrix.DW, 0, dw):
                yield run

    async def _connection_complete(self) -> None:
        """A connection has brought its share, and its last block is complete."""
        await self._submit_complete()
        self._complete += 1
        if self._complete == len(self._intakes):
            for queue in self._computed:
                queue.put_nowait(None)

    async def _submit_complete(self) -> None:
        """Hands to the lane, in order, the blocks that have become complete."""
        if not self._plan.slot_bytes:  # rows without elements are done at once
            return
        async with self._submitting:
            while (rows := self._next_rows()) is not None:
                number = self._submitted
                await self._ring.wait_for_slot(number)
                block = self._ring.rows(number, rows)
                done = self._lane.begin(self, partial(self._compute, number, block))
                queue = self._computed[number % self._plan.connections]
                queue.put_nowait((number, block, done))
                self._submitted += 1
                self._counts.blocks_received = self._submitted

    def _next_rows(self) -> int | None:
        """Rows of the next block in order; None while it is not complete."""
        number, connection = divmod(self._submitted, self._plan.connections)
        intake = self._intakes[connection]
        complete = number < intake.blocks_complete
        return intake.rows_of(number) if complete else None

    def _runs(self, matrix: Matrix, first_row: int, array: Array) -> Iterator[Run]:
        itemsize = array.dtype.itemsize
        size = max(self.spec.max_block_bytes // itemsize, 1)
        first = first_row * array.shape[1]
        elements = array.reshape(-1).view(np.uint8).data
        number = None if matrix is Matrix.DW else first_row // self._plan.block_rows
        for start in range(0, array.size, size):
            payload = elements[start * itemsize : (start + size) * itemsize]
            self._counts.bytes_sent += payload.nbytes
            self._observe(Stage.SENDING, number)
            yield Run(matrix, first + start, payload)
            self._observe(Stage.SENDING, number)

    def _open(self) -> Ring:
        """Runs in the lane's thread."""
        region = self._backend.empty(self._plan.region_bytes)
        self._computation.open()
        return Ring(self.spec, self._plan, region)

    def _compute(self, number: int, block: RowBlock) -> Wait | None:
        """Runs in the lane's thread."""
        if not self._w_taken:
            self._computation.take_w(self._ring.w())
            self._w_taken = True
        self._observe(Stage.COMPUTING, number)
        wait = self._computation.take_block(block)
        if wait is None:
            self._observe(Stage.COMPUTING, number)
            return None
        return partial(self._computed_after, wait, number)

    def _computed_after(self, wait: Wait, number: int) -> None:
        wait()
        self._observe(Stage.COMPUTING, number)
