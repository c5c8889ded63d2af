"""The bench takes turns fairly, writes down every call, and cleans up."""

import json

import numpy as np
import psutil
import pytest

import gradwire
from bench import contenders
from bench.command import main
from bench.contenders import gradwire_server
from bench.contenders.gradwire_sdk import Gradwire
from bench.contenders.server_process import ServerProcess
from bench.driver import Worker, rotated, run_shape
from bench.report.record import Run
from bench.work import FORMS, Shape, operands


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
    turns, usages = run_shape(
        ["numpy", "grpcio-unary"],
        Shape(8, 8, 8),
        form="fresh",
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
    local, unary = usages
    assert local.server_peak_bytes is None
    assert local.server_cpu_s == 0
    assert unary.server_peak_bytes is not None
    assert unary.server_peak_bytes > 1 << 20
    assert min(local.client_cpu_s, unary.client_cpu_s) > 0
    calls = {turn.contender: 0 for turn in turns}
    for turn in turns:
        calls[turn.contender] += len(turn.calls_s)
    assert [usage.calls for usage in usages] == list(calls.values())


def test_the_time_limit_holds_once_enough_rounds_are_taken():
    turns, _ = run_shape(
        ["numpy"],
        Shape(8, 8, 8),
        form="fresh",
        threads=1,
        rounds=50,
        seconds=0,
        least_rounds=2,
    )
    assert len(turns) == 2


def require(name):
    if package := contenders.missing(name):
        pytest.skip(f"needs {package}")


@pytest.mark.big
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", contenders.NAMES)
def test_every_contender_is_right_and_leaves_no_process_behind(name, form):
    require(name)
    before = set(psutil.Process().children(recursive=True))
    worker = Worker(name, Shape(64, 32, 16), form, threads=1)
    try:
        # It compares a call's results with products of its own.
        worker.wait_until_ready()
        started = set(psutil.Process().children(recursive=True)) - before
        assert len(started) == (1 if name == "numpy" else 2)
    finally:
        worker.end()
    _, alive = psutil.wait_procs(list(started), timeout=20)
    assert alive == []


# The libraries of the others change a process that imports them.
@pytest.mark.thorough
@pytest.mark.parametrize(
    "name", [n for n in contenders.WHOLE_JOBS if n not in {"torch-rpc", "arrow-flight"}]
)
def test_fresh_results_are_other_arrays_in_every_call(name):
    given = operands(Shape(64, 32, 16))
    contender = contenders.create(name)
    try:
        contender.start()
        fresh = contender.call(given, reused=False)
        kept = [result for _ in range(3) for result in fresh()]
        for i, first in enumerate(kept):
            assert not any(np.shares_memory(first, other) for other in kept[:i])
        reused = contender.call(given, reused=True)
        for first, second in zip(reused(), reused(), strict=True):
            assert np.shares_memory(first, second)
    finally:
        contender.close()


def test_a_server_of_the_open_inference_protocol_is_named_by_address(tmp_path, capsys):
    server = ServerProcess.of_module("bench.contenders.open_inference")
    try:
        line = f"--contenders numpy --oip {server.address}/any --shapes 64x32x16"
        line += " --forms fresh --rounds 1 --threads 1"
        assert main([*line.split(), "--out", str(tmp_path / "run.jsonl")]) == 0
    finally:
        server.stop()
    assert f"oip@{server.address}/any" in capsys.readouterr().out


def test_a_contender_whose_package_is_missing_is_left_out(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(contenders, "missing", {"torch-rpc": "torch"}.get)
    out = tmp_path / "run.jsonl"
    line = "--contenders numpy,torch-rpc --shapes 8 --forms fresh --rounds 1"
    line += " --threads 1"
    assert main([*line.split(), "--out", str(out)]) == 0
    told = capsys.readouterr()
    assert "torch-rpc is left out: torch is not installed\n" in told.err
    assert "torch-rpc" not in told.out


@pytest.mark.parametrize(
    "names",
    [
        ("gradwire-direct", "raw-tcp"),
        pytest.param(
            ("gradwire-grpc", "gradwire-grpc-tls", "gradwire-direct-tls"),
            marks=pytest.mark.big,
        ),
        pytest.param(("arrow-flight",), marks=pytest.mark.big),
    ],
    ids="-".join,
)
def test_without_products_every_byte_still_travels(names, tmp_path, capsys):
    out = tmp_path / "run.jsonl"
    line = f"--transport-only --contenders {','.join(('numpy', *names))}"
    line += f" --shapes 4000x500x400 --forms fresh --rounds 2 --threads 1 --out {out}"
    assert main(line.split()) == 0
    (part,) = Run.read(out).parts
    assert not part.products
    # NumPy has no transport.
    assert [figure.contender for figure in part.figures] == list(names)
    for name in names:
        # More could not pass a processor, and waits for bytes are switches.
        assert 0 < part.gb_per_s(name) < 100
        assert part.cpu_s_per_gb(name) > 0.05
        assert part.switches_per_gb(name) > 10
    assert "4000x500x400, without products:" in capsys.readouterr().out


@pytest.fixture(scope="module")
def idle_server():
    server = gradwire_server.start("idle")
    yield server
    server.stop()


def test_without_products_a_server_computes_nothing(idle_server):
    x, w, dy = operands(Shape(64, 32, 16))
    with gradwire.connect(idle_server.address) as client:
        y = client.gradients(x, w, dy).y
    assert y.shape == (64, 16)
    assert not np.allclose(y, x @ w)


def test_a_job_that_went_another_way_is_not_measured(idle_server):
    shape = Shape(2048, 1024, 64)
    contender = Gradwire("direct")
    try:
        contender._client = gradwire.connect(idle_server.address, transport="grpc")
        contender.gradients(*operands(shape), out=None)
        with pytest.raises(RuntimeError, match="went over tcp, not direct"):
            contender.check_way(shape)
    finally:
        contender.close()


def test_a_run_leaves_tables_and_every_call_in_a_file(tmp_path, capsys):
    out = tmp_path / "run.jsonl"
    line = f"--contenders numpy --shapes 8,16x4x2 --rounds 2 --threads 1 --out {out}"
    assert main(line.split()) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["kind"] for line in lines] == [
        "run",
        *["turn", "turn", "usage", "figure"] * 4,
    ]
    assert [line["form"] for line in lines[1:]] == ["fresh"] * 8 + ["reused"] * 8
    assert out.with_suffix(".svg").read_text().startswith("<?xml")
    printed = capsys.readouterr().out
    assert printed.count("| 8³ ") == printed.count("| 16x4x2 ") == 2


def test_a_contender_that_does_not_exist_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["--contenders", "numpy,abacus"])
    assert "abacus is none of numpy" in capsys.readouterr().err


def test_a_shape_that_fails_costs_the_others_nothing(monkeypatch, tmp_path, capsys):
    def fails(names, shape, **options):
        if shape.m == 8:
            raise RuntimeError("numpy ended with exit status -9")
        return run_shape(names, shape, **options)

    monkeypatch.setattr("bench.command.run_shape", fails)
    line = "--contenders numpy --shapes 8,4 --forms fresh --rounds 1 --threads 1"
    assert main([*line.split(), "--out", str(tmp_path / "run.jsonl")]) == 1
    told = capsys.readouterr()
    assert "8x8x8, fresh: numpy ended with exit status -9" in told.err
    assert "| 4³ " in told.out
