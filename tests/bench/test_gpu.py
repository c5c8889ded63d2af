"""The GPU bench: its arithmetic, and all of it that needs no GPU."""

from __future__ import annotations

import json

import pytest

from bench.gpu import command, device_worker, jobs
from bench.gpu.parts import Answer, Options
from bench.report.bound import Bound, table


@pytest.mark.parametrize(
    ("seen", "bound", "at_least", "holds"),
    [
        (0.95, 0.95, True, True),
        (0.94, 0.95, True, False),
        (1.15, 1.15, False, True),
        (1.16, 1.15, False, False),
    ],
)
def test_a_bar_holds_up_to_its_bound(seen, bound, at_least, holds):
    bar = Bound("name", seen, bound, at_least=at_least)
    assert bar.holds is holds
    assert ("holds" if holds else "FAILS") in table([bar])


def test_shared_memory_is_compared_with_the_device_worker_at_the_same_shape():
    row = {"shape": "8x4x4", "dtype": "float32"}
    other = {"shape": "9x4x4", "dtype": "float32"}
    figures = [row | {"GB/s each way": 20.0}, other | {"GB/s each way": 1.0}]
    rows = [
        {"way": way, "what": what, "shape": "8x4x4", "GB/s each way": rate}
        for way, what, rate in (
            ("shm", "job", 15.0),
            ("tcp", "job", 3.0),
            ("tcp", "transport", 4.0),
        )
    ]
    (bar,) = jobs._bars(rows, {"worker": {"rows": figures}})
    assert bar.name == "shared memory over the device worker without gRPC"
    assert bar.seen == 0.75
    assert not list(jobs._bars(rows, {}))  # the worker was not measured


def test_direct_connections_are_held_to_a_rate_and_a_cost_of_each_end():
    row = {
        "way": "direct",
        "what": "job",
        "shape": "8x4x4",
        "GB/s each way": 4.9,
        "client CPU s/GB": 0.3,
        "server CPU s/GB": 0.31,
    }
    others = [row | {"way": "tcp"}, row | {"what": "transport"}]
    bars = list(jobs._bars([row, *others], {}))
    assert [bar.holds for bar in bars] == [False, True, False]


def test_what_a_device_worker_is_held_to_knows_that_copies_share_a_bus():
    row = {
        "shape": "8x4x4",
        "dtype": "float32",
        "ms": 12.0,
        "to_device alone ms": 10.0,
        "computing alone ms": 9.0,
        "from_device alone ms": 8.0,
        "ratio": 1.2,
    }
    copies = [
        {"copies": "up alone", "up GB/s": 50.0, "down GB/s": 0.0},
        {"copies": "down alone", "up GB/s": 0.0, "down GB/s": 60.0},
        {"copies": "both at once", "up GB/s": 40.0, "down GB/s": 40.0},
    ]
    alone, shared = device_worker._bars([row], {"copies": {"rows": copies}})
    assert (alone.seen, alone.holds) == (1.2, False)
    assert (shared.seen, shared.holds) == (12 / 12.5, True)
    assert len(list(device_worker._bars([row], {}))) == 1  # copies were not measured


def test_a_hurry_means_fewer_rows_and_a_scale_smaller_sizes():
    shape = device_worker.JOBS[0][0]
    hurried = device_worker.scaled(shape, Options("numpy", quick=True, scale=16))
    assert hurried.m == shape.m // 4 // 16
    assert (hurried.n, hurried.k) == (shape.n // 16, shape.k // 16)


def test_a_part_that_fails_costs_the_others_nothing(monkeypatch, tmp_path, capsys):
    def fails(_: Options) -> Answer:
        raise RuntimeError("out of order")

    monkeypatch.setattr(command, "PARTS", command.PARTS | {"worker": fails})
    path = tmp_path / "found.json"
    asked = ["--backend", "numpy", "--parts", "worker,device", "--out", str(path)]
    assert command.main(asked) == 1
    found = json.loads(path.read_text())["parts"]
    assert found["worker"]["error"] == "RuntimeError: out of order"
    assert found["device"]["skipped"]
    assert "worker: failed: RuntimeError: out of order" in capsys.readouterr().out


@pytest.mark.thorough
def test_everything_but_the_device_runs_on_a_processor(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(Options, "seconds", 0.0)
    path = tmp_path / "found.json"
    asked = ["--backend", "numpy", "--quick", "--scale", "64", "--out", str(path)]
    assert command.main(asked) == 0
    found = json.loads(path.read_text())
    assert found["about"]["devices"][0]["backend"] == "numpy"
    assert [*found["parts"]] == [*command.PARTS]
    ways = {row["way"] for row in found["parts"]["transports"]["rows"]}
    assert ways == {"shm", "unix", "tcp", "direct"}
    assert all(row["faster"] for row in found["parts"]["numpy"]["rows"])
    assert len(found["bars"]) == len(device_worker.JOBS) + 4
    assert "Everything is in" in capsys.readouterr().err
