# Generated from _async/spread.py by scripts/generate-sync: edit that file.

"""Runs a job that is spread over several servers or devices."""

from __future__ import annotations

from gradwire._api.types import Receipt
from gradwire._client._sync.engine import SyncEngine
from gradwire._client.spread_job import Part, SpreadJob
from gradwire._core.segments import MOST_LATER
from gradwire._transport.sync_io import SyncNews, run_beside, run_together


def run_spread(engine: SyncEngine, job: SpreadJob) -> Receipt:
    """Compute a job's segments on all servers of the client.

    Raises:
        GradwireError: A segment could not be computed. The other jobs are cancelled.
    """
    jobs = engine.spread(job.spread)
    job.begin_reports()
    unusable = job.spread.unusable
    news = SyncNews()

    def work() -> None:
        while True:
            count = news.count
            part = job.begin(
                engine.jobs_at_once(unusable), several=engine.has_several(unusable)
            )
            if part is None:
                news.tell()
                return
            if isinstance(part, Part):
                compute(part)
                news.tell()
            else:
                news.wait(count, part)

    def compute(part: Part) -> None:
        try:
            receipt = engine.run(part.job)
        except BaseException as error:
            if job.fail(part, error):
                raise
            return
        run_beside(lambda: job.end(part, receipt))

    def stop() -> None:
        job.stop()
        news.tell()

    run_together(work, min(job.run_count, jobs + MOST_LATER), stop)
    return run_beside(job.deliver)
