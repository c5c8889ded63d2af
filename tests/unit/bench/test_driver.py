"""The bench takes turns fairly, writes down every call, and cleans up."""

import json

import psutil
import pytest

from bench import contenders
from bench.command import main
from bench.driver import Worker, rotated, run_shape
from bench.work import Shape


def test_each_round_begins_with_another_contender():
    orders = [rotated(["a", "b", "c"], number) for number in range(4)]
    assert orders == [
        ["a", "b", "c"],
        ["b", "c", "a"],
        ["c", "a", "b"],
        ["a", "b", "c"],
    ]


def test_contenders_take_turns_in_one_run():
    seen = []
    turns, peaks = run_shape(
        ["numpy", "grpcio-unary"],
        Shape(8, 8, 8),
        threads=1,
        rounds=2,
        seconds=60,
        on_turn=seen.append,
    )
    assert [(turn.round, turn.contender) for turn in turns] == [
        (0, "numpy"),
        (0, "grpcio-unary"),
        (1, "grpcio-unary"),
        (1, "numpy"),
    ]
    assert seen == turns
    assert all(seconds > 0 for turn in turns for seconds in turn.calls_s)
    local, unary = peaks
    assert local.server_bytes is None
    assert unary.server_bytes is not None
    assert unary.server_bytes > 1 << 20


def test_the_time_limit_holds_once_enough_rounds_are_taken():
    turns, _ = run_shape(
        ["numpy"], Shape(8, 8, 8), threads=1, rounds=50, seconds=0, least_rounds=2
    )
    assert len(turns) == 2


@pytest.mark.parametrize("name", contenders.NAMES)
def test_every_contender_is_right_and_leaves_no_process_behind(name):
    before = set(psutil.Process().children(recursive=True))
    worker = Worker(name, Shape(20, 10, 30), threads=1)
    started = set(psutil.Process().children(recursive=True)) - before
    assert len(started) == (1 if name == "numpy" else 2)
    worker.end()
    _, alive = psutil.wait_procs(list(started), timeout=20)
    assert alive == []


def test_a_run_leaves_a_table_and_every_call_in_a_file(tmp_path, capsys):
    out = tmp_path / "run.jsonl"
    line = f"--contenders numpy --shapes 8,16x4x2 --rounds 2 --threads 1 --out {out}"
    assert main(line.split()) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["kind"] for line in lines] == [
        "run",
        *["turn", "turn", "peak", "figure"] * 2,
    ]
    table = capsys.readouterr().out
    assert "| 8³ " in table
    assert "| 16x4x2 " in table


def test_a_contender_that_does_not_exist_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["--contenders", "numpy,abacus"])
    assert "abacus is none of numpy" in capsys.readouterr().err
