"""The bench of spread jobs: what it computes from its lines, and calls a failure."""

from __future__ import annotations

import argparse
import json

import pytest

from bench.report.bound import Bound
from bench.server import Devices, IdleBackend, SlowBackend
from bench.spread import command, report
from bench.spread.rounds import Rounds
from gradwire_server.backends.base import RowBlock, Times
from tests.server.specs import make_spec


def one(bounds) -> Bound:
    (bound,) = bounds
    return bound


def cpu_lines(client_s, server_s):
    common = {"shape": "1x1x1", "servers": "idle", "bytes": 2e9, "seconds": 1.0}
    common |= {"switches": 10, "jobs": 1, "over": "grpc", "load": 1.0}
    for number, noise in enumerate((1, 3, 1)):  # a round in which all is slower
        for way, times in (("plain", 1.0), ("spread 3", 1.2)):
            yield {
                **common,
                "way": way,
                "round": number,
                "client_cpu_s": client_s * times * noise,
                "server_cpu_s": server_s * times * noise,
            }


def test_processor_time_is_compared_within_a_round():
    lines = list(cpu_lines(1.0, 2.0))
    bound = one(report.cpu_bounds(lines))
    assert bound.seen == pytest.approx(1.2)
    assert not bound.holds
    plain, spread = report.cpu_table(lines).splitlines()[2:]
    assert plain.split("|")[4].strip() == "1.50"  # 3 s for 2 GB
    assert spread.split("|")[8].strip() == "1.200"


@pytest.mark.parametrize(("times", "holds"), [(1.14, True), (1.16, False)])
def test_spread_jobs_are_held_to_their_processor_time(times, holds):
    lines = [
        {
            "way": way,
            "round": 0,
            "client_cpu_s": cpu_s,
            "server_cpu_s": 0.0,
            "bytes": 1e9,
            "shape": "1x1x1",
            "servers": "idle",
        }
        for way, cpu_s in (("plain", 1.0), ("spread 1", times))
    ]
    assert one(report.cpu_bounds(lines)).holds is holds


def test_every_further_segment_sends_w_and_a_sum():
    # 8 segments of 8192 rows: W and a sum for each, instead of once.
    n = k = 1024
    rows, w, m = 65536 * (n + k) * 4, n * k * 4, 65536
    line = {"shape": f"{m}x{n}x{k}", "servers": 3, "segments": 8, "segment_rows": 8192}
    line |= {"plain_up": rows + w, "plain_down": rows + w}
    line |= {"up": rows + 8 * w, "down": rows + 8 * w}
    assert report.byte_ratio(line) == pytest.approx((512 + 32) / (512 + 4))
    assert report.many_segments(line) == pytest.approx((64 + 4) / 64)
    # One W for two segments, and sums of float64.
    wide = {**line, "up": rows + 4 * w, "down": rows + 8 * 2 * w}
    assert report.many_segments(wide) == pytest.approx((2 * 64 + 2 + 8) / (2 * 64))
    assert not one(report.bytes_bounds([line])).holds
    assert one(report.bytes_bounds([{**line, "up": rows + w}])).holds
    assert not list(report.bytes_bounds([{**line, "shape": "65536x512x512"}]))


def test_the_servers_that_are_left_do_all_that_is_left():
    # Half a second of three servers takes two of them three quarters of one.
    assert report.left_s(1.0, 0.5) == pytest.approx(1.25)
    assert report.left_s(1.0, 0.0) == pytest.approx(1.5)
    assert report.left_s(1.0, 1.2) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("way", "seconds", "holds"),
    [
        ("killed", 1.44, True),
        ("killed", 1.46, False),
        ("stopped", 1.64, True),
        ("stopped", 1.66, False),
        ("stopped before", 1.66, False),
    ],
)
def test_a_failing_server_may_cost_some_segments(way, seconds, holds):
    line = {"way": way, "round": 0, "undisturbed_s": 1.0, "at_s": 0.5}
    line |= {"segment_s": 0.1, "seconds": seconds}
    line |= {"same": True, "written_later": False}
    late, wrong = report.failing_bounds([line])
    assert late.holds is holds
    assert wrong.holds
    for wrong_line in ({"same": False}, {"written_later": True}):
        _, wrong = report.failing_bounds([line | wrong_line])
        assert not wrong.holds


def test_three_devices_are_held_to_their_speed():
    lines = [
        {"way": way, "round": 0, "seconds": seconds}
        for way, seconds in (("plain", 2.3), ("spread 3", 1.01), ("3 devices", 0.99))
    ]
    servers, devices = report.devices_bounds(lines)
    assert not servers.holds
    assert devices.holds


def test_sums_of_two_jobs_a_server_may_be_held_and_the_total():
    assert report.sums_bytes(3, 8) == 56
    lines = [
        {"servers": servers, "above": (above << 20) + more, "sum_bytes": 8 << 20}
        for servers, above, more in ((0, 0, 9), (1, 26, 0), (3, 58, 1))
    ]
    first, second = report.memory_bounds(lines)
    assert first.holds
    assert first.seen == 1.0
    assert not second.holds


def test_first_blocks_are_compared_within_a_round():
    lines = [
        {"way": way, "round": number, "first_s": first_s, "servers": "idle"}
        for number, noise in enumerate((1, 5, 1))
        for way, first_s in (("plain", 1.0 * noise), ("spread 3", 1.4 * noise))
    ]
    assert one(report.stream_bounds(lines)).seen == pytest.approx(1.4)


def test_a_part_that_cannot_be_measured_yet_says_so():
    lines = [{"skipped": "not yet", "servers": "idle", "load": 0.0}]
    assert report.stream_table(lines) == "not yet"
    assert not list(report.stream_bounds(lines))


def test_rounds_end_in_time():
    assert list(Rounds(seconds=0.0, least=2, most=5)) == [0, 1]
    assert list(Rounds(seconds=60.0, least=1, most=3)) == [0, 1, 2]


def test_what_a_server_is_asked_to_be():
    assert Devices.parse("numpy") == Devices("numpy")
    assert Devices.parse("idle:80x3") == Devices("idle", 0.08, 3)
    assert Devices.parse("idle:2.5") == Devices("idle", 0.0025)
    for wrong in ("", "slow", "idle:", "idle:x3"):
        with pytest.raises(ValueError):  # noqa: PT011 - argparse says the rest
            Devices.parse(wrong)


def test_a_slow_device_is_busy_for_its_time():
    backend = SlowBackend(IdleBackend(), 0.01, devices=2)
    try:
        assert [each.index for each in backend.devices] == [0, 1]
        times = Times()
        job = backend.open_job(make_spec(), 8, 1, times=times)
        job.compute_block(RowBlock(8, None, None, None, None))
        assert times.computing_s >= 0.01
    finally:
        backend.close()


def made_up(asked):
    shapes = asked.get("shapes") or [asked["shape"]]
    for number in range(2):
        yield {
            "shape": shapes[0],
            "servers": 3,
            "segments": 2,
            "segment_rows": 4096,
            "jobs": 2,
            "up": 5_000_000 + number,
            "down": 5_000_000,
            "plain_up": 4_800_000,
            "plain_down": 4_800_000,
            "load": 7.0 + number,
        }


def test_a_run_prints_and_writes_what_it_has_seen(tmp_path, capsys, monkeypatch):
    out = tmp_path / "run.jsonl"
    monkeypatch.setattr(command, "_measured", made_up)
    assert command.main(["--parts", "bytes", "--out", str(out)]) == 0
    about, *lines = map(json.loads, out.read_text().splitlines())
    assert about["kind"] == "run"
    assert [line["up"] for line in lines] == [5_000_000, 5_000_001]
    table = capsys.readouterr().out
    assert "bytes, transport auto, load 7 to 8:" in table
    assert " 1.0417 |" in table
    assert command.main(["--read", str(out)]) == 0
    assert table.endswith(capsys.readouterr().out.partition("\n")[2])


@pytest.mark.thorough
def test_workers_measure_with_servers_of_their_own(tmp_path):
    out = tmp_path / "run.jsonl"
    line = ["--quick", "--parts", "bytes", "--out", str(out)]
    assert command.main(line) == 0
    _, *lines = map(json.loads, out.read_text().splitlines())
    (each,) = lines
    assert each["servers"] == 1
    assert each["up"] == each["plain_up"] == 4 * (8192 * 2 * 64 + 64 * 64)


def test_every_part_is_asked_for():
    options = argparse.Namespace(
        parts=list(report.TABLES),
        quick=False,
        transport="auto",
        rounds=3,
        seconds=1,
    )
    asked = [each for group in command.groups(options) for each in group]
    assert {each["part"] for each in asked} == set(report.BOUNDS)
    assert [each["count"] for each in asked if each["part"] == "memory"] == [0, 1, 2, 3]
