"""Which device a job goes to."""

from __future__ import annotations

import pytest

from gradwire_server.backends.row_blocks import plan_row_blocks
from gradwire_server.scheduling.device_selector import DeviceSelector, Load, make_load
from gradwire_server.scheduling.job_progress import JobProgress
from tests.server.specs import make_spec


def load(rows=10, *, device_bytes=0, row_operations=1):
    """A job with blocks of one row; m is open where `rows` is None."""
    return Load(row_operations, 1, rows, device_bytes, JobProgress())


def done(job, blocks, seconds=0.0):
    job.progress.blocks = blocks
    job.progress.times.computing_s = seconds


def test_a_job_goes_where_least_is_still_left():
    selector = DeviceSelector((None, None, None))
    jobs = [load(rows) for rows in (30, 20, 10)]
    assert [selector.assign(job) for job in jobs] == [0, 1, 2]
    assert selector.assign(load(1)) == 2
    done(jobs[0], 25)
    assert selector.assign(load(1)) == 0


def test_where_as_much_is_left_the_fewest_jobs_decide_and_then_the_order():
    selector = DeviceSelector((None, None))
    assert selector.assign(load(4)) == 0
    assert selector.assign(load(1)) == 1
    assert selector.assign(load(3)) == 1
    assert selector.assign(load(1)) == 0  # 4 and 4 to do: it has one job, the other two
    idle = DeviceSelector((None, None))
    assert idle.assign(load(5)) == 0


def test_a_fast_device_has_more_left_and_is_free_as_soon():
    selector = DeviceSelector((None, None))
    for seconds, position in ((4.0, 0), (1.0, 1)):
        job = load(100)
        selector.assign(job)
        if position:
            done(job, 100, seconds)
        else:
            slow = job
    done(slow, 100, 4.0)
    selector.release(slow, 0)
    selector.release(job, 1)
    # 25 and 100 operations a second are known now.
    assert selector.assign(load(10)) == 0
    assert selector.assign(load(30)) == 1
    assert selector.assign(load(1)) == 1  # 0.4 s against 0.3 s


def test_a_device_that_has_shown_nothing_counts_as_the_others():
    selector = DeviceSelector((None, None))
    first = load(100)
    selector.assign(first)
    done(first, 50, 1.0)
    assert selector.assign(load(49)) == 1
    assert selector.assign(load(1)) == 1  # 50 to do against 49
    assert selector.assign(load(1)) == 0  # 50 each: it has one job, the other two


def test_a_job_of_unknown_length_counts_what_has_come_and_one_block():
    job = load(None)
    assert job.remaining_ops == 1
    job.progress.blocks_received = 3
    assert job.remaining_ops == 4
    job.progress.blocks = 3
    assert job.remaining_ops == 1
    job.progress.ended, job.progress.m = True, 3
    assert job.remaining_ops == 0


def test_the_operations_of_a_job_are_those_of_its_products():
    spec = make_spec(m=10, n=3, k=4)
    job = make_load(spec, plan_row_blocks(spec, 1 << 20, 1), 0, JobProgress())
    assert job.remaining_ops == spec.operations
    assert job.done == 0
    job.progress.blocks = 1  # the only one, and larger than the job
    assert (job.remaining_ops, job.done) == (0, spec.operations)


def test_memory_comes_before_speed_and_is_given_back():
    selector = DeviceSelector((10, 20))
    assert selector.max_bytes == 20
    large = load(100, device_bytes=15)
    assert selector.assign(large) == 1
    other = load(1000, device_bytes=8)
    assert selector.assign(other) == 0
    assert selector.assign(load(1, device_bytes=6)) is None
    assert selector.assign(load(1, device_bytes=5)) == 1
    selector.release(other, 0)
    assert selector.held_bytes(0) == 0
    assert selector.assign(load(1, device_bytes=10)) == 0


def test_a_device_without_memory_of_its_own_holds_any_job():
    assert DeviceSelector((None, 10)).max_bytes is None
    assert DeviceSelector((None,)).assign(load(1, device_bytes=1 << 60)) == 0


@pytest.mark.parametrize("count", [1, 4])
def test_equal_jobs_are_dealt_evenly(count):
    selector = DeviceSelector((None,) * count)
    positions = [selector.assign(load()) for _ in range(3 * count)]
    assert positions == list(range(count)) * 3
