"""Turns on a lane."""

from __future__ import annotations

import asyncio
import threading

import pytest

from gradwire_server.lane import Lane


@pytest.fixture
def lane():
    lane = Lane(0)
    yield lane
    lane.close()


async def test_jobs_take_turns_piece_by_piece(lane):
    gate, order = threading.Event(), []
    held = lane.submit("gate", gate.wait)
    work = [
        lane.submit("large", lambda i=i: order.append(f"large{i}")) for i in (0, 1, 2)
    ]
    work += [lane.submit("small", lambda: order.append("small"))]
    gate.set()
    await asyncio.gather(held, *work)
    assert order == ["large0", "small", "large1", "large2"]


async def test_results_and_errors_reach_who_waits(lane):
    assert await lane.submit("job", lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        await lane.submit("job", lambda: 1 // 0)
    assert await lane.submit("job", lambda: 8) == 8


async def test_a_discarded_job_computes_at_most_the_piece_in_hand(lane):
    entered, gate, done = threading.Event(), threading.Event(), []

    def first():
        entered.set()
        gate.wait()
        done.append("first")

    started = lane.submit("job", first)
    waiting = [lane.submit("job", lambda: done.append("more")) for _ in range(5)]
    await asyncio.to_thread(entered.wait)
    discarded = asyncio.ensure_future(lane.discard("job"))
    await asyncio.sleep(0)
    assert not discarded.done()
    gate.set()
    await discarded
    assert done == ["first"]
    assert await started is None
    assert all(piece.cancelled() for piece in waiting)
    assert await lane.submit("other", lambda: "goes on") == "goes on"


async def test_a_discard_that_is_cancelled_still_waits_for_the_lane(lane):
    entered, gate = threading.Event(), threading.Event()

    def piece():
        entered.set()
        gate.wait()

    lane.submit("job", piece)
    await asyncio.to_thread(entered.wait)
    discarded = asyncio.ensure_future(lane.discard("job"))
    await asyncio.sleep(0)
    discarded.cancel()
    await asyncio.sleep(0)
    assert not discarded.done()
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await discarded
