# Generated from _async/spread.py by scripts/generate-sync: edit that file.

"""Runs a job that is spread over several servers or devices."""

from __future__ import annotations

from gradwire._api.errors import GradwireError
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
    try:
        return _run(engine, job)
    except GradwireError:
        if not engine.has_changed(job.spread.unusable):
            raise
    # All servers are others than those that have answered, for example newer ones.
    job.begin_again()
    return _run(engine, job)


def _run(engine: SyncEngine, job: SpreadJob) -> Receipt:
    jobs = engine.spread(job.spread, job.left_s)
    unusable = job.spread.unusable
    job.start(lambda: engine.usable_servers(unusable))
    news = SyncNews()

    def work() -> None:
        while True:
            count = news.count
            part = job.begin(engine.jobs_at_once(job.spread))
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

    count = job.spread.division.segments
    if count > 1:  # each server may get every segment
        count *= max(1, engine.server_count(unusable))
    run_together(work, min(count, jobs + MOST_LATER), stop)
    return run_beside(job.deliver)
