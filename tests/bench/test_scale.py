"""The model of spread jobs, against closed forms; the servers that check it."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

import numpy as np
import pytest

import gradwire
from bench.contenders import gradwire_server
from bench.scale import command
from bench.scale.figures import CPU, H200, Costs, Device, Host
from bench.scale.model import Outcome, simulate
from bench.scale.setting import Plan, Setting
from bench.scale.workload import WHOLE, Workload
from bench.work import Shape
from gradwire._api.options import parse_options
from gradwire._core.job_plan import Plan as JobPlan
from gradwire._core.segments import JOBS_PER_DEVICE, divide, segments_ahead
from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.limits import MIB
from gradwire_protocol.row_blocks import segment_rows

NOTHING = Costs(
    round_trip_s=0.0,
    job_s=0.0,
    add_bytes_per_s=float("inf"),
    sums_queue=False,
    window_bytes=64 * MIB,
)
FREE = Host(
    cores=64,
    send_s_per_gb=0.0,
    receive_s_per_gb=0.0,
    lock_s_per_gb=0.0,
    job_s=0.0,
    job_lock_s=0.0,
)
INSTANT = Device("instant")
WORK = Workload(Shape(65536, 512, 512), row_block_bytes=4 * MIB, ratio=0)
"""64 segments of one row block of 1,024 rows: 4 MiB, with sums of 2 MiB."""


def run(work: Workload, servers: int, device: Device, **given: object) -> Outcome:
    """Simulate, with everything else for free."""
    free = Setting(servers, device, client=FREE, server=FREE, costs=NOTHING)
    setting = replace(free, **given)  # type: ignore[arg-type]
    if setting.plan.segments_a_job is None:
        setting = replace(setting, plan=replace(setting.plan, segments_a_job=1))
    return simulate(work, setting)


def link_s(size: float, gbits: float) -> float:
    return 8 * size / (gbits * 1e9)


def test_segments_are_those_of_servers() -> None:
    for n, k, mib, itemsize in itertools.product(
        (16, 512, 1000, 8192), (16, 2048), (1, 16, 32), (2, 4)
    ):
        work = Workload(Shape(1 << 24, n, k), mib * MIB, itemsize, 2 * itemsize)
        rows = work.block_rows * work.segment_blocks
        assert rows == segment_rows(n, k, itemsize, 2 * itemsize, work.block_rows)


def test_jobs_take_segments_as_those_of_the_sdk_do() -> None:
    found = set()
    for m, n, k in ((1 << 17, 1008, 16), (1 << 17, 64, 64), (1 << 17, 2048, 2048)):
        work = Workload(Shape(m, n, k), MIB)
        job = JobPlan(m, n, k, Dtype.FLOAT32, parse_options())
        division = divide(job, MIB)
        assert division.several
        assert (division.segments, division.jobs_per_device) == (
            work.segments,
            Plan().jobs,
        )
        for servers, left, idle in itertools.product(
            (1, 3, 100), (0, 7, 50, 10_000), (0, 1, 8)
        ):
            ahead = segments_ahead(job, division.segment_rows, left, servers, idle)
            assert ahead == Plan().may_be_ahead(work, left, servers, idle)
            found.add(ahead)
    assert len(found) > 2
    assert Plan(segments_a_job=1).jobs == JOBS_PER_DEVICE


def test_a_job_that_takes_segments_sends_w_once() -> None:
    wide = replace(WORK, shape=Shape(65536, 512, 512), ratio=0)
    w_s = link_s(wide.w_bytes, 1)
    plan = Plan(rows="servers", sums="chain")
    for segments_a_job, times in ((None, 2), (1, wide.segments)):
        setting = Setting(
            2,
            INSTANT,
            client_gbits=1,
            server_gbits=1e6,
            client=FREE,
            server=FREE,
            costs=NOTHING,
            plan=replace(plan, segments_a_job=segments_a_job),
        )
        seconds = simulate(wide, setting).seconds
        assert seconds == pytest.approx(times * w_s, abs=3 * w_s)


def test_the_rows_of_all_blocks_are_those_of_the_job() -> None:
    work = replace(WORK, shape=Shape(10_000, 512, 512), ratio=16)
    blocks = [work.blocks_of(segment) for segment in range(work.segments)]
    assert sum(map(sum, blocks)) == 10_000
    assert [len(each) for each in blocks] == [8, 2]


def test_one_server_takes_as_long_as_its_longest_stage() -> None:
    whole = replace(WORK, ratio=WHOLE)
    plan = Plan(jobs_a_server=1)
    blocks = len(whole.blocks_of(0))
    rows_s = link_s(whole.rows_bytes, 10)
    for block_s in (0.0, rows_s / blocks / 2, 3 * rows_s / blocks):
        device = Device("device", block_s=block_s)
        outcome = run(whole, 1, device, client_gbits=10, server_gbits=40, plan=plan)
        # The first block has to arrive, and the last one to leave.
        longest = max(rows_s, blocks * block_s)
        assert longest < outcome.seconds < 1.06 * longest + 2 * rows_s / blocks
        assert outcome.bound == (
            "devices" if block_s * blocks > rows_s else "client card"
        )


def test_devices_share_the_job_evenly() -> None:
    device = Device("device", block_s=0.1)
    seen = {n: run(WORK, n, device).seconds for n in (1, 2, 4, 16)}
    assert seen == {n: pytest.approx(WORK.segments * 0.1 / n) for n in seen}


def test_the_clients_card_bounds_many_servers() -> None:
    # W goes with each job, sums come back in twice its bytes.
    down = WORK.rows_bytes + WORK.segments * WORK.sum_bytes
    seen = run(WORK, 8, INSTANT, client_gbits=10, server_gbits=10)
    assert seen.seconds > link_s(down, 10)
    few = run(WORK, 8, INSTANT, client_gbits=10, plan=Plan(uploads=2))
    assert few.seconds == pytest.approx(link_s(down, 10), rel=0.06)
    assert few.bound == "client card"


def test_more_jobs_than_the_card_feeds_move_up_first_and_down_then() -> None:
    wide = replace(WORK, shape=Shape(65536, 512, 16), ratio=0)
    device = replace(INSTANT, slots=6)
    up = link_s(wide.rows_bytes + wide.segments * wide.w_bytes, 10)
    down = link_s(wide.rows_bytes + wide.segments * wide.sum_bytes, 10)
    crowd = run(wide, 64, device, client_gbits=10)
    assert crowd.seconds > 0.9 * (up + down)
    assert crowd.busy["client card"] > 0.9
    few = run(wide, 64, device, client_gbits=10, plan=Plan(uploads=4))
    assert few.seconds < 0.7 * crowd.seconds


SUMS = Plan(rows="servers", w="server")


def test_sums_bound_jobs_whose_rows_are_on_the_servers() -> None:
    sums_s = link_s(WORK.segments * WORK.sum_bytes, 10)
    outcome = run(WORK, 16, INSTANT, client_gbits=10, server_gbits=10, plan=SUMS)
    w_s = link_s(16 * WORK.w_bytes, 10)  # before the first sum
    assert outcome.seconds == pytest.approx(w_s + sums_s, rel=0.03)
    assert outcome.bound == "sums"


def test_one_thread_adds_sums() -> None:
    costs = replace(NOTHING, add_bytes_per_s=1e8)
    outcome = run(WORK, 16, INSTANT, costs=costs, plan=SUMS)
    adding_s = WORK.segments * WORK.sum_bytes / 1e8
    assert outcome.seconds == pytest.approx(adding_s, rel=0.02)
    assert outcome.bound == "sums"


@pytest.mark.parametrize("sums", ["chain", "tree"])
def test_servers_that_add_send_the_client_one_sum(sums: str) -> None:
    def seconds(plan: Plan) -> float:
        outcome = run(WORK, 64, INSTANT, client_gbits=1, server_gbits=100, plan=plan)
        return outcome.seconds

    one_s = link_s(WORK.sum_bytes, 1)
    plan = Plan(rows="servers", w="tree")
    assert one_s < seconds(replace(plan, sums=sums)) < 4 * one_s
    assert seconds(plan) > 64 * one_s
    # Each server has several segments.
    few = run(WORK, 3, INSTANT, server_gbits=10, plan=replace(plan, sums=sums))
    assert few.seconds < 64 * link_s(WORK.sum_bytes, 10)


def test_a_chain_visits_the_segments_in_order_in_slices() -> None:
    plan = Plan(rows="servers", w="tree", sums="chain")
    work = replace(WORK, shape=Shape(8192, 2048, 2048), ratio=0)
    slices = work.sum_bytes // MIB
    hop_s = link_s(MIB, 10)
    outcome = run(
        work, work.segments, INSTANT, client_gbits=1e6, server_gbits=10, plan=plan
    )
    hops = work.segments - 1 + slices  # each slice begins a slice later
    assert outcome.seconds > hops * hop_s
    assert outcome.seconds < 2.5 * hops * hop_s


def test_w_in_a_tree_leaves_the_client_once() -> None:
    wide = Workload(Shape(2048, 2048, 2048), row_block_bytes=MIB, ratio=0)
    servers = wide.segments
    assert servers == 32

    def outcome(w: str) -> Outcome:
        plan = Plan(rows="servers", w=w, sums="tree")
        return run(wide, servers, INSTANT, client_gbits=10, server_gbits=40, plan=plan)

    w_s, sum_s = link_s(wide.w_bytes, 10), link_s(wide.sum_bytes, 10)
    to_each, tree = outcome("server"), outcome("tree")
    assert to_each.seconds > servers * w_s
    assert to_each.bound == "W"
    # The servers' links are four times as fast: they keep up, and add five times.
    assert w_s + sum_s < tree.seconds < 1.5 * w_s + 3 * sum_s


def test_processors_are_named_where_they_bound_the_job() -> None:
    slow = replace(FREE, cores=2, send_s_per_gb=1.0, receive_s_per_gb=1.0)
    outcome = run(WORK, 8, INSTANT, client=slow)
    moved = 2 * WORK.rows_bytes + WORK.segments * (WORK.w_bytes + WORK.sum_bytes)
    assert outcome.seconds == pytest.approx(moved / 1e9 / 2, rel=0.05)
    assert outcome.bound == "client CPU"
    locked = replace(slow, cores=64, lock_s_per_gb=0.5)
    outcome = run(WORK, 32, INSTANT, client=locked)
    assert outcome.seconds == pytest.approx(moved / 1e9 / 2, rel=0.05)
    assert outcome.bound == "client Python"


def test_too_few_segments_are_named() -> None:
    four = replace(WORK, shape=Shape(4096, 512, 512))
    device = Device("device", block_s=0.1)
    seen = [run(four, n, device) for n in (1, 2, 4, 100)]
    assert [each.bound for each in seen] == [
        "devices",
        "devices",
        "segments",
        "segments",
    ]
    assert seen[3].seconds == pytest.approx(seen[2].seconds)


def test_a_sum_waits_for_a_block_that_is_queued_before_it() -> None:
    device = Device("device", block_s=0.1)
    two = replace(WORK, shape=Shape(2048, 512, 512))
    ahead = run(two, 1, device, client_gbits=1)
    behind = run(
        two, 1, device, client_gbits=1, costs=replace(NOTHING, sums_queue=True)
    )
    # Both segments' sums leave after the second block.
    assert behind.seconds > ahead.seconds + 0.5 * link_s(two.sum_bytes, 1)


@pytest.mark.parametrize("device", [CPU, H200], ids=lambda each: each.name)
def test_nothing_takes_longer_on_faster_links(device: Device) -> None:
    work = Workload(Shape(1 << 16, 512, 512), device.row_block_bytes)
    for servers in (1, 3):
        took = [
            simulate(work, Setting(servers, device, gbits, gbits))
            for gbits in (1, 10, 100)
        ]
        # Segments, whole ones, are shared as servers become ready.
        one_s = device.seconds(work, work.block_rows * work.segment_blocks)
        for slower, faster in itertools.pairwise(took):
            assert faster.seconds < slower.seconds + one_s
        assert all(max(each.busy.values()) <= 1 + 1e-9 for each in took)
        moved = work.rows_bytes + work.segments * work.w_bytes
        assert took[0].seconds > link_s(moved, 1)


def test_the_command_prints_what_bounds_a_job(
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["--shapes", "16384x512x512", "--devices", "cpu", "--gbits", "1,100"]
    assert command.main([*given, "--servers", "1,4"]) == 0
    head, _, one, four = capsys.readouterr().out.splitlines()
    assert "100 Gbit/s" in head
    assert "client card" in one
    assert "segments" in four
    assert "1.0x" in one


def test_a_server_that_sleeps_takes_so_long_for_each_row_block() -> None:
    server = gradwire_server.start("idle:100", "--row-block-bytes", str(MIB))
    try:
        with gradwire.connect([server.address]) as client:
            m = 4 * 2048
            x, w = np.ones((m, 64), np.float32), np.ones((64, 64), np.float32)
            began = time.perf_counter()
            y, _, _ = client.gradients(x, w, x, spread=True)
            assert time.perf_counter() - began >= 4 * 0.1
            assert y.shape == x.shape
    finally:
        server.stop()
