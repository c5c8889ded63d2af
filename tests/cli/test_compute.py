"""`gradwire compute`: files in, files out, and nothing half-done."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from gradwire_server.backends.base import RowBlock
from tests.cli.conftest import (
    TIMEOUT_S,
    ended_by,
    environment,
    gradwire,
    refusal_here,
    sentence,
    serving_with,
    started,
)
from tests.support.faults import Fault, FaultyBackend, FaultyJob
from tests.support.raw import Problem, whole_numbers
from tests.support.serving import ServerProcess, running_server

RESULTS = ("y", "dx", "dw")


def save(directory: Path, problem: Problem) -> list[Path]:
    """The operands' files, in the order in which the command takes them."""
    paths = [directory / f"{name}.npy" for name in ("x", "w", "dy")]
    for path, operand in zip(paths, (problem.x, problem.w, problem.dy), strict=True):
        np.save(path, operand)
    return paths


def listing(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def loaded(out: Path, name: str, dtype: str) -> np.ndarray:
    array = np.load(out / f"{name}.npy")
    return array.view(ml_dtypes.bfloat16) if dtype == "bfloat16" else array


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_results_are_right_in_every_dtype(
    dtype: str, tmp_path: Path, server: ServerProcess
) -> None:
    problem = whole_numbers(20_000, 7, 5, dtype)
    flags = ("--dtype", "bfloat16") if dtype == "bfloat16" else ()
    out = tmp_path / "out"
    done = gradwire(
        "compute",
        *save(tmp_path, problem),
        *("--out", out, "--address", server.address, *flags),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert listing(out) == ["dw.npy", "dx.npy", "y.npy"]
    for name, expected in problem.expected().items():
        np.testing.assert_array_equal(loaded(out, name, dtype), expected)


def test_what_keeps_elements_off_direct_connections_is_told(tmp_path: Path) -> None:
    rows = 16_384 * 5  # several row blocks
    paths = save(tmp_path, whole_numbers(rows, 64, 64))
    with running_server(data_advertise="10.255.255.1:6000") as server:
        where = ("--out", tmp_path / "out", "--address", server.address)
        done = gradwire("compute", *paths, *where)
        assert done.returncode == 0
        serving = server.wait_for_log("data_advertise")
        assert serving["data_advertise"] == "10.255.255.1:6000"
        assert done.stderr.startswith("gradwire: direct connections to the server at ")
        assert "10.255.255.1:6000" in done.stderr
        assert done.stderr.count("\n") == 1
        done = gradwire("compute", *paths, *where, "--force", "--quiet")
        assert (done.returncode, done.stderr) == (0, "")


def test_a_private_server_computes_when_no_address_is_given(tmp_path: Path) -> None:
    problem = whole_numbers(300, 7, 5)
    done = gradwire("compute", *save(tmp_path, problem), "--out", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "a private server in this process" in done.stdout
    for name, expected in problem.expected().items():
        np.testing.assert_array_equal(np.load(tmp_path / f"{name}.npy"), expected)


@pytest.mark.parametrize("name", ["x" * 120, "50%"])
def test_a_private_server_runs_where_temporary_paths_suit_no_socket(
    name: str, tmp_path: Path
) -> None:
    problem = whole_numbers(30, 7, 5)
    (temporary := tmp_path / name).mkdir()
    done = gradwire(
        *("compute", *save(tmp_path, problem), "--out", tmp_path),
        env={"TMPDIR": str(temporary)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), problem.expected()["y"])


def test_the_table_shows_what_became_of_the_job(
    tmp_path: Path, server: ServerProcess
) -> None:
    done = gradwire(
        *("compute", *save(tmp_path, whole_numbers(9000, 7, 5))),
        *("--out", tmp_path, "--request-id", "my-job"),
        env={"GRADWIRE_ADDRESS": server.address},
    )
    for text in (
        r"y\.npy +9000 x 5 float32",
        r"job +my-job",
        rf"server +{server.address}, over tcp",
        r"row blocks +2 of 8192 rows",
        r"bytes +422 KiB of operands, 422 KiB of results",
    ):
        assert re.search(text, done.stdout), text
    quiet = gradwire(
        *("compute", *save(tmp_path, whole_numbers(9, 7, 5)), "--out", tmp_path),
        *("--quiet", "--force"),
    )
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("asked", "table"),
    [("512", "row blocks +18 of 512 rows"), ("auto", "row blocks +2 of 8192 rows")],
)
def test_the_rows_of_a_block_may_be_named(
    asked: str, table: str, tmp_path: Path
) -> None:
    done = gradwire(
        *("compute", *save(tmp_path, whole_numbers(9000, 7, 5))),
        *("--out", tmp_path, "--block-rows", asked),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(table, done.stdout), done.stdout


def test_all_servers_compute_a_job_together(
    tmp_path: Path, server: ServerProcess
) -> None:
    problem = whole_numbers(200_000, 16, 8, "float32")
    paths = save(tmp_path, problem)
    with running_server() as other:
        addresses = sorted([server.address, other.address])
        flags = [part for each in addresses for part in ("--address", each)]
        run = gradwire("compute", *paths, "--out", tmp_path / "out", *flags, "--spread")
    for name, expected in problem.expected().items():
        assert np.array_equal(loaded(tmp_path / "out", name, "float32"), expected)
    segments = re.findall(r"^(\S+) +(\d+) of 25 segments *$", run.stdout, re.MULTILINE)
    assert {address for address, _ in segments} <= set(addresses)
    assert sum(int(count) for _, count in segments) == 25


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("x", "w"), ["y.npy"]),
        (("w", "dy"), ["dx.npy"]),
        (("x", "dy"), ["dw.npy"]),
        (("x", "w", "dy", "--results=y,dw"), ["dw.npy", "y.npy"]),
        (("x", "w", "dy", "--results", "dx"), ["dx.npy"]),
    ],
)
def test_only_what_is_wanted_is_read_and_written(
    flags: tuple[str, ...], expected: list[str], tmp_path: Path
) -> None:
    problem = whole_numbers(50, 7, 5)
    paths = dict(zip(("x", "w", "dy"), save(tmp_path, problem), strict=True))
    arguments = [
        part
        for flag in flags
        for part in ([f"--{flag}", paths[flag]] if flag in paths else [flag])
    ]
    out = tmp_path / "out"
    done = gradwire("compute", *arguments, "--out", out)
    assert (done.returncode, done.stderr) == (0, "")
    assert listing(out) == expected
    for name in expected:
        result = problem.expected()[name.removesuffix(".npy")]
        np.testing.assert_array_equal(np.load(out / name), result)


def test_results_have_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    problem = whole_numbers(50, 7, 5, "float32")
    done = gradwire(
        *("compute", *save(tmp_path, problem), "--out", tmp_path),
        *("--result-dtype", "y=float16,dw=float64", "--dw-accumulator=float64"),
        "--checksum",
        "--verify",
    )
    assert (done.returncode, done.stderr) == (0, "")
    dtypes = {name: np.load(tmp_path / f"{name}.npy").dtype.name for name in RESULTS}
    assert dtypes == {"y": "float16", "dx": "float32", "dw": "float64"}


def test_column_sums_of_dy_need_no_other_file(tmp_path: Path) -> None:
    problem = whole_numbers(50, 7, 5, "float32", ("db",))
    np.save(tmp_path / "g.npy", problem.dy)
    out = tmp_path / "out"
    done = gradwire(
        *("compute", "--dy", tmp_path / "g.npy", "--out", out, "--results=db"),
        "--verify",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert listing(out) == ["db.npy"]
    assert "5 float32" in done.stdout
    np.testing.assert_array_equal(np.load(out / "db.npy"), problem.dy.sum(axis=0))


def test_float32_may_travel_in_half_the_bytes(tmp_path: Path) -> None:
    problem = whole_numbers(50, 7, 5, "float32")
    paths = save(tmp_path, problem)
    done = gradwire(
        *("compute", *paths, "--out", tmp_path, "--wire-dtype", "bfloat16"),
        *("--result-dtype", "dw=float32"),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "1.24 KiB of operands in bfloat16" in done.stdout
    # Small whole numbers are bfloat16's own, their sums past 256 are rounded.
    expected = problem.expected()
    for name in ("y", "dx"):
        result = np.load(tmp_path / f"{name}.npy")
        rounded = expected[name].astype(ml_dtypes.bfloat16).astype(np.float32)
        assert result.dtype == np.float32
        np.testing.assert_array_equal(result, rounded)
    np.testing.assert_array_equal(np.load(tmp_path / "dw.npy"), expected["dw"])

    np.save(paths[0], problem.x * 1e5)
    done = gradwire(
        *("compute", *paths, "--out", tmp_path / "out", "--wire-dtype", "float16")
    )
    assert done.returncode != 0
    assert "float16 has at most 65504" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_operands_are_read_right_in_every_layout(tmp_path: Path) -> None:
    problem = whole_numbers(50_000, 7, 5, "float64")
    paths = [tmp_path / f"{name}.npy" for name in ("x", "w", "dy")]
    np.save(paths[0], np.asfortranarray(problem.x))
    np.save(paths[1], np.asfortranarray(problem.w.astype(">f8")))
    with paths[2].open("wb") as file:
        big_endian = problem.dy.astype(">f8")
        np.lib.format.write_array(file, big_endian, version=(2, 0))
    done = gradwire("compute", *paths, "--out", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for name, expected in problem.expected().items():
        np.testing.assert_array_equal(np.load(tmp_path / f"{name}.npy"), expected)


@pytest.mark.parametrize("shape", [(0, 7, 5), (7, 0, 5), (7, 5, 0)])
def test_empty_matrices_give_empty_or_zero_results(
    shape: tuple[int, int, int], tmp_path: Path
) -> None:
    problem = whole_numbers(*shape)
    done = gradwire("compute", *save(tmp_path, problem), "--out", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for name, expected in problem.expected().items():
        np.testing.assert_array_equal(np.load(tmp_path / f"{name}.npy"), expected)


def refused(*arguments: object) -> str:
    done = gradwire("compute", *arguments)
    assert done.returncode == 1
    return sentence(done)


def test_mistakes_are_told_before_any_server_is_asked(
    tmp_path: Path,
    nobody: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nobody listens at the address, and that is never what is complained of."""
    x, w, dy = save(tmp_path, whole_numbers(9, 7, 5))
    out = tmp_path / "out"
    monkeypatch.setenv("GRADWIRE_ADDRESS", nobody)

    def refused_here(*arguments: object, to: Path = out) -> str:
        return refusal_here(capsys, "compute", *arguments, "--out", to)

    assert "does not exist" in refused_here(tmp_path / "no", w, dy)
    assert "is a directory" in refused_here(x, tmp_path, dy)
    np.save(tmp_path / "objects", np.array([[{}]]), allow_pickle=True)
    assert "pickled" in refused_here(x, w, tmp_path / "objects.npy")
    (tmp_path / "text").write_text("1 2 3\n")
    assert "not a .npy file" in refused_here(tmp_path / "text", w, dy)
    np.save(tmp_path / "raw", np.zeros((9, 7), ml_dtypes.bfloat16))
    assert "--dtype bfloat16" in refused_here(tmp_path / "raw.npy", w, dy)
    assert "(9, 7)" in (text := refused_here(x, dy, "--dy", dy))
    assert "(9, 5)" in text
    assert "not a directory" in refused_here(x, w, dy, to=x)
    for wrong_use in (
        refused_here(x),
        refused_here(x, w, "--results=dw"),
        refused_here(x, w, "--results=db"),
        refused_here(x, w, dy, "--results=y,,dx"),
        refused_here(x, w, dy, "--results=y,"),
        refused_here(x, w, dy, "--results="),
        refused_here(x, w, "--result-dtype=int8"),
        refused_here(x, w, dy, "--dtype=float8"),
        refusal_here(capsys, "compute", x, w, dy),
    ):
        assert wrong_use.startswith("2 gradwire: ")
        assert nobody not in wrong_use
    assert not out.exists()

    operand = out / "y.npy"
    out.mkdir()
    operand.write_bytes(dy.read_bytes())
    for force in ((), ("--force",)):
        text = refused_here(x, w, out / ".." / "out" / "y.npy", *force)
        assert f"{operand} is an operand, and a result would replace it" in text
    assert operand.read_bytes() == dy.read_bytes()
    assert listing(out) == ["y.npy"]

    np.save(tmp_path / "dw", np.ones(3))
    in_the_way = refused_here(x, w, dy, to=tmp_path)
    assert "dw.npy exists already; --force replaces it" in in_the_way
    np.testing.assert_array_equal(np.load(tmp_path / "dw.npy"), np.ones(3))


def test_an_address_that_nobody_listens_on_is_a_sentence_and_leaves_nothing(
    tmp_path: Path, nobody: str
) -> None:
    paths = save(tmp_path, whole_numbers(9, 7, 5))
    out = tmp_path / "new" / "out"
    assert nobody in refused(*paths, "--out", out, "--address", nobody)
    assert not (tmp_path / "new").exists()


class StallingBackend(FaultyBackend):
    """Computes one row block, and the next ones when it is let go."""

    def __init__(self, *, then_fail: bool = False) -> None:
        super().__init__()
        self.set(Fault("stalls", found_by="nothing", before=self._stall))
        self.reached = threading.Event()
        self.go_on = threading.Event()
        self._then_fail = then_fail

    def _stall(self, job: FaultyJob, block: RowBlock) -> RowBlock:
        if job.block == 1:
            self.reached.set()
            self.go_on.wait(TIMEOUT_S)
            if self._then_fail:
                raise RuntimeError("a defect")
        return block


@pytest.mark.parametrize(
    ("signum", "expected", "said"),
    [
        (signal.SIGINT, 130, "gradwire: interrupted\n"),
        (signal.SIGTERM, 143, "gradwire: ended by SIGTERM\n"),
        (signal.SIGHUP, 129, "gradwire: ended by SIGHUP\n"),
        (signal.SIGKILL, -9, ""),
    ],
)
def test_an_interrupted_run_leaves_nothing_behind(
    signum: signal.Signals, expected: int, said: str, tmp_path: Path
) -> None:
    paths = save(tmp_path, whole_numbers(9000, 7, 5))
    backend, out = StallingBackend(), tmp_path / "out"
    with (
        serving_with(backend, row_block_bytes=4096) as address,
        started("compute", *paths, "--out", out, "--address", address) as process,
    ):
        assert backend.reached.wait(TIMEOUT_S)
        results = ended_by(process, signum)
        backend.go_on.set()
    assert process.returncode == expected
    assert results == ("", said)
    if signum is signal.SIGKILL:
        assert listing(out) == []
    else:
        assert not out.exists()


INTERRUPTED_IN_A_LOCK = """
import signal, sys, threading
from gradwire_cli import main

wait = threading.Condition.wait
waits = 0

def signalled(self, timeout=None):
    global waits
    if threading.current_thread() is threading.main_thread() and timeout:
        waits += 1
        if waits == 3:
            self._lock.acquire()
            signal.raise_signal(signal.SIGTERM)
            self._lock.release()
    return wait(self, timeout)

threading.Condition.wait = signalled
sys.exit(main())
"""
"""The command line, with a signal just when a lock of gRPC's call was taken and
its holder does not know yet. It waits in steps of a part of a second."""


def test_a_signal_in_the_middle_of_taking_a_lock_ends_the_run(tmp_path: Path) -> None:
    paths = save(tmp_path, whole_numbers(9000, 7, 5))
    backend, out = StallingBackend(), tmp_path / "out"
    with serving_with(backend, row_block_bytes=4096) as address:
        done = subprocess.run(
            [
                *(sys.executable, "-c", INTERRUPTED_IN_A_LOCK),
                *map(str, ("compute", *paths, "--out", out, "--address", address)),
            ],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env=environment(None),
            check=False,
        )
        backend.go_on.set()
    assert (done.returncode, done.stdout, done.stderr) == (
        128 + signal.SIGTERM,
        "",
        "gradwire: ended by SIGTERM\n",
    )
    assert not out.exists()


def test_a_second_ctrl_c_does_not_break_into_the_cleaning_up(tmp_path: Path) -> None:
    paths = save(tmp_path, whole_numbers(9000, 7, 5))
    backend, out = StallingBackend(), tmp_path / "out"
    with (
        serving_with(backend, row_block_bytes=4096) as address,
        started("compute", *paths, "--out", out, "--address", address) as process,
    ):
        assert backend.reached.wait(TIMEOUT_S)
        process.send_signal(signal.SIGINT)
        assert ended_by(process, signal.SIGINT) == ("", "gradwire: interrupted\n")
        backend.go_on.set()
    assert process.returncode == 130
    assert not out.exists()


def test_an_interrupted_run_leaves_older_results_as_they_are(tmp_path: Path) -> None:
    paths = save(tmp_path, whole_numbers(9000, 7, 5))
    np.save(tmp_path / "y", np.ones(3))
    before = listing(tmp_path)
    backend = StallingBackend()
    with (
        serving_with(backend, row_block_bytes=4096) as address,
        started(
            *("compute", *paths, "--out", tmp_path, "--address", address, "--force")
        ) as process,
    ):
        assert backend.reached.wait(TIMEOUT_S)
        ended_by(process, signal.SIGINT)
        backend.go_on.set()
    assert listing(tmp_path) == before
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), np.ones(3))


def test_a_server_that_fails_in_the_middle_is_a_sentence_with_the_jobs_name(
    tmp_path: Path,
) -> None:
    paths = save(tmp_path, whole_numbers(9000, 7, 5))
    backend, out = StallingBackend(then_fail=True), tmp_path / "out"
    backend.go_on.set()
    with serving_with(backend, row_block_bytes=4096) as address:
        text = refused(
            *(*paths, "--out", out, "--address", address, "--request-id", "my-job")
        )
    assert "my-job" in text
    assert not out.exists()


def sparse(path: Path, shape: tuple[int, int]) -> Path:
    """A matrix of zeros in float64 that takes no room on disk."""
    with path.open("wb") as file:
        header = {"descr": "<f8", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + shape[0] * shape[1] * 8)
    return path


def test_a_file_that_shrinks_meanwhile_is_a_sentence(tmp_path: Path) -> None:
    x, w = sparse(tmp_path / "x.npy", (200_000, 50)), sparse(tmp_path / "w", (50, 1))
    backend, out = StallingBackend(), tmp_path / "out"
    with (
        serving_with(backend, row_block_bytes=1 << 20) as address,
        started("compute", x, w, "--out", out, "--address", address) as process,
    ):
        assert backend.reached.wait(TIMEOUT_S)
        os.truncate(x, 70_000_000)
        backend.go_on.set()
        _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1
    assert err == f"gradwire: {x} became shorter while it was read\n"
    assert not out.exists()


def test_a_disk_that_fills_up_is_a_sentence(tmp_path: Path) -> None:
    paths, out = save(tmp_path, whole_numbers(9000, 7, 5)), tmp_path / "out"
    done = gradwire(
        *("compute", *paths, "--out", out),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536)),
        # Nor could the coverage of that process be written.
        env={"COVERAGE_PROCESS_CONFIG": ""},
    )
    assert done.returncode == 1
    assert re.search(r"npy cannot be written: File too large", sentence(done))
    assert not out.exists()


def peak_bytes(*arguments: object) -> int:
    """Highest resident memory of the command."""
    program = (
        "import resource, sys; from gradwire_cli import main; status = main();"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
        timeout=TIMEOUT_S,
        check=True,
    )
    return int(done.stdout.split()[-1]) * 1024


@pytest.mark.thorough
@pytest.mark.parametrize(
    "private",
    [
        pytest.param(False, id="remote"),
        pytest.param(True, id="private", marks=pytest.mark.big),
    ],
)
def test_memory_does_not_grow_with_the_number_of_rows(
    private: bool, tmp_path: Path, server: ServerProcess
) -> None:
    w, where = sparse(tmp_path / "w.npy", (64, 8)), ("--address", server.address)
    peaks = {}
    for m in (100_000, 800_000):
        x, dy = sparse(tmp_path / "x", (m, 64)), sparse(tmp_path / "dy", (m, 8))
        peaks[m] = peak_bytes(
            *("compute", x, w, dy, "--out", tmp_path, "--force", "--quiet"),
            *("--results=y,dw", *(() if private else where)),
        )
    more_input = 700_000 * 72 * 8
    assert peaks[800_000] - peaks[100_000] < 32 * 2**20 < more_input / 10


def test_progress_is_shown_on_a_terminal_and_nowhere_else(tmp_path: Path) -> None:
    import pty

    paths = save(tmp_path, whole_numbers(9000, 7, 5))
    outer, inner = pty.openpty()
    with started(
        *("compute", *paths, "--out", tmp_path), env={"TERM": "xterm"}
    ) as process:
        _, err = process.communicate(timeout=TIMEOUT_S)
        assert err == ""
    flags = (f"--out={tmp_path}", "--force")
    with started(
        *("compute", *paths, *flags), env={"TERM": "xterm"}, stderr=inner
    ) as process:
        os.close(inner)
        shown = b""
        while part := read_or_nothing(outer):
            shown += part
        os.close(outer)
        assert process.wait(TIMEOUT_S) == 0
    assert b"844.0/844.0 KiB" in shown


def read_or_nothing(fd: int) -> Any:
    try:
        return os.read(fd, 65536)
    except OSError:  # Linux's answer when the other side is closed
        return b""
