"""The total over a job's segments."""

from __future__ import annotations

import numpy as np

from gradwire_protocol.matrices import Matrix
from gradwire_server.backends.base import Times
from gradwire_server.backends.row_blocks import plan_row_blocks
from gradwire_server.jobs.segment_total import SegmentTotal
from tests.server.specs import make_spec

B, S = 2, 4
SPEC = make_spec(None, 1, 2, results=(Matrix.DW,), block_rows=B, segment_rows=S)


class Job:
    """A job whose sum is set from outside, and what is done with it."""

    def __init__(self, total: SegmentTotal) -> None:
        self._total = total
        self.sum = np.nan
        self._begun = False
        self.restarts = 0
        self.taken: list[float] = []

    def add(self, first_row: int, share: float, rows: int = B) -> None:
        """Have a row block's contribution added, after what precedes it."""
        self._total.begin_block(self, first_row, rows)
        self.sum = self.sum + share if self._begun else share
        self._begun = True

    def copy_sums(self, out) -> None:
        out[Matrix.DW][...] = self.sum

    def restart_sums(self) -> None:
        self.restarts += 1
        self._begun = False

    def take_sums(self, sums) -> None:
        self.taken.append(sums[Matrix.DW].copy())


def opened() -> tuple[SegmentTotal, Job]:
    plan = plan_row_blocks(SPEC, 1 << 20, 1)
    memory = np.full(plan.total_bytes, 0xFF, np.uint8)  # NaN
    total = SegmentTotal(SPEC, plan, memory, Times())
    return total, Job(total)


def copied(total: SegmentTotal, job: Job) -> np.ndarray:
    out = np.full((1, 2), np.nan)
    total.copy(job, {Matrix.DW: out})
    return out


def test_segments_are_added_when_they_are_complete():
    total, job = opened()
    assert not copied(total, job).any()
    seen = []
    for number, share in enumerate((1.0, 2.0, 4.0, 8.0, 16.0)):
        job.add(number * B, share)
        seen.append(copied(total, job)[0, 1])
    # The sums of a segment that is not complete are not among them.
    assert seen == [0.0, 3.0, 3.0, 15.0, 15.0]
    assert job.restarts == 2
    total.finish(job)
    assert [each.tolist() for each in job.taken] == [[[31.0, 31.0]]]


def test_the_only_segment_stays_where_it_is():
    for last_rows in (B, 1):
        total, job = opened()
        job.add(0, 1.0)
        job.add(B, 2.0, last_rows)
        total.finish(job)
        assert (job.restarts, job.taken) == (0, [])


def test_a_job_goes_on_with_the_total_of_its_earlier_attempt():
    total, job = opened()
    given = np.full((1, 2), 100.0)
    total.take({Matrix.DW: given})
    given.fill(np.nan)
    assert copied(total, job).tolist() == [[100.0, 100.0]]
    job.add(S, 1.0)
    total.finish(job)
    assert [each.tolist() for each in job.taken] == [[[101.0, 101.0]]]


def test_the_first_sum_is_taken_as_it_is():
    """Negative zero, for one, would not be the same after zero plus it."""
    total, job = opened()
    job.add(0, -0.0)
    job.add(B, -0.0)
    assert np.signbit(copied(total, job)).all()
