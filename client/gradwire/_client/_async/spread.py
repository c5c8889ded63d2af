"""Runs a job that is spread over several servers or devices."""

from __future__ import annotations

from gradwire._api.errors import GradwireError
from gradwire._api.types import Receipt
from gradwire._client._async.engine import AsyncEngine
from gradwire._client.spread_job import Part, SpreadJob
from gradwire._core.segments import MOST_LATER
from gradwire._transport.async_io import AsyncNews, run_beside, run_together


async def run_spread(engine: AsyncEngine, job: SpreadJob) -> Receipt:
    """Compute a job's segments on all servers of the client.

    Raises:
        GradwireError: A segment could not be computed. The other jobs are cancelled.
    """
    try:
        return await _run(engine, job)
    except GradwireError:
        if not engine.has_changed(job.spread.unusable):
            raise
    # All servers are others than those that have answered, for example newer ones.
    job.begin_again()
    return await _run(engine, job)


async def _run(engine: AsyncEngine, job: SpreadJob) -> Receipt:
    jobs = await engine.spread(job.spread, job.left_s)
    unusable = job.spread.unusable
    job.start(lambda: engine.usable_servers(unusable))
    news = AsyncNews()

    async def work() -> None:
        while True:
            count = news.count
            part = job.begin(engine.jobs_at_once(job.spread))
            if part is None:
                news.tell()
                return
            if isinstance(part, Part):
                await compute(part)
                news.tell()
            else:
                await news.wait(count, part)

    async def compute(part: Part) -> None:
        try:
            receipt = await engine.run(part.job)
        except BaseException as error:
            if job.fail(part, error):
                raise
            return
        await run_beside(lambda: job.end(part, receipt))

    def stop() -> None:
        job.stop()
        news.tell()

    count = job.spread.division.segments
    if count > 1:  # each server may get every segment
        count *= max(1, engine.server_count(unusable))
    await run_together(work, min(count, jobs + MOST_LATER), stop)
    return await run_beside(job.deliver)
