"""`gradwire check` passes correct servers, and no others."""

from __future__ import annotations

import json
import logging
import re
import signal
import sys
import threading
from collections.abc import Collection
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest

import gradwire as sdk
from gradwire_cli.app import run
from gradwire_cli.checks.checks import CHECKS, run_checks
from gradwire_cli.checks.clients import Clients, open_clients
from gradwire_cli.checks.result import CheckResult
from gradwire_cli.checks.ways import WAYS
from gradwire_cli.commands import check as command
from gradwire_protocol.dtypes import Dtype
from gradwire_server.backends.base import RowBlock
from tests.cli.conftest import (
    TIMEOUT_S,
    ended_by,
    gradwire,
    sentence,
    serving_with,
    started,
)
from tests.scenarios.test_several_servers import addresses, several
from tests.scenarios.ways import serving_all
from tests.support.faults import FAULTS, Fault, FaultyBackend, FaultyJob
from tests.support.serving import ServerProcess, running_server

BY_NAME = {fault.name: fault for fault in FAULTS}


def server_with(fault: Fault) -> AbstractContextManager[str]:
    backend = FaultyBackend()
    backend.set(fault)
    return serving_with(backend)


def _fail(job: FaultyJob, block: RowBlock) -> RowBlock:
    raise RuntimeError("a defect")


FAILING = Fault(
    "fails", "products", when=lambda job: job.spec.dtype is Dtype.FLOAT16, before=_fail
)


def wrong(results: list[CheckResult]) -> set[tuple[str, str, str]]:
    return {(f.check, f.dtype, f.result) for f in results if not f.passed}


def checked(
    address: str, seed: int = 0, names: Collection[str] = tuple(CHECKS)
) -> list[CheckResult]:
    with open_clients(partial(sdk.connect, address)) as clients:
        return list(run_checks(clients, tuple(Dtype), seed, names))


IN_SHARED_MEMORY = {"call = shared memory", "shared blocks"}
ON_DIRECT_CONNECTIONS = {"call = direct", "direct blocks"}
OF_SEVERAL_SERVERS = {"spread"}
ALSO = {"next job"}
"""Checks that another one makes too."""


def test_a_right_server_passes_on_a_unix_socket_and_in_shared_memory() -> None:
    """The checks of how a job is sent: the others are the same as over TCP."""
    with serving_all() as server:
        _, unix = server.addresses
        results = checked(unix, names=WAYS)
    assert wrong(results) == set()
    made = {result.check for result in results}
    assert made == WAYS.keys() - ON_DIRECT_CONNECTIONS
    assert {result.dtype for result in results} == {d.label for d in Dtype}


@pytest.mark.big
@pytest.mark.parametrize("row_block_bytes", [1 << 10, 1 << 26])
def test_a_right_server_passes_whatever_its_row_blocks(row_block_bytes: int) -> None:
    with running_server(row_block_bytes=row_block_bytes) as server:
        assert wrong(checked(server.address, seed=row_block_bytes)) == set()


@pytest.mark.big
def test_rounding_to_tf32_shows_in_float32_alone() -> None:
    with server_with(BY_NAME["float32 in TF32"]) as address:
        assert {dtype for _, dtype, _ in wrong(checked(address))} == {"float32"}


def test_a_job_that_the_server_fails_is_a_finding_with_its_reason() -> None:
    with server_with(FAILING) as address:
        results = checked(address, names={"products", "resumed job"})
    failed = [result for result in results if result.note]
    assert {result.dtype for result in failed} == {"float16"}
    assert "UNFORESEEN" in failed[0].note
    assert wrong(results) == {(f.check, "float16", "all") for f in failed}


def test_the_command_proves_a_server_right(server: ServerProcess) -> None:
    done = gradwire("check", "--address", server.address)
    assert done.returncode == 0
    assert done.stderr == ""
    assert re.search(
        rf"^{re.escape(server.address)}: \d+ checks passed in ",
        done.stdout,
        re.MULTILINE,
    )
    for name in {*CHECKS, *ALSO} - IN_SHARED_MEMORY - OF_SEVERAL_SERVERS:
        assert re.search(f"^{name} ", done.stdout, re.MULTILINE)


@pytest.fixture
def few_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """`gradwire check` in this process makes two of its checks: others make all."""
    few = partial(run_checks, names={"finite differences", "products"})
    monkeypatch.setattr(command, "run_checks", few)


@pytest.mark.usefixtures("few_checks")
def test_without_an_address_a_private_server_is_checked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["check", "--json", "--seed", "7"]) == 0
    # The command silences the log of its server only while that runs.
    assert logging.getLogger("gradwire_server").level == logging.NOTSET
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is True
    assert "private server" in report["server"]
    assert report["checks"][0]["check"] == "finite differences"
    assert all(f["error"] <= f["bound"] for f in report["checks"])


@pytest.mark.parametrize(
    ("fault", "check", "dtype", "dtypes"),
    [
        ("W read as (k, n)", "finite differences", "float64", "float64"),
        (
            "dW ends after three blocks",
            "row blocks",
            "float32",
            "float16, bfloat16, float32, float64",
        ),
        ("float32 in TF32", "products", "float32", "float32"),
    ],
)
def test_the_command_names_what_is_wrong_and_fails(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: str,
    check: str,
    dtype: str,
    dtypes: str,
) -> None:
    names = {"finite differences", "products", "row blocks"}
    monkeypatch.setattr(command, "run_checks", partial(run_checks, names=names))
    with server_with(BY_NAME[fault]) as address:
        assert run(["check", "--address", address]) == 1
    text = capsys.readouterr().out
    _, failed, named = text.partition(" checks failed: ")
    assert failed
    assert f"{check} ({dtypes})" in named
    assert re.search(rf"^{check} +{dtype} .* WRONG *$", text, re.MULTILINE)


@pytest.mark.usefixtures("few_checks")
def test_json_is_json_where_errors_are_infinite(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with server_with(FAILING) as address:
        assert run(["check", "--json", "--address", address]) == 1
    report = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert report["passed"] is False


def test_no_server_is_no_verdict(nobody: str) -> None:
    done = gradwire("check", "--address", nobody)
    assert done.returncode == 3
    assert nobody in sentence(done)


@pytest.mark.big
def test_several_servers_take_turns() -> None:
    with running_server() as first, running_server() as second:
        addresses = ("--address", first.address, "--address", second.address)
        done = gradwire("check", *addresses)
    assert done.returncode == 0, done.stdout
    assert f"{first.address}, {second.address}: " in done.stdout


@pytest.fixture
def spread_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """`gradwire check` in this process makes only the check of several servers.

    And with two dtypes: one has segments of half the rows.
    """

    def spread(clients: Clients, _: Collection[Dtype], seed: int) -> Any:
        return run_checks(clients, {Dtype.FLOAT16, Dtype.FLOAT64}, seed, {"spread"})

    monkeypatch.setattr(command, "run_checks", spread)


@pytest.mark.usefixtures("spread_only")
def test_several_servers_compute_jobs_together_or_it_says_which_do_not(
    nobody: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with several(2) as alike, running_server(row_block_bytes=1 << 20) as other:
        given = ",".join([*addresses(alike), other.address, nobody])
        assert run(["check", "--address", given]) == 0
    text, warned = capfd.readouterr()
    assert warned == ""
    for name in ("spread", "spread = one server"):
        assert set(re.findall(rf"^{name}  .*?(\S+)$", text, re.MULTILINE)) == {"ok"}
    gets_none = r"^(\S+) gets no segments .*?: (.*)$"
    no_segments = dict(re.findall(gets_none, text, re.MULTILINE))
    assert set(no_segments) == {other.address, nobody}
    assert "row blocks of 1 MiB: expected " in no_segments[other.address]
    assert "nothing listens" in no_segments[nobody]


@pytest.mark.usefixtures("spread_only")
def test_a_share_of_several_servers_that_is_wrong_is_found(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with (
        server_with(BY_NAME["dW ends after three blocks"]) as wrong_one,
        serving_with(FaultyBackend()) as right_one,
    ):
        assert run(["check", "--address", f"{right_one},{wrong_one}"]) == 1
    assert "checks failed: spread (" in capfd.readouterr().out


@pytest.mark.usefixtures("spread_only")
def test_one_server_computes_nothing_together(
    server: ServerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["check", "--json", "--address", server.address]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["checks"] == []
    assert report["no_segments"] == {}


CONCURRENT_JOBS_ALONE = (
    "import sys; from gradwire_cli.checks.checks import CHECKS;"
    "name = 'concurrent jobs'; check = CHECKS[name]; CHECKS.clear();"
    "CHECKS[name] = check; from gradwire_cli import main; sys.exit(main())"
)


def test_a_signal_ends_the_check_while_jobs_run() -> None:
    backend = FaultyBackend()
    reached, go_on = threading.Event(), threading.Event()

    def stall(job: FaultyJob, block: RowBlock) -> RowBlock:
        if job.backend.running == 3:  # those of "concurrent jobs"
            reached.set()
            go_on.wait(TIMEOUT_S)
        return block

    backend.set(Fault("stalls", found_by="nothing", before=stall))
    with serving_with(backend) as address:
        try:
            python = (sys.executable, "-c", CONCURRENT_JOBS_ALONE)
            with started("check", "--address", address, command=python) as process:
                assert reached.wait(TIMEOUT_S)
                _, err = ended_by(process, signal.SIGINT)
        finally:
            go_on.set()
    assert process.returncode == 130
    assert err == "gradwire: interrupted\n"
