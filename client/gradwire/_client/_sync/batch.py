# Generated from _async/batch.py by scripts/generate-sync: edit that file.

"""Runs the jobs of a batch."""

from __future__ import annotations

from gradwire._api.types import Receipt
from gradwire._client._sync.engine import SyncEngine
from gradwire._client._sync.spread import run_spread
from gradwire._client.batch_job import BatchJob, Part
from gradwire._client.spread_job import SpreadJob
from gradwire._resilience.array_job import ArrayJob
from gradwire._transport.sync_io import run_beside, run_together


def run(engine: SyncEngine, job: ArrayJob | BatchJob | SpreadJob) -> Receipt:
    """Compute a job, or the jobs of a batch, several at the same time.

    Raises:
        GradwireError: A job failed. The others are cancelled.
    """
    if isinstance(job, ArrayJob):
        return engine.run(job)
    if isinstance(job, SpreadJob):
        return run_spread(engine, job)
    batch = job

    def work() -> None:
        while (part := _begin(batch)) is not None:
            try:
                receipt = engine.run(part.job)
            except BaseException as error:
                batch.fail(part, error)
                raise
            _end(batch, part, receipt)

    run_together(work, batch.in_flight, batch.stop)
    return batch.deliver()


def _begin(batch: BatchJob) -> Part | None:
    if batch.copies:
        return run_beside(batch.begin)
    return batch.begin()


def _end(batch: BatchJob, part: Part, receipt: Receipt) -> None:
    if batch.copies:
        run_beside(lambda: batch.end(part, receipt))
    else:
        batch.end(part, receipt)
