"""A job takes the memory that it was told to reserve, however many rows it has."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import numpy as np
import pytest

from gradwire.v1 import job_pb2
from tests.integration.load.observing import MIB, forget_peak, peak, resident
from tests.raw import (
    DTYPES,
    Outcome,
    Problem,
    Stream,
    dtype_number,
    repeated_rows,
    stream_job,
    whole_numbers,
)
from tests.serving import ServerProcess, running_server

ALLOWANCE = 64 * MIB
ACCUMULATORS = [
    (dtype, accumulator)
    for dtype in DTYPES
    for accumulator in ("float32", "float64")
    if (dtype, accumulator) != ("float64", "float32")
]


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with running_server() as process:
        yield process


@pytest.fixture(scope="module")
def channel(server) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as opened:
        yield opened


def repeat(
    channel: grpc.Channel,
    rows: Problem,
    times: int,
    timeout_s: float = 100,
    **options,
) -> tuple[Outcome, float]:
    """A job of the same rows again and again, and the sum of all of its Y.

    The results are looked at as they come and not kept.
    """
    total = 0.0
    dw = bytearray()
    with Stream(channel, timeout_s=timeout_s) as stream:
        stream.send(rows.job(open_m=True, **options))
        outcome = stream.receive_accepted()
        stream.send_all(repeated_rows(rows, times))
        stream.half_close()
        while (message := stream.receive()).HasField("block"):
            if message.block.matrix == 4:  # Y
                elements = np.frombuffer(message.block.data, rows.x.dtype)
                total += float(elements.sum(dtype=np.float64))
            else:
                dw += message.block.data
        outcome.receipt = message.receipt
        assert stream.receive() is None
    outcome.arrays["dw"] = np.frombuffer(dw, np.float64).reshape(rows.w.shape)
    return outcome, total


@pytest.mark.parametrize(("dtype", "accumulator"), ACCUMULATORS)
@pytest.mark.parametrize(
    "shape",
    [(256, 256, 256), (1024, 1024, 1024), (2048, 2048, 2048), (4096, 1024, 1024)],
    ids=str,
)
def test_a_job_stays_within_what_it_reserved(
    server, channel, shape, dtype, accumulator
):
    problem = whole_numbers(*shape, dtype)
    options = {"numerics": job_pb2.Numerics(dw_accumulator=dtype_number(accumulator))}
    stream_job(channel, problem, timeout_s=60, **options)
    before = resident(server)
    forget_peak(server)
    outcome = stream_job(channel, problem, timeout_s=60, **options)
    assert peak(server) - before <= outcome.accepted.reserved_bytes + ALLOWANCE
    assert outcome.receipt.m == shape[0]


def test_the_first_job_of_a_server_does_too():
    problem = whole_numbers(4096, 1024, 1024, "float64")
    with (
        running_server() as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stream_job(channel, whole_numbers(4, 4, 4))  # what gRPC and BLAS load late
        before = resident(server)
        forget_peak(server)
        outcome = stream_job(channel, problem, timeout_s=60)
        assert peak(server) - before <= outcome.accepted.reserved_bytes + ALLOWANCE


def test_two_million_rows_take_no_more_memory_than_their_first_ones(server, channel):
    rows = whole_numbers(8000, 64, 64, results=("y", "dw"))
    options = {
        "results": {"y": None, "dw": "float64"},
        "numerics": job_pb2.Numerics(dw_accumulator=dtype_number("float64")),
    }
    repeat(channel, rows, 2, **options)
    before = resident(server)
    forget_peak(server)
    outcome, sum_of_y = repeat(channel, rows, 250, **options)
    reserved = outcome.accepted.reserved_bytes
    assert peak(server) - before <= reserved + ALLOWANCE
    assert reserved < 100 * MIB
    receipt = outcome.receipt
    assert receipt.m == 2_000_000
    assert receipt.bytes_received + receipt.bytes_sent > 10**9
    x, w, dy = (a.astype(np.float64) for a in (rows.x, rows.w, rows.dy))
    np.testing.assert_array_equal(outcome.arrays["dw"], 250 * (x.T @ dy))
    assert sum_of_y == 250 * (x @ w).sum()


def test_what_a_job_reserves_does_not_depend_on_its_rows(channel):
    reserved = set()
    for m in (100_000, 2**40, None):
        with Stream(channel) as stream:
            stream.send(whole_numbers(1, 64, 64).job(m=m))
            reserved.add(stream.receive_accepted().accepted.reserved_bytes)
    assert len(reserved) == 1


def test_memory_does_not_creep(server, channel):
    problem = whole_numbers(512, 512, 512)
    for _ in range(20):
        stream_job(channel, problem)
    before = resident(server)
    for _ in range(60):
        stream_job(channel, problem)
    assert resident(server) <= before + ALLOWANCE // 4


@pytest.mark.big
def test_a_job_over_4_gib_is_right_and_takes_no_more_memory(server, channel):
    rows, times = whole_numbers(4000, 512, 512, results=("y", "dw")), 530
    options = {
        "results": {"y": None, "dw": "float64"},
        "numerics": job_pb2.Numerics(dw_accumulator=dtype_number("float64")),
    }
    repeat(channel, rows, 2, **options)
    before = resident(server)
    forget_peak(server)
    outcome, sum_of_y = repeat(channel, rows, times, timeout_s=600, **options)
    assert peak(server) - before <= outcome.accepted.reserved_bytes + ALLOWANCE
    assert rows.x.nbytes * times > 2**32
    assert outcome.receipt.bytes_received > 2 * 2**32
    assert outcome.receipt.bytes_sent > 2**32
    x, w, dy = (a.astype(np.float64) for a in (rows.x, rows.w, rows.dy))
    # Column sums: 1' (A B) = (1' A) B.
    np.testing.assert_array_equal(
        outcome.arrays["dw"].sum(axis=0), times * (x.sum(axis=1) @ dy)
    )
    assert sum_of_y == times * (x.sum(axis=0) @ w.sum(axis=1))
