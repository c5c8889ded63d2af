"""Loads: who waits for whom, and whose waiting counts."""

from __future__ import annotations

import asyncio
import itertools
import time

import pytest
from grpc import StatusCode

import gradwire
from bench.load.command import parse_mix
from bench.load.generator import OK, Kind, Load, Made, endings, outcomes, rate_of
from bench.work import Shape


async def quick() -> None:
    await asyncio.sleep(0)


async def refused() -> None:
    raise gradwire.ServerBusyError("busy", status=StatusCode.RESOURCE_EXHAUSTED)


async def test_callers_of_a_closed_loop_wait_for_their_answers() -> None:
    under_way, most = 0, 0

    async def call() -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.001)
        under_way -= 1

    made = await Load([Kind("a", 1, call)]).closed(callers=3, seconds=0.1)
    assert most == 3
    assert len(made) >= 6
    assert rate_of(made) == pytest.approx(len(made) / max(m.ended_s for m in made))


async def test_calls_of_an_open_loop_come_whether_or_not_others_are_done() -> None:
    gate = asyncio.Event()
    asyncio.get_running_loop().call_later(0.2, gate.set)
    load = Load([Kind("a", 1, gate.wait)])
    made = await load.open(rate=200, seconds=0.1)
    assert len(made) > 5
    # Each waited from when it was due, though all ended at once.
    assert max(m.ended_s for m in made) - min(m.ended_s for m in made) < 0.1
    assert all(m.latency_s == m.ended_s - m.due_s > 0.05 for m in made)


async def test_what_came_late_because_of_this_process_counts_as_waiting() -> None:
    async def block() -> None:
        time.sleep(0.02)  # noqa: ASYNC251 - nobody else may run meanwhile

    made = await Load([Kind("a", 1, block)]).open(rate=1000, seconds=0.05)
    assert all(m.began_s >= m.due_s for m in made)
    assert max(m.latency_s for m in made) > 0.1  # some fifty times 20 ms, in turn


async def test_calls_beyond_the_most_are_left_out_and_counted() -> None:
    gate = asyncio.Event()
    asyncio.get_running_loop().call_later(0.2, gate.set)
    load = Load([Kind("a", 1, gate.wait)], most_outstanding=4)
    made = await load.open(rate=1000, seconds=0.05)
    assert len(made) == 4
    assert load.left_out > 4


async def test_arrivals_are_as_many_as_the_rate_says_and_not_even() -> None:
    made = await Load([Kind("a", 1, quick)]).open(rate=2000, seconds=0.5)
    assert 850 < len(made) < 1150  # 1,000 expected, its square root 32
    due = sorted(m.due_s for m in made)
    gaps = [b - a for a, b in itertools.pairwise(due)]
    # Of exponential gaps two thirds are below the mean.
    assert 0.55 < sum(gap < 1 / 2000 for gap in gaps) / len(gaps) < 0.72


async def test_failures_are_told_by_status_and_reason() -> None:
    mix = [Kind("good", 1, quick), Kind("bad", 1, refused)]
    made = await Load(mix).closed(callers=1, seconds=0.05)
    assert set(endings(made)) == {OK, "RESOURCE_EXHAUSTED/ServerBusyError"}
    found = outcomes(made)
    assert [(o.call, o.status) for o in found] == [
        ("all", OK),
        ("all", "RESOURCE_EXHAUSTED"),
        ("bad", "RESOURCE_EXHAUSTED"),
        ("good", OK),
    ]
    assert sum(o.count for o in found if o.call == "all") == len(made)


def test_percentiles_are_those_of_the_latencies() -> None:
    made = [Made("a", 1.0, 1.0, 1.0 + i / 100) for i in range(101)]
    one, _ = outcomes(made)
    assert one.percentiles_s == pytest.approx(
        {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}
    )
    assert one.max_s == pytest.approx(1.0)


def test_a_mix_names_shapes_and_weights() -> None:
    assert parse_mix("32*8,4x5x6") == [(Shape(32, 32, 32), 8), (Shape(4, 5, 6), 1)]
    for wrong in ("", "32*0", "x", "32*y"):
        with pytest.raises(ValueError):  # noqa: PT011 - argparse says the rest
            parse_mix(wrong)
