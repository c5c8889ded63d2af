"""One client's manners are nobody else's trouble."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from grpc import StatusCode

from tests.contract.conftest import assert_untroubled
from tests.support.observing import (
    CUDA_BYTES,
    MIB,
    forget_peak,
    misbehaving_clients,
    peak,
    probing,
    resident,
    wait_until,
)
from tests.support.raw import (
    CallError,
    Stream,
    assert_exact,
    compute_job,
    make_job,
    normal_numbers,
    repeated_rows,
    stream_job,
    whole_numbers,
)
from tests.support.serving import BACKEND, ServerProcess, running_server

LIMIT = 512 * MIB
MAY_STAY = 64 * MIB
JOB = whole_numbers(2000, 256, 256)


@pytest.fixture
def server() -> Iterator[ServerProcess]:
    with running_server(
        memory_limit=LIMIT, max_jobs=32, row_block_bytes=MIB, grace=0.2
    ) as process:
        yield process
        assert process.process.poll() is None
        assert_untroubled(process)


@pytest.fixture
def channel(server) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as opened:
        for _ in range(3):
            assert_exact(stream_job(opened, JOB), JOB)
        yield opened


def seconds_of_a_job(channel: grpc.Channel) -> float:
    started = time.perf_counter()
    outcome = stream_job(channel, JOB)
    seconds = time.perf_counter() - started
    assert_exact(outcome, JOB)
    return seconds


def median_seconds(channel: grpc.Channel, jobs: int = 9) -> float:
    return statistics.median(seconds_of_a_job(channel) for _ in range(jobs))


def assert_memory_comes_back(
    server: ServerProcess, channel: grpc.Channel, before: int
) -> None:
    """In the server's books, and in the process."""
    wait_until(lambda: most_is_free(channel), "the budget comes back")
    wait_until(
        lambda: resident(server) <= before + MAY_STAY,
        f"resident memory comes back to {before + MAY_STAY}",
    )
    assert_exact(compute_job(channel, whole_numbers(9, 8, 7)), whole_numbers(9, 8, 7))


def most_is_free(channel: grpc.Channel) -> bool:
    """Whether a job is accepted at once that takes most of the memory."""
    with Stream(channel) as stream:
        stream.send(make_job(m=1, n=9000, k=9000, results=("y",)))  # W: 309 MiB
        try:
            outcome = stream.receive_accepted()
        except CallError as error:
            assert error.reason == "BUSY"  # noqa: PT017 - not yet
            return False
        assert outcome.accepted.reserved_bytes > LIMIT // 2
        return not outcome.queued


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("be_idle", 100),
        pytest.param("read_slowly", 24, marks=pytest.mark.big),  # 20 s
        ("write_slowly", 24),
    ],
    ids=str,
)
def test_slow_clients_slow_only_themselves(server, channel, kind, count):
    before = resident(server)
    forget_peak(server)
    ratios = []
    for _ in range(3):  # the machine has moods of its own
        alone = median_seconds(channel)
        with misbehaving_clients(server, kind, count), probing(server):
            ratios.append(median_seconds(channel) / alone)
        if ratios[-1] <= 1.5:
            break
    assert min(ratios) <= 1.5
    assert peak(server) <= LIMIT + CUDA_BYTES
    assert_memory_comes_back(server, channel, before)


@pytest.mark.big
def test_clients_that_push_while_they_wait_fill_no_memory():
    with (
        running_server(
            memory_limit=LIMIT, max_jobs=1, row_block_bytes=MIB, grace=0.2
        ) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        assert_exact(stream_job(channel, JOB), JOB)
        before = resident(server)
        forget_peak(server)
        with Stream(channel, timeout_s=60) as first:
            first.send(make_job(m=None))
            first.receive_accepted()
            with misbehaving_clients(server, "push", 100), probing(server):
                time.sleep(2)  # let them push
                assert peak(server) <= LIMIT + CUDA_BYTES
        assert_memory_comes_back(server, channel, before)
        assert_exact(stream_job(channel, JOB), JOB)


def test_clients_that_write_all_before_they_read_are_stopped():
    with (
        running_server(
            memory_limit=LIMIT, row_block_bytes=MIB, idle_timeout=2.0, grace=0.2
        ) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        assert_exact(stream_job(channel, JOB), JOB)
        before = resident(server)
        forget_peak(server)
        with misbehaving_clients(server, "write_without_reading", 8), probing(server):
            record = server.wait_for_log(lambda r: r.get("reason") == "CLIENT_IDLE")
            assert "did not read" in record["error"]
            assert_exact(stream_job(channel, JOB), JOB)
        assert peak(server) <= LIMIT + CUDA_BYTES
        assert_memory_comes_back(server, channel, before)


def test_a_client_that_is_killed_leaves_nothing_behind(server, channel):
    before = resident(server)
    with misbehaving_clients(server, "stop_half_way", 1) as client:
        client.kill()
        record = server.wait_for_log(
            lambda r: r.get("job_id") == "half" and "outcome" in r
        )
    assert record["outcome"] == "CANCELLED"
    assert_memory_comes_back(server, channel, before)


def test_a_server_that_is_killed_in_the_middle_is_an_error_and_no_hang():
    with (
        running_server(row_block_bytes=MIB) as server,
        grpc.insecure_channel(server.address) as channel,
        Stream(channel, timeout_s=60) as stream,
    ):
        rows = whole_numbers(64, 256, 256)
        stream.send(rows.job(open_m=True))
        stream.receive_accepted()
        stream.send_all(repeated_rows(rows, None))
        for _ in range(20):
            assert stream.receive() is not None
        started = time.monotonic()
        server.kill()
        assert stream.failure().status is StatusCode.UNAVAILABLE
        assert time.monotonic() - started < 10


def test_health_answers_during_a_long_computation():
    cube = normal_numbers(2560, 2560, 2560)
    with (
        running_server() as server,
        grpc.insecure_channel(server.address) as channel,
        probing(server),
    ):
        outcome = stream_job(channel, cube, timeout_s=100)
    # A GPU is through with it before anybody could miss an answer.
    assert outcome.receipt.computing_seconds > 0.5 or BACKEND == "cupy"
    # Column sums: 1' (A B) = (1' A) B, within what float32 sums allow.
    for name, a, b in (
        ("y", cube.x, cube.w),
        ("dx", cube.dy, cube.w.T),
        ("dw", cube.x.T, cube.dy),
    ):
        expected = a.sum(axis=0, dtype=np.float64) @ b
        actual = outcome.arrays[name].sum(axis=0, dtype=np.float64)
        size = np.abs(a).sum(axis=0, dtype=np.float64) @ np.abs(b)
        assert (np.abs(actual - expected) <= 2560 * 2**-24 * size).all()
