"""Turns and memory."""

from __future__ import annotations

import asyncio

import pytest

from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.limits import MIB
from gradwire_server.admission.controller import CALL_BYTES, Admission
from gradwire_server.errors import JobError
from gradwire_server.scheduling.device_selector import DeviceSelector, Load
from gradwire_server.scheduling.job_progress import JobProgress


class Jobs:
    """Jobs that run until they are told to end."""

    def __init__(self, admission):
        self.admission = admission
        self.told = {}
        self.running = []
        self.devices = {}
        self.ends = {}
        self.tasks = {}

    async def start(self, name, size_bytes=MIB, device_bytes=0, tenant=""):
        self.told[name] = []
        self.ends[name] = asyncio.Event()
        self.tasks[name] = asyncio.ensure_future(
            self._run(name, size_bytes, device_bytes, tenant)
        )
        await self.settle()

    async def end(self, name):
        self.ends[name].set()
        await self.tasks[name]
        await self.settle()

    async def settle(self):
        for _ in range(10):
            await asyncio.sleep(0)

    async def _run(self, name, size_bytes, device_bytes, tenant):
        async def on_wait(ahead):
            self.told[name].append(ahead)

        load = Load(1, 1, 1, device_bytes, JobProgress())
        async with self.admission.job(size_bytes, load, on_wait, tenant) as position:
            self.running.append(name)
            self.devices[name] = position
            await self.ends[name].wait()
            self.running.remove(name)


def make_jobs(memory_limit=16 * MIB, max_jobs=2, max_queue=2, devices=None):
    return Jobs(
        Admission(memory_limit, max_jobs, max_queue, devices or DeviceSelector())
    )


async def reason_of(task):
    with pytest.raises(JobError) as caught:
        await task
    return caught.value.reason


async def test_jobs_wait_in_the_order_they_came_and_hear_their_place():
    jobs = make_jobs(max_jobs=1)
    for name in "abc":
        await jobs.start(name)
    assert jobs.running == ["a"]
    await jobs.end("a")
    assert jobs.running == ["b"]
    await jobs.end("b")
    assert jobs.running == ["c"]
    await jobs.end("c")
    assert jobs.told == {"a": [], "b": [1], "c": [2, 1]}
    assert jobs.admission.held_bytes == 0


async def test_a_job_waits_for_memory_and_is_not_overtaken():
    jobs = make_jobs(max_jobs=9)
    await jobs.start("half", 10 * MIB)
    await jobs.start("large", 12 * MIB)
    await jobs.start("small", 1 * MIB)
    assert jobs.running == ["half"]
    await jobs.end("half")
    assert jobs.running == ["large", "small"]


async def test_a_full_queue_refuses_with_a_time_to_try_again():
    jobs = make_jobs(max_jobs=1, max_queue=1)
    for name in "abc":
        await jobs.start(name)
    with pytest.raises(JobError) as caught:
        await jobs.tasks["c"]
    assert caught.value.reason is Reason.BUSY
    assert caught.value.retry_after_s == pytest.approx(1.0)
    await jobs.end("a")
    assert jobs.running == ["b"]


async def test_without_a_queue_jobs_still_run():
    jobs = make_jobs(max_jobs=1, max_queue=0)
    await jobs.start("a")
    assert jobs.running == ["a"]
    await jobs.start("b")
    assert await reason_of(jobs.tasks["b"]) is Reason.BUSY


async def test_a_job_that_can_never_fit_is_refused_for_good():
    jobs = make_jobs()
    await jobs.start("vast", 16 * MIB)
    assert await reason_of(jobs.tasks["vast"]) is Reason.JOB_TOO_LARGE


async def test_a_job_that_gives_up_waiting_makes_way():
    jobs = make_jobs(max_jobs=9)
    await jobs.start("half", 10 * MIB)
    await jobs.start("large", 12 * MIB)
    await jobs.start("small", 1 * MIB)
    jobs.tasks["large"].cancel()
    await jobs.settle()
    assert jobs.running == ["half", "small"]
    await jobs.end("half")
    await jobs.end("small")
    assert jobs.admission.held_bytes == 0
    assert jobs.admission.running == 0


async def test_a_drain_refuses_who_waits_and_lets_who_runs_finish():
    jobs = make_jobs(max_jobs=1)
    await jobs.start("runs")
    await jobs.start("waits")
    jobs.admission.drain()
    assert await reason_of(jobs.tasks["waits"]) is Reason.DRAINING
    await jobs.start("late")
    assert await reason_of(jobs.tasks["late"]) is Reason.DRAINING
    with pytest.raises(JobError) as caught, jobs.admission.call():
        pass
    assert caught.value.reason is Reason.DRAINING
    idle = asyncio.ensure_future(jobs.admission.wait_idle())
    await jobs.settle()
    assert not idle.done()
    await jobs.end("runs")
    await idle


async def test_open_calls_hold_memory_too():
    admission = Admission(16 * MIB, 2, 2, DeviceSelector())
    with admission.call(), admission.call():
        assert admission.held_bytes == 2 * CALL_BYTES
    full = Admission(CALL_BYTES, 2, 2, DeviceSelector())
    with full.call(), pytest.raises(JobError) as caught, full.call():
        pass
    assert caught.value.reason is Reason.BUSY
    assert admission.held_bytes == full.held_bytes == 0


async def test_open_calls_leave_room_for_the_job_that_waits():
    jobs = make_jobs(memory_limit=16 * CALL_BYTES, max_jobs=9)
    await jobs.start("a", 10 * CALL_BYTES)
    with jobs.admission.call(), jobs.admission.call():
        await jobs.start("b", 13 * CALL_BYTES)
        assert jobs.running == ["a"]
        with jobs.admission.call():
            for _ in range(2):
                with pytest.raises(JobError) as caught, jobs.admission.call():
                    pass
                assert caught.value.reason is Reason.BUSY
            await jobs.start(
                "c", 14 * CALL_BYTES
            )  # could not run beside the open calls
            assert await reason_of(jobs.tasks["c"]) is Reason.BUSY
            await jobs.end("a")
            assert jobs.running == ["b"]
            await jobs.end("b")
    assert jobs.admission.held_bytes == 0


async def test_a_job_waits_for_a_devices_memory_and_is_not_overtaken():
    jobs = make_jobs(max_jobs=9, max_queue=9, devices=DeviceSelector((6, 8)))
    await jobs.start("a", device_bytes=4)
    await jobs.start("b", device_bytes=4)
    await jobs.start("large", device_bytes=7)
    await jobs.start("small", device_bytes=1)
    assert jobs.devices == {"a": 0, "b": 1}
    assert jobs.told["large"] == [2]
    await jobs.end("a")
    assert jobs.running == ["b"]
    await jobs.end("b")
    assert jobs.devices["large"] == 1
    assert jobs.devices["small"] == 0
    for name in ("large", "small"):
        await jobs.end(name)
    assert [jobs.admission.devices.held_bytes(position) for position in (0, 1)] == [
        0,
        0,
    ]


async def test_a_job_that_no_device_can_ever_hold_is_refused_for_good():
    jobs = make_jobs(devices=DeviceSelector((6, 8)))
    await jobs.start("vast", device_bytes=9)
    with pytest.raises(JobError, match=r"9 bytes of a device's memory.* 8") as caught:
        await jobs.tasks["vast"]
    assert caught.value.reason is Reason.JOB_TOO_LARGE


async def test_a_job_that_gives_up_waiting_for_a_device_makes_way():
    jobs = make_jobs(max_jobs=9, devices=DeviceSelector((8,)))
    await jobs.start("a", device_bytes=5)
    await jobs.start("large", device_bytes=7)
    await jobs.start("small", device_bytes=1)
    jobs.tasks["large"].cancel()
    await jobs.settle()
    assert jobs.running == ["a", "small"]
    await jobs.end("a")
    await jobs.end("small")
    assert jobs.admission.devices.held_bytes(0) == 0
