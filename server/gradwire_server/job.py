"""A running job: its blocks' way from the intake through a lane to the outlet.

It knows nothing of gRPC. One task feeds it (`take`, `end`), another takes
its results (`results`); both wait where the other or the lane is behind.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Self

import numpy as np

from gradwire.wire.framing import Block
from gradwire.wire.matrices import ROW_RESULTS, Matrix
from gradwire_server.backends.base import Array, Backend, BackendJob, RowBlock
from gradwire_server.intake import Intake
from gradwire_server.lane import Lane
from gradwire_server.plan import Plan
from gradwire_server.ring import Ring
from gradwire_server.spec import JobSpec


@dataclass(slots=True)
class Counts:
    """What a job has done so far."""

    blocks: int = 0
    """Row blocks computed."""
    computing_s: float = 0.0
    bytes_sent: int = 0


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

    Use it as an async context manager: when it is left, for whatever cause,
    the lane has let go of its memory.
    """

    def __init__(self, spec: JobSpec, plan: Plan, backend: Backend, lane: Lane) -> None:
        self.counts = Counts()
        self._spec = spec
        self.plan = plan
        self._backend = backend
        self._lane = lane
        self._intake = Intake(spec, plan)
        self._ring = Ring(spec, plan)
        self._submitted = 0
        self._served_at = 0.0
        self._w_taken = False
        self._computed: asyncio.Queue[tuple[int, RowBlock, asyncio.Future[None]] | None]
        self._computed = asyncio.Queue()
        self._job: BackendJob | None = None

    async def __aenter__(self) -> Self:
        try:
            self._job = await self._lane.submit(self, self._open)
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
            self._job = None
            self._ring.free()

    @property
    def bytes_received(self) -> int:
        """Bytes of operands so far."""
        return self._intake.bytes_received

    @property
    def m(self) -> int:
        """Rows of the complete job; 0 before that."""
        return self._intake.m or 0

    @property
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
            await self._submit_complete()

    async def end(self, m: int) -> None:
        """Takes the announcement that the job is complete, with m rows.

        Raises:
            JobError: It is not.
        """
        self._intake.end(m)
        await self._submit_complete()
        self._computed.put_nowait(None)

    async def results(self) -> AsyncIterator[Run]:
        """The results as they are ready: Y and dX block by block, then dW.

        Raises:
            Exception: What the backend raised.
        """
        while (computed := await self._computed.get()) is not None:
            number, block, done = computed
            await done
            first_row = number * self.plan.block_rows
            for matrix, array in zip(ROW_RESULTS, (block.y, block.dx), strict=True):
                if array is not None:
                    for run in self._runs(matrix, first_row, array):
                        yield run
            self._ring.release()
            self._served_at = asyncio.get_running_loop().time()
        if Matrix.DW in self._spec.results:
            dw = await self._lane.submit(self, self._finish)
            for run in self._runs(Matrix.DW, 0, dw):
                yield run

    async def _submit_complete(self) -> None:
        """Hands to the lane the blocks that have become complete."""
        if not self._has_elements:
            return
        while self._submitted < self._intake.blocks_complete:
            number = self._submitted
            await self._ring.wait_for_slot(number)
            block = self._ring.rows(number, self._intake.rows_of(number))
            done = self._lane.submit(self, partial(self._compute, block))
            self._computed.put_nowait((number, block, done))
            self._submitted += 1

    @property
    def _has_elements(self) -> bool:
        """Whether rows have any: else any m is done at once."""
        spec = self._spec
        return any(spec.row_length(matrix) for matrix in self.plan.row_matrices)

    def _runs(self, matrix: Matrix, first_row: int, array: Array) -> Iterator[Run]:
        itemsize = array.dtype.itemsize
        size = max(self._spec.max_block_bytes // itemsize, 1)
        first = first_row * array.shape[1]
        elements = array.reshape(-1).view(np.uint8).data
        for start in range(0, array.size, size):
            payload = elements[start * itemsize : (start + size) * itemsize]
            self.counts.bytes_sent += payload.nbytes
            yield Run(matrix, first + start, payload)

    # What follows runs in the lane's thread.

    def _open(self) -> BackendJob:
        return self._backend.open_job(
            self._spec, self.plan.slot_rows, self._lane.device
        )

    def _compute(self, block: RowBlock) -> None:
        started = time.perf_counter()
        job = self._opened()
        if not self._w_taken and Matrix.W in self._spec.operands:
            job.take_w(self._ring.w())
            self._w_taken = True
        job.take_block(block)
        self.counts.blocks += 1
        self.counts.computing_s += time.perf_counter() - started

    def _finish(self) -> Array:
        started = time.perf_counter()
        dw = self._opened().finish()
        self.counts.computing_s += time.perf_counter() - started
        return dw

    def _opened(self) -> BackendJob:
        if self._job is None:
            raise RuntimeError("the job is not open")
        return self._job
