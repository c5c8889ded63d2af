"""Turns on a device worker."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

import pytest

from gradwire_server.backends.base import Wait
from gradwire_server.scheduling.device_worker import DeviceWorker
from gradwire_server.scheduling.fair_queue import MAX_LEAD_S


class Device:
    """Does what has begun when the test lets it, in the order of beginning."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.ended: list[str] = []
        self.gates: dict[str, threading.Event] = {}
        self._changed = threading.Condition()

    def piece(self, name: str, error: Exception | None = None) -> Callable[[], Wait]:
        self.gates[name] = threading.Event()

        def begin() -> Wait:
            with self._changed:
                self.begun.append(name)
                self._changed.notify_all()
            return wait

        def wait() -> None:
            assert self.gates[name].wait(10)
            self.ended.append(name)
            if error is not None:
                raise error

        return begin

    async def has_begun(self, count: int) -> None:
        def wait() -> None:
            with self._changed:
                assert self._changed.wait_for(lambda: len(self.begun) >= count, 10)

        await asyncio.to_thread(wait)


@pytest.fixture
def wide_worker():
    worker = DeviceWorker(0, max_in_flight=2)
    yield worker
    worker.close()


@pytest.fixture
def wide_handle(wide_worker):
    return wide_worker.of("")


@pytest.fixture
def worker():
    worker = DeviceWorker(0)
    yield worker
    worker.close()


@pytest.fixture
def handle(worker):
    return worker.of("")


async def test_jobs_take_turns_piece_by_piece(handle):
    gate, order = threading.Event(), []
    held = handle.submit("gate", gate.wait)
    work = [
        handle.submit("large", lambda i=i: order.append(f"large{i}")) for i in (0, 1, 2)
    ]
    work += [handle.submit("small", lambda: order.append("small"))]
    gate.set()
    await asyncio.gather(held, *work)
    assert order == ["large0", "small", "large1", "large2"]


async def test_tenants_take_turns_and_then_each_ones_jobs(worker):
    order = []

    def submit(tenant, job, pieces):
        handle = worker.of(tenant)
        return [
            handle.submit(job, lambda i=i: order.append(f"{job}{i}"))
            for i in range(pieces)
        ]

    gate = threading.Event()
    work = [worker.of("").submit("gate", gate.wait)]
    for job in range(100):
        work += submit("many", f"many{job}.", 2)
    work += submit("one", "one", 3)
    work += submit("two", "two", 2)
    gate.set()
    await asyncio.gather(*work)
    # At most as many turns as there are tenants lie between two of one's.
    assert order[:9] == [
        *("many0.0", "one0", "two0"),
        *("many1.0", "one1", "two1"),
        *("many2.0", "one2", "many3.0"),
    ]
    assert len(order) == 205


async def test_a_tenant_whose_pieces_take_long_lets_others_by(worker):
    gate, order = threading.Event(), []

    def work_long() -> None:
        time.sleep(1.5 * MAX_LEAD_S)
        order.append("wide")

    work = [worker.of("").submit("gate", gate.wait)]
    work += [worker.of("wide").submit("job", work_long) for _ in range(2)]
    small = worker.of("small")
    work += [small.submit("job", lambda: order.append("small")) for _ in range(9)]
    gate.set()
    await asyncio.gather(*work)
    assert order == ["wide", *["small"] * 9, "wide"]


async def test_a_job_that_is_dropped_leaves_its_tenants_turns_to_others(worker):
    handle, gate, done = worker.of("tenant"), threading.Event(), []
    held = handle.submit("gate", gate.wait)
    dropped = [handle.submit("a", lambda: done.append("a")) for _ in range(3)]
    kept = handle.submit("b", lambda: done.append("b"))
    await handle.discard("a")
    gate.set()
    await asyncio.gather(held, kept)
    assert done == ["b"]
    assert all(piece.cancelled() for piece in dropped)


async def test_results_and_errors_reach_who_waits(handle):
    assert await handle.submit("job", lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        await handle.submit("job", lambda: 1 // 0)
    assert await handle.submit("job", lambda: 8) == 8


async def test_a_discarded_job_computes_at_most_the_piece_in_hand(handle):
    entered, gate, done = threading.Event(), threading.Event(), []

    def first():
        entered.set()
        gate.wait()
        done.append("first")

    started = handle.submit("job", first)
    waiting = [handle.submit("job", lambda: done.append("more")) for _ in range(5)]
    await asyncio.to_thread(entered.wait)
    discarded = asyncio.ensure_future(handle.discard("job"))
    await asyncio.sleep(0)
    assert not discarded.done()
    gate.set()
    await discarded
    assert done == ["first"]
    assert await started is None
    assert all(piece.cancelled() for piece in waiting)
    assert await handle.submit("other", lambda: "goes on") == "goes on"


async def test_a_discard_that_is_cancelled_still_waits_for_the_worker(handle):
    entered, gate = threading.Event(), threading.Event()

    def piece():
        entered.set()
        gate.wait()

    handle.submit("job", piece)
    await asyncio.to_thread(entered.wait)
    discarded = asyncio.ensure_future(handle.discard("job"))
    await asyncio.sleep(0)
    discarded.cancel()
    await asyncio.sleep(0)
    assert not discarded.done()
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await discarded


async def test_a_device_is_given_more_before_it_is_done_but_not_too_much(wide_handle):
    device = Device()
    names = ["a0", "b0", "a1", "b1"]
    done = [wide_handle.begin(name[0], device.piece(name)) for name in names]
    await device.has_begun(2)
    await asyncio.sleep(0.05)  # for a third, which must not begin
    assert device.begun == ["a0", "b0"]
    device.gates["a0"].set()
    await done[0]
    await device.has_begun(3)
    assert device.begun == ["a0", "b0", "a1"]
    for gate in device.gates.values():
        gate.set()
    await asyncio.gather(*done)
    assert device.begun == device.ended == names


async def test_what_fails_after_it_has_begun_reaches_who_waits(wide_handle):
    device = Device()
    failing = wide_handle.begin("a", device.piece("a0", ZeroDivisionError()))
    fine = wide_handle.begin("b", device.piece("b0"))
    for gate in device.gates.values():
        gate.set()
    with pytest.raises(ZeroDivisionError):
        await failing
    assert await fine is None


async def test_work_may_be_done_where_it_might_only_have_begun(wide_handle):
    assert await wide_handle.begin("a", lambda: None) is None
    with pytest.raises(ZeroDivisionError):
        await wide_handle.begin("a", lambda: 1 // 0)


async def test_a_discarded_job_is_waited_for_on_the_device(wide_handle):
    device = Device()
    done = wide_handle.begin("a", device.piece("a0"))
    await device.has_begun(1)
    discarded = asyncio.ensure_future(wide_handle.discard("a"))
    await asyncio.sleep(0.02)
    assert not discarded.done()
    device.gates["a0"].set()
    await discarded
    assert device.ended == ["a0"]
    await done


async def test_a_worker_closes_when_what_has_begun_is_done(wide_worker, wide_handle):
    device = Device()
    done = wide_handle.begin("a", device.piece("a0"))
    await device.has_begun(1)
    device.gates["a0"].set()
    await asyncio.to_thread(wide_worker.close)
    assert device.ended == ["a0"]
    await done


async def test_work_that_is_queued_when_a_worker_closes_fails(worker, handle):
    running, gate = threading.Event(), threading.Event()

    def piece() -> int:
        running.set()
        assert gate.wait(10)
        return 7

    started = handle.submit("a", piece)
    assert await asyncio.to_thread(running.wait, 10)
    queued = [handle.submit("a", lambda: 8), worker.of("other").submit("b", time.time)]
    closing = asyncio.ensure_future(asyncio.to_thread(worker.close))
    outcomes = asyncio.gather(*queued, return_exceptions=True)
    errors = await asyncio.wait_for(outcomes, 10)
    assert [str(error) for error in errors] == ["the device worker is closed"] * 2
    gate.set()
    await closing
    assert await started == 7


async def test_a_worker_closes_with_work_in_flight_and_work_queued():
    # Room in flight for all of it: closing must neither begin nor await what is queued.
    worker, device = DeviceWorker(0, max_in_flight=3), Device()
    handle = worker.of("")
    in_flight = [handle.begin("a", device.piece(f"a{i}")) for i in range(2)]
    await device.has_begun(2)
    queued = handle.submit("a", lambda: 8)
    closing = asyncio.ensure_future(asyncio.to_thread(worker.close))
    with pytest.raises(RuntimeError, match="the device worker is closed"):
        await asyncio.wait_for(queued, 10)
    for gate in device.gates.values():
        gate.set()
    await asyncio.wait_for(closing, 10)
    assert await asyncio.gather(*in_flight) == [None, None]


async def test_a_worker_whose_thread_cannot_start_refuses_work():
    gate = threading.Event()

    def enter() -> None:
        assert gate.wait(10)
        raise ZeroDivisionError

    worker = DeviceWorker(0, enter)
    handle = worker.of("")
    queued = handle.submit("a", lambda: 8)
    gate.set()
    with pytest.raises(ZeroDivisionError):
        await worker.entered()
    with pytest.raises(RuntimeError, match="the device worker is closed"):
        await asyncio.wait_for(queued, 10)
    with pytest.raises(RuntimeError, match="the device worker is closed"):
        handle.submit("a", lambda: 9)
    await asyncio.to_thread(worker.close)
