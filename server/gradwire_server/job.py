"""A running job: its blocks' way from the intake through a lane to the outlet.

It knows nothing of gRPC. One task feeds it (`take`, `end`), another takes
its results (`results`); both wait where the other or the lane is behind.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Self

import numpy as np

from gradwire.wire.framing import Block
from gradwire.wire.matrices import ROW_RESULTS, Matrix
from gradwire_server.backends.base import Array, Backend, RowBlock
from gradwire_server.call import Counts
from gradwire_server.computation import Computation
from gradwire_server.intake import Intake
from gradwire_server.lane import Lane
from gradwire_server.plan import Plan
from gradwire_server.ring import Ring
from gradwire_server.spec import JobSpec


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive elements of a result, ready to leave."""

    matrix: Matrix
    index: int
    """Index of the first element within the matrix."""
    payload: memoryview
    """Valid until the next run is asked for."""


class RunningJob:
    """An admitted job.

    Args:
        spec: What was asked.
        plan: How it is cut.
        backend: What computes it.
        lane: Where.
        counts: Told what was done.

    Use it as an async context manager: when it is left, for whatever cause,
    the lane has let go of its memory.
    """

    def __init__(
        self, spec: JobSpec, plan: Plan, backend: Backend, lane: Lane, counts: Counts
    ) -> None:
        self._counts = counts
        self._spec = spec
        self._plan = plan
        self._lane = lane
        self._computation = Computation(spec, plan, backend, lane.device, counts)
        self._intake = Intake(spec, plan)
        self._ring = Ring(spec, plan)
        self._submitted = 0
        self._served_at = 0.0
        self._w_taken = Matrix.W not in spec.operands
        self._computed: asyncio.Queue[tuple[int, RowBlock, asyncio.Future[None]] | None]
        self._computed = asyncio.Queue()

    async def __aenter__(self) -> Self:
        try:
            await self._lane.submit(self, self._computation.open)
        except BaseException:
            await self._lane.discard(self)
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
            self._computed = asyncio.Queue()
            self._ring.free()

    def owes_nothing_since(self) -> float:
        """When the last result that could leave has left; event loop's clock.

        Now, while row blocks are complete whose results have not left.
        """
        if self._ring.released < self._submitted:
            return asyncio.get_running_loop().time()
        return self._served_at

    async def take(self, block: Block) -> None:
        """Takes a message's elements; waits while the ring is full.

        Raises:
            JobError: The message does not continue the stream.
        """
        for span in self._intake.take(block):
            if span.matrix is not Matrix.W:
                await self._ring.wait_for_slot(span.block)
            self._ring.put(span)
            self._counts.bytes_received += span.payload.nbytes
            await self._submit_complete()

    async def end(self, m: int) -> None:
        """Takes the announcement that the job is complete, with m rows.

        Raises:
            JobError: It is not.
        """
        self._intake.end(m)
        self._counts.m = m
        await self._submit_complete()
        self._computed.put_nowait(None)

    async def results(self) -> AsyncGenerator[Run, None]:
        """The results as they are ready: Y and dX block by block, then dW.

        Raises:
            Exception: What the backend raised.
        """
        while (computed := await self._computed.get()) is not None:
            number, block, done = computed
            await done
            first_row = number * self._plan.block_rows
            for matrix, array in zip(ROW_RESULTS, (block.y, block.dx), strict=True):
                if array is not None:
                    for run in self._runs(matrix, first_row, array):
                        yield run
            self._ring.release()
            self._served_at = asyncio.get_running_loop().time()
        if Matrix.DW in self._spec.results:
            dw = await self._lane.submit(self, self._computation.finish)
            for run in self._runs(Matrix.DW, 0, dw):
                yield run

    async def _submit_complete(self) -> None:
        """Hands to the lane the blocks that have become complete."""
        if not self._plan.slot_bytes:  # rows without elements are done at once
            return
        while self._submitted < self._intake.blocks_complete:
            number = self._submitted
            await self._ring.wait_for_slot(number)
            block = self._ring.rows(number, self._intake.rows_of(number))
            done = self._lane.submit(self, partial(self._compute, block))
            self._computed.put_nowait((number, block, done))
            self._submitted += 1

    def _runs(self, matrix: Matrix, first_row: int, array: Array) -> Iterator[Run]:
        itemsize = array.dtype.itemsize
        size = max(self._spec.max_block_bytes // itemsize, 1)
        first = first_row * array.shape[1]
        elements = array.reshape(-1).view(np.uint8).data
        for start in range(0, array.size, size):
            payload = elements[start * itemsize : (start + size) * itemsize]
            self._counts.bytes_sent += payload.nbytes
            yield Run(matrix, first + start, payload)

    def _compute(self, block: RowBlock) -> None:
        """Runs in the lane's thread."""
        if not self._w_taken:
            self._computation.take_w(self._ring.w())
            self._w_taken = True
        self._computation.take_block(block)
