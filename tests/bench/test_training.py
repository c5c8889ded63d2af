"""The bench of training: what it counts, checks and calls a failure."""

from __future__ import annotations

import json

import pytest

from bench.training import report
from bench.training.command import main
from bench.training.sizes import SIZES


@pytest.mark.parametrize(
    ("name", "without_mb", "with_mb"), [("a", 488.1, 274.7), ("b", 654.6, 35.9)]
)
def test_sizes_move_what_sessions_were_designed_by(name, without_mb, with_mb):
    size = SIZES[name]
    assert size.bytes_without_session() / 1e6 == pytest.approx(without_mb, abs=0.05)
    assert size.bytes_with_session() / 1e6 == pytest.approx(with_mb, abs=0.05)


def test_a_run_checks_every_contender_and_counts_its_bytes(tmp_path, capsys):
    out = tmp_path / "run.jsonl"
    names = "numpy,calls,session-bfloat16,session-idle-auto"
    line = f"--sizes tiny --rounds 1 --contenders {names} --out {out}"
    assert main(line.split()) == 0
    about, *lines = map(json.loads, out.read_text().splitlines())
    assert about["kind"] == "run"
    checked = {each["contender"]: each for each in lines if each["kind"] == "ready"}
    assert list(checked) == names.split(",")
    assert 0 < checked["session-bfloat16"]["errors"]["w"] < 0.02
    counted = {each["contender"]: each for each in lines if each["kind"] == "bytes"}
    d, head, rows = 64, 32, 256
    n, k = (d + d + d + 4 * d + d), (3 * d + d + 4 * d + d + head)
    weights = d * (3 * d + d + 4 * d + 4 * d + head)
    kept = 2 * rows * (n + k)
    for name, elements in (
        ("calls", 4 * (rows * (3 * n + 2 * k) + 3 * weights)),
        ("session-bfloat16", 2 * kept),
        ("session-idle-auto", 4 * kept),
    ):
        of = counted[name]
        assert of["payload_up"] + of["payload_down"] == elements
        assert elements < of["up"] + of["down"] < 1.01 * elements
    steps = [each for each in lines if each["kind"] == "step"]
    assert [each["contender"] for each in steps] == names.split(",")
    assert len(steps[1]["calls"]) == 10
    table = capsys.readouterr().out
    assert "| session-bfloat16" in table
    assert main(["--read", str(out)]) == 0
    assert table.endswith(capsys.readouterr().out.partition("\n")[2])


def made_up(seconds_of_a_call, one_core_s=1.0, idle_s=0.4, size="a"):
    call = {"up": 4_000_000, "down": 2_000_000, "blocks": 4, "shape": "8x2x1"}
    call["seconds"] = seconds_of_a_call
    calls = [{**call, "method": method} for method in ("forward", "backward")]
    seconds = {"numpy-1": one_core_s, "session-idle-auto": idle_s}
    for name, taken_s in seconds.items():
        yield {"kind": "ready", "contender": name, "size": size, "gbits": 1.0}
        yield {
            "kind": "step",
            "contender": name,
            "round": 0,
            "seconds": taken_s,
            "interface_up": 0,
            "interface_down": 0,
            "calls": calls,
            "size": size,
            "gbits": 1.0,
        }


@pytest.mark.parametrize(("over_s", "holds"), [(-0.001, True), (0.001, False)])
def test_calls_may_take_the_larger_direction_and_2_ms(over_s, holds):
    # 4 MB at 1 Gbit/s take 32 ms.
    seconds = 1.15 * 0.032 + 0.002 + over_s
    lines = list(made_up(seconds, idle_s=2 * seconds))
    step, overlap, blocks = report.bounds(lines)
    assert step.holds is overlap.holds is holds
    assert blocks.holds


@pytest.mark.parametrize(("idle_s", "holds"), [(0.49, True), (0.51, False)])
def test_a_step_may_take_half_of_one_core(idle_s, holds):
    (bound,) = report.bounds(list(made_up(1, idle_s=idle_s, size="b")))
    assert bound.holds is holds


def test_bytes_are_held_to_their_bars():
    line = {"kind": "bytes", "contender": "session", "size": "b", "gbits": 0}
    for up, holds in ((18_000_000, True), (18_200_000, False)):
        (bound,) = report.bounds([{**line, "up": up, "down": 18_000_000}])
        assert bound.holds is holds


@pytest.mark.parametrize(("undisturbed", "counted"), [(4, False), (5, True)])
def test_steps_that_other_machines_disturbed_are_told_apart(undisturbed, counted):
    fair, slow = 1.1 * 0.032 + 0.002, 2 * 0.032
    steps = []
    for number in range(11):
        quiet = number < undisturbed
        seconds = fair if quiet else slow
        (_, step) = list(made_up(seconds, idle_s=2 * seconds))[2:]
        steps.append({**step, "round": number, "stolen": 0.02 if quiet else 0.021})
    found = list(report.bounds(steps))
    assert not found[0].holds
    assert len(found) == (6 if counted else 3)
    if counted:
        assert f"{undisturbed} undisturbed of 11 steps" in found[3].name
        assert found[3].seen == pytest.approx(1.1)
        assert found[4].seen == pytest.approx(1.1)
