"""What a server's metrics say is what its clients know."""

from __future__ import annotations

import platform
import re
import shutil
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import numpy as np
import pytest
from grpc import StatusCode

import gradwire as sdk
from gradwire.v1 import job_pb2, matrix_pb2
from gradwire.v1.gradient_service_pb2 import GetServerInfoRequest
from gradwire.v1.gradient_service_pb2_grpc import GradientServiceStub
from tests.contract.conftest import assert_untroubled
from tests.support.credentials import authorized, make_tokens, sending
from tests.support.metrics import Samples, scrape
from tests.support.observing import wait_until
from tests.support.raw import (
    INLINE,
    CallError,
    Problem,
    Stream,
    chunk,
    compute_job,
    stream_job,
    whole_numbers,
)
from tests.support.serving import BACKEND, ServerProcess, running_server
from tests.support.shared_memory import RawRegion, shared_job

MIB = 1 << 20
OPERATING = Path(__file__).parents[2] / "docs" / "operating.md"
PROBLEM = whole_numbers(70, 6, 5)
ROWS = 16
"""Rows of a block of it: 1024 bytes of operands."""
W_BYTES = PROBLEM.w.nbytes
SMALL = {"row_block_bytes": 1024}


@dataclass
class Metered:
    """A server with metrics, and its channels."""

    server: ServerProcess
    alice: Any
    bob: Any
    unix: Any
    nobody: grpc.Channel
    token: str

    def scrape(self) -> Samples:
        return scrape(self.server.metrics_url)


@pytest.fixture(scope="module")
def metered() -> Iterator[Metered]:
    with ExitStack() as stack:
        directory = Path(stack.enter_context(TemporaryDirectory(prefix="gradwire-")))
        tokens, text = make_tokens("alice", "bob")
        (directory / "tokens.toml").write_text(text)
        server = stack.enter_context(
            running_server(
                listen=["127.0.0.1:0", f"unix:{directory / 'socket'}"],
                metrics_listen="0",
                metrics_tenants=True,
                auth_tokens=str(directory / "tokens.toml"),
                allow_shared_memory=True,
                **SMALL,
                max_jobs=1,
                max_queue=1,
                memory_limit=256 * MIB,
                keep_limit=64 * MIB,
            )
        )
        tcp, unix = (
            stack.enter_context(grpc.insecure_channel(address))
            for address in server.addresses
        )
        alice, bob = (authorized(tcp, tokens[name]) for name in ("alice", "bob"))
        unix = authorized(unix, tokens["alice"])
        yield Metered(server, alice, bob, unix, tcp, tokens["alice"])
        assert_untroubled(server)


def row_bytes(problem: Problem, rows: int) -> int:
    """Bytes of so many rows of X and dY; as many of Y and dX."""
    return rows * (problem.x.nbytes + problem.dy.nbytes) // problem.shape[0]


def whole_bytes(problem: Problem) -> int:
    """Bytes of all operands; of all results as many."""
    return problem.x.nbytes + problem.w.nbytes + problem.dy.nbytes


def operations(problem: Problem, rows: int) -> int:
    """Multiplications and additions of Y, dX and dW, for so many rows."""
    _, n, k = problem.shape
    return 3 * 2 * n * k * rows


def fails(call: Any, reason: str) -> None:
    with pytest.raises(CallError) as raised:
        call()
    assert raised.value.reason == reason


def test_every_figure_is_what_the_clients_know(metered: Metered) -> None:
    m = PROBLEM.shape[0]
    blocks = -(-m // ROWS)
    whole = whole_bytes(PROBLEM)
    session = sdk.connect(metered.server.address, token=metered.token)
    with session, session.session(keep="1MiB", lease_s=1) as kept:
        tensor = kept.put(PROBLEM.w)
        assert np.array_equal(kept.get(tensor), PROBLEM.w)
        now = metered.scrape()
        assert now.sum("sessions") == 1
        assert now.sum("session_reserved_bytes") == MIB
        assert now.sum("session_used_bytes") == W_BYTES
        assert now.sum("session_limit_bytes") == 64 * MIB

    # Jobs that succeed.
    for _ in range(3):
        compute_job(metered.alice, PROBLEM)
    outcome = stream_job(metered.bob, PROBLEM)
    assert outcome.accepted.block_rows == ROWS
    stream_job(metered.bob, PROBLEM, open_m=True)
    stream_job(metered.unix, PROBLEM)
    with RawRegion(metered.alice, 1 << 16) as region:
        shared_job(metered.alice, region.lay_out(PROBLEM))
        now = metered.scrape()
        assert now.sum("regions") == 1
        assert now.sum("region_bytes") == 1 << 16
    succeeded = 3 + 2 + 1 + 1

    # One that goes on behind the second block.
    sums = np.zeros(PROBLEM.w.shape)
    resume = job_pb2.Resume(
        fingerprint=outcome.accepted.fingerprint,
        first_row=2 * ROWS,
        results_from_row=2 * ROWS,
        dw_sum=INLINE,
    )
    with Stream(metered.alice) as stream:
        stream.send(PROBLEM.job(resume=resume))
        stream.receive_accepted()
        stream.send_all(rows_from(2 * ROWS, sums))
        stream.half_close()
        while stream.receive() is not None:
            pass

    # Jobs that fail.
    fails(lambda: compute_job(metered.alice, PROBLEM, m=-1), "SHAPE_INVALID")
    fails(lambda: compute_job(metered.alice, PROBLEM, m=-2), "SHAPE_INVALID")
    fails(lambda: stream_job(metered.alice, PROBLEM, n=10**6, k=10**6), "JOB_TOO_LARGE")
    with Stream(metered.bob) as stream:
        stream.send(PROBLEM.job(checksum=matrix_pb2.CHECKSUM_CRC32C))
        stream.receive_accepted()
        stream.send(chunk("w", 0, PROBLEM.w.tobytes(), crc32c=1))
        assert stream.failure().reason == "CHECKSUM_MISMATCH"
    for _ in range(2):
        with pytest.raises(grpc.RpcError) as raised:
            compute_without_token(metered.nobody)
        assert raised.value.code() is StatusCode.UNAUTHENTICATED
    with Stream(metered.alice, timeout_s=0.2) as stream:
        assert stream.failure().status is StatusCode.DEADLINE_EXCEEDED

    # A direct connection that does not say whose it is.
    serving = metered.server.wait_for_log(lambda record: "data" in record)
    with socket.create_connection(serving["data"].split(":"), timeout=20):
        wait_until(
            lambda: metered.scrape().sum("data_sockets", state="pending") == 1,
            "it is accepted",
        )
        assert metered.scrape().by("data_sockets", "state") == {("pending",): 1}

    # A job that runs: one waits behind it, and the next one is refused.
    before = metered.scrape()
    with Stream(metered.bob) as running, Stream(metered.alice) as waiting:
        running.send(PROBLEM.job(open_m=True))
        running.receive_accepted()
        running.send_all(PROBLEM.chunks("w", 0, 6))
        running.send_all(PROBLEM.chunks("x", 0, ROWS))
        running.send_all(PROBLEM.chunks("dy", 0, ROWS))
        results = [running.receive() for _ in ("y", "dx")]
        assert all(each and each.HasField("chunk") for each in results)
        waiting.send(PROBLEM.job())
        queued = waiting.receive()
        assert queued is not None
        assert queued.HasField("queued")
        fails(lambda: compute_job(metered.bob, PROBLEM), "BUSY")
        now = metered.scrape()
        assert now.sum("running_jobs") == now.sum("running_jobs_limit") == 1
        assert now.sum("queued_jobs") == now.sum("queued_jobs_limit") == 1
        assert 0 < now.sum("queue_oldest_wait_seconds") < 20
        assert now.sum("device_running_jobs", device="0") == 1
        assert now.sum("memory_held_bytes") > W_BYTES
        assert now.sum("memory_limit_bytes") == 256 * MIB
        assert now.by("tenant_running_jobs", "tenant") == {("bob",): 1}
        assert now.by("tenant_queued_jobs", "tenant") == {("alice",): 1}
        part = W_BYTES + row_bytes(PROBLEM, ROWS)
        assert increase(before, now, "received_bytes_total") == part
        assert increase(before, now, "sent_bytes_total") == row_bytes(PROBLEM, ROWS)
        assert increase(before, now, "row_blocks_total") == 1
        # Of a job without m, a block that is computed counts as a whole one.
        done = increase(before, now, "floating_point_operations_total")
        assert done == operations(PROBLEM, ROWS)
    wait_until(lambda: metered.scrape().sum("running_jobs") == 0, "both are cancelled")
    wait_until(lambda: metered.scrape().sum("queued_jobs") == 0, "both are cancelled")

    now = metered.scrape()
    went_on = m - 2 * ROWS
    assert now.by("jobs_total", "method", "transport", "reason") == {
        ("Compute", "tcp", ""): 3,
        ("ComputeStream", "tcp", ""): 3,
        ("ComputeStream", "unix", ""): 1,
        ("ComputeStream", "shm", ""): 1,
        ("Compute", "tcp", "SHAPE_INVALID"): 2,
        ("Compute", "tcp", "BUSY"): 1,
        ("ComputeStream", "tcp", "JOB_TOO_LARGE"): 1,
        ("ComputeStream", "tcp", "CHECKSUM_MISMATCH"): 1,
        ("ComputeStream", "tcp", "DEADLINE_PASSED"): 1,
        ("ComputeStream", "tcp", "JOB_CANCELLED"): 2,
    }
    assert now.by("jobs_total", "outcome") == {
        ("OK",): succeeded + 1,
        ("INVALID_ARGUMENT",): 2,
        ("RESOURCE_EXHAUSTED",): 2,
        ("DATA_LOSS",): 1,
        ("DEADLINE_EXCEEDED",): 1,
        ("CANCELLED",): 2,
    }
    sums_bytes = 8 * PROBLEM.w.size
    stream_bytes = whole * 2 + W_BYTES + row_bytes(PROBLEM, went_on)
    assert now.by("received_bytes_total", "method", "transport") == {
        ("Compute", "tcp"): 3 * whole,
        ("ComputeStream", "tcp"): stream_bytes + sums_bytes + part,
        ("ComputeStream", "unix"): whole,
        ("ComputeStream", "shm"): whole,
        ("PutTensor", "tcp"): W_BYTES,
    }
    assert now.by("sent_bytes_total", "method", "transport") == {
        ("Compute", "tcp"): 3 * whole,
        ("ComputeStream", "tcp"): stream_bytes + row_bytes(PROBLEM, ROWS),
        ("ComputeStream", "unix"): whole,
        ("ComputeStream", "shm"): whole,
        ("GetTensor", "tcp"): W_BYTES,
    }
    resumed_blocks = -(-went_on // ROWS)
    assert now.sum("row_blocks_total") == succeeded * blocks + resumed_blocks + 1
    rows = succeeded * m + went_on + ROWS
    done = now.sum("floating_point_operations_total", device="0")
    assert done == operations(PROBLEM, rows)
    assert now.sum("resumed_jobs_total") == 1
    assert now.sum("handed_over_jobs_total") == 0
    assert now.sum("retries_asked_total") == 1
    assert now.by("refusals_total", "limit") == {
        ("max_queue",): 1,
        ("memory_limit",): 1,
    }
    assert now.sum("auth_failures_total") == 2
    assert now.sum("checksum_failures_total") == 1
    assert now.sum("sessions") == now.sum("session_reserved_bytes") == 0
    assert now.by("session_calls_total", "method", "outcome") == {
        (method, "OK"): 1
        for method in ("OpenSession", "PutTensor", "GetTensor", "CloseSession")
    }
    # The first one asks for the challenge, the second one opens the region.
    assert now.by("region_calls_total", "outcome") == {("OK",): 1, ("CANCELLED",): 1}

    admitted = {"Compute": 3, "ComputeStream": succeeded - 3 + 1 + 1 + 1}
    for stage in ("wait", "receive", "compute", "send", "duration"):
        name = f"job_{stage}_seconds"
        for method, count in admitted.items():
            assert now.sum(f"{name}_count", method=method) == count
            assert now.sum(f"{name}_bucket", method=method, le="+Inf") == count
        counts = [v for labels, v in now.all[f"gradwire_{name}_bucket"]]
        half = len(counts) // 2
        assert counts[:half] == sorted(counts[:half])  # cumulative
        assert counts[half:] == sorted(counts[half:])
    total = now.sum("job_duration_seconds_sum", method="ComputeStream")
    assert 0 < now.sum("job_compute_seconds_sum", method="ComputeStream") < total < 60
    busy = now.sum("device_busy_seconds_total", device="0")
    assert 0 < busy < 60

    assert now.by("tenant_jobs_total", "tenant", "outcome") == {
        ("alice", "ok"): 3 + 1 + 1 + 1,
        ("bob", "ok"): 2,
        ("alice", "failed"): 2 + 1 + 1 + 1,
        ("bob", "failed"): 1 + 1 + 1,
    }
    everything = now.sum("received_bytes_total")
    assert now.sum("tenant_received_bytes_total") == everything
    assert now.sum("tenant_received_bytes_total", tenant="bob") == 2 * whole + part
    computing = sum(
        now.sum("job_compute_seconds_sum", method=method) for method in admitted
    )
    assert now.sum("tenant_compute_seconds_total") == pytest.approx(computing)


def test_reports_of_clients_are_counted_and_logged_and_others_ignored(
    metered: Metered,
) -> None:
    def report(*metadata: tuple[str, str]) -> None:
        given = ("authorization", f"Bearer {metered.token}"), *metadata
        stub = GradientServiceStub(sending(metered.nobody, *given))
        answer = stub.GetServerInfo(GetServerInfoRequest(), timeout=20)
        assert answer.contract == "gradwire.v1"

    report(("gradwire-report", "wrong"), ("gradwire-report-job", "mine"))
    report(("gradwire-report", "damaged"), ("gradwire-report-job", "x" * 1000))
    report(("gradwire-report", "damaged"))
    report(("gradwire-report", "anything"), ("gradwire-report-job", "mine"))
    report(("gradwire-report-job", "mine"))
    counts = metered.scrape().by("reported_failures_total", "failure")
    assert counts == {("wrong",): 1, ("damaged",): 2}
    records = [r for r in metered.server.records if "report" in r]
    assert [(r["report"], r["job_id"]) for r in records] == [
        ("wrong", "mine"),
        ("damaged", ""),
        ("damaged", ""),
    ]
    assert {(r["levelname"], r["tenant"]) for r in records} == {("ERROR", "alice")}


def rows_from(first: int, sums: np.ndarray) -> Iterator[Any]:
    yield from PROBLEM.chunks("w", 0, PROBLEM.shape[1])
    yield chunk("dw_sum", 0, sums.tobytes())
    for row in range(first, PROBLEM.shape[0], ROWS):
        for name in ("x", "dy"):
            last = min(row + ROWS, PROBLEM.shape[0])
            yield from PROBLEM.chunks(name, row, last)
    yield from list(PROBLEM.body(ROWS))[-1:]


def compute_without_token(channel: grpc.Channel) -> None:
    method = channel.unary_unary("/gradwire.v1.GradientService/Compute")
    method(b"", timeout=20)


def increase(before: Samples, after: Samples, name: str) -> float:
    return after.sum(name) - before.sum(name)


def test_a_server_that_drains_says_so_and_counts_what_it_hands_over() -> None:
    with (
        running_server(metrics_listen="127.0.0.1:0", grace=0.5, **SMALL) as server,
        grpc.insecure_channel(server.address) as channel,
        Stream(channel) as stream,
        Stream(channel) as idle,  # which the server waits for a moment to end
    ):
        checkpoints = job_pb2.Checkpoints(rows=1 << 20)
        stream.send(PROBLEM.job(checkpoints=checkpoints))
        stream.receive_accepted()
        stream.send_all(PROBLEM.chunks("w", 0, 6))
        for name in ("x", "dy"):
            stream.send_all(PROBLEM.chunks(name, 0, ROWS))
        assert all(stream.receive() for _ in ("y", "dx"))
        assert scrape(server.metrics_url).sum("draining") == 0
        server.process.terminate()
        assert server.wait_for_log("draining")
        last = scrape(server.metrics_url)
        assert last.sum("draining") == last.sum("running_jobs") == 1
        assert stream.failure().reason == "DRAINING"
        with suppress(OSError):
            while True:
                last = scrape(server.metrics_url)
        assert last.sum("draining") == 1
        assert last.sum("running_jobs") == 0
        assert last.sum("jobs_total", reason="DRAINING") == 1
        assert last.sum("handed_over_jobs_total") == 1
        assert last.sum("row_blocks_total") == 1
        assert idle.failure()
        assert server.process.wait(20) == 0
        assert_untroubled(server)


def test_the_text_is_as_prometheus_wants_it(metered: Metered) -> None:
    url = metered.server.metrics_url
    assert url.startswith("http://127.0.0.1:")
    samples = scrape(url)
    (build,) = samples.all["gradwire_build_info"]
    assert build[0]["version"] == version("gradwire")
    assert build[0]["python"] == platform.python_version()
    assert build[0]["numpy"] == np.__version__
    assert build[0]["backend"] == BACKEND
    (device,) = samples.all["gradwire_device_info"]
    assert device[0]["device"] == "0"
    assert device[0]["name"]
    assert samples.all["process_resident_memory_bytes"]
    listed = set(re.findall(r"`(gradwire_\w+)`", OPERATING.read_text()))
    served = set(re.findall("^# HELP (gradwire_[a-z_]+)", samples.text, re.MULTILINE))
    assert served == listed
    # A series for each of them only where there is something to tell.
    assert sum(map(len, samples.all.values())) < 400
    asked = urllib.request.Request(
        url, headers={"Accept": "application/openmetrics-text; version=1.0.0"}
    )
    with urllib.request.urlopen(asked, timeout=20) as answer:
        assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
        assert answer.read().endswith(b"# EOF\n")


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not here")
def test_promtool_finds_nothing_to_say_about_the_metrics(metered: Metered) -> None:
    done = subprocess.run(
        ["promtool", "check", "metrics"],
        input=metered.scrape().text,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
