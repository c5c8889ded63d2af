"""Runs the jobs of a batch."""

from __future__ import annotations

from gradwire._api.types import Receipt
from gradwire._client._async.engine import AsyncEngine
from gradwire._client._async.spread import run_spread
from gradwire._client.batch_job import BatchJob, Part
from gradwire._client.spread_job import SpreadJob
from gradwire._resilience.array_job import ArrayJob
from gradwire._transport.async_io import run_beside, run_together


async def run(engine: AsyncEngine, job: ArrayJob | BatchJob | SpreadJob) -> Receipt:
    """Compute a job, or the jobs of a batch, several at the same time.

    Raises:
        GradwireError: A job failed. The others are cancelled.
    """
    if isinstance(job, ArrayJob):
        return await engine.run(job)
    if isinstance(job, SpreadJob):
        return await run_spread(engine, job)
    batch = job

    async def work() -> None:
        while (part := await _begin(batch)) is not None:
            try:
                receipt = await engine.run(part.job)
            except BaseException as error:
                batch.fail(part, error)
                raise
            await _end(batch, part, receipt)

    await run_together(work, batch.in_flight, batch.stop)
    return batch.deliver()


async def _begin(batch: BatchJob) -> Part | None:
    if batch.copies:
        return await run_beside(batch.begin)
    return batch.begin()


async def _end(batch: BatchJob, part: Part, receipt: Receipt) -> None:
    if batch.copies:
        await run_beside(lambda: batch.end(part, receipt))
    else:
        batch.end(part, receipt)
