"""A job takes the memory that it was told to reserve, however many rows it has."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from gradwire.v1 import job_pb2
from gradwire_protocol.limits import MAX_MESSAGE_BYTES
from tests.support.observing import (
    CUDA_BYTES,
    MIB,
    forget_peak,
    memory_apart,
    module,
    peak,
    peak_apart,
    resident,
)
from tests.support.raw import (
    DTYPES,
    Outcome,
    Problem,
    Stream,
    dtype_number,
    repeated_rows,
    stream_job,
    whole_numbers,
)
from tests.support.serving import ServerProcess, running_server

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
        while (message := stream.receive()).HasField("chunk"):
            if message.chunk.matrix == 4:  # Y
                elements = np.frombuffer(message.chunk.data, rows.x.dtype)
                total += float(elements.sum(dtype=np.float64))
            else:
                dw += message.chunk.data
        outcome.receipt = message.receipt
        assert stream.receive() is None
    outcome.arrays["dw"] = np.frombuffer(dw, np.float64).reshape(rows.w.shape)
    return outcome, total


@pytest.mark.big
@pytest.mark.parametrize(("dtype", "accumulator"), ACCUMULATORS)
@pytest.mark.parametrize(
    "shape",
    [
        (256, 256, 256),
        (1024, 1024, 1024),
        pytest.param((2048, 2048, 2048), marks=pytest.mark.big),
        (4096, 1024, 1024),
    ],
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


def test_a_job_with_segments_stays_within_what_it_reserved(server, channel):
    """The total over segments and the sums of one: both are more than is allowed."""
    problem = whole_numbers(4 * 64, 3000, 3000, results=("dw",))
    assert 2 * problem.w.nbytes > ALLOWANCE
    numerics = job_pb2.Numerics(dw_segment_rows=64)
    with Stream(channel, timeout_s=60) as stream:
        before = resident(server)
        forget_peak(server)
        stream.send(problem.job(numerics=numerics, block_rows=32))
        reserved = stream.receive_accepted().accepted.reserved_bytes
        stream.send_all(problem.body(64))
        stream.half_close()
        while stream.receive() is not None:
            pass
        assert peak(server) - before <= reserved + ALLOWANCE


def test_the_first_job_of_a_server_does_too():
    problem = whole_numbers(16_384, 256, 256, "float64")
    with (
        running_server() as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stream_job(channel, whole_numbers(4, 4, 4))  # what gRPC and BLAS load late
        before = resident(server)
        forget_peak(server)
        outcome = stream_job(channel, problem, timeout_s=60)
        # CUDA loads what computes in a dtype when it first does.
        allowed = outcome.accepted.reserved_bytes + ALLOWANCE + CUDA_BYTES
        assert peak(server) - before <= allowed


def test_a_million_rows_take_no_more_memory_than_their_first_ones(server, channel):
    rows = whole_numbers(8000, 64, 64, results=("y", "dw"))
    options = {
        "results": {"y": None, "dw": "float64"},
        "numerics": job_pb2.Numerics(dw_accumulator=dtype_number("float64")),
    }
    repeat(channel, rows, 2, **options)
    before = resident(server)
    forget_peak(server)
    outcome, sum_of_y = repeat(channel, rows, 125, **options)
    reserved = outcome.accepted.reserved_bytes
    assert peak(server) - before <= reserved + ALLOWANCE
    assert reserved < 100 * MIB
    receipt = outcome.receipt
    assert receipt.m == 1_000_000
    assert receipt.bytes_received + receipt.bytes_sent > 5 * 10**8
    x, w, dy = (a.astype(np.float64) for a in (rows.x, rows.w, rows.dy))
    np.testing.assert_array_equal(outcome.arrays["dw"], 125 * (x.T @ dy))
    assert sum_of_y == 125 * (x @ w).sum()


def test_what_a_job_reserves_does_not_depend_on_its_rows(channel):
    reserved = set()
    for m in (100_000, 2**40, None):
        with Stream(channel) as stream:
            stream.send(whole_numbers(1, 64, 64).job(m=m))
            reserved.add(stream.receive_accepted().accepted.reserved_bytes)
    assert len(reserved) == 1


def test_memory_does_not_creep(server, channel):
    problem = whole_numbers(512, 512, 512)
    for _ in range(10):
        stream_job(channel, problem)
    before = resident(server)
    for _ in range(30):
        stream_job(channel, problem)
    assert resident(server) <= before + ALLOWANCE // 4


TCP: dict[str, Any] = {"transport": "grpc"}
SHM: dict[str, Any] = {"transport": "shm"}
STREAMED = {"rows": 32_000, "times": 20}
HALF = {"wire_dtype": "bfloat16", "result_dtype": {"dw": "float32"}}
IN_ARRAYS = {"rows": 400_000, "inside": False}


@pytest.fixture(scope="module")
def reached_in_every_way(tmp_path_factory) -> Iterator[ServerProcess]:
    """A server whose blocks are small beside what its clients move."""
    unix = tmp_path_factory.mktemp("unix") / "socket"
    with running_server(
        listen=["127.0.0.1:0", f"unix:{unix}"],
        allow_shared_memory=True,
        row_block_bytes=MIB,
    ) as process:
        yield process


@pytest.mark.big
@pytest.mark.parametrize(
    ("transport", "connect", "job"),
    [
        pytest.param("tcp", TCP, STREAMED, id="stream-tcp"),
        pytest.param("unix", TCP, STREAMED, id="stream-unix", marks=pytest.mark.big),
        pytest.param(
            "tcp",
            TCP,
            STREAMED | {"times": 40, "options": HALF},
            id="stream-wire-dtype",
            marks=pytest.mark.big,
        ),
        pytest.param("tcp", TCP, IN_ARRAYS, id="arrays-tcp"),
        pytest.param("unix", TCP, IN_ARRAYS, id="arrays-unix", marks=pytest.mark.big),
        pytest.param(
            "tcp",
            TCP,
            IN_ARRAYS | {"rows": 800_000, "options": HALF},
            id="arrays-wire-dtype",
            marks=pytest.mark.big,
        ),
        pytest.param("shm", SHM, IN_ARRAYS | {"inside": True}, id="arrays-shm"),
        pytest.param(
            "shm", SHM, IN_ARRAYS, id="arrays-shm-copied", marks=pytest.mark.big
        ),
    ],
)
def test_neither_side_takes_more_than_a_job_reserved(
    reached_in_every_way, transport, connect, job
):
    """A client holds no more row blocks and messages than its server does.

    What is shared between the two is neither's: it is the job's matrices.
    """
    server = reached_in_every_way
    address = server.addresses[transport == "unix"]
    arguments = (address, json.dumps(connect), json.dumps(job))
    with module("client", *arguments) as process:
        before = memory_apart(server.pid)
        forget_peak(server)
        process.stdin.write("go\n")
        process.stdin.flush()
        seen = json.loads(process.stdout.readline())
        took = peak_apart(server.pid) - before
    assert seen["transport"] == transport
    allowed = seen["reserved_bytes"] + ALLOWANCE
    assert seen["took_bytes"] <= allowed
    assert took <= allowed
    # Had either kept one side's matrices, it would be over.
    assert seen["moved_bytes"] > 2 * allowed


def test_a_job_reserves_its_row_blocks_and_its_messages(channel):
    """Three, and as many more as have 4 MiB of operands together."""
    with Stream(channel) as stream:
        stream.send(whole_numbers(1, 64, 64).job(m=10**6))
        accepted = stream.receive_accepted().accepted
    slot = accepted.block_rows * 4 * 64 * 4  # rows of x, dy, y and dx
    messages = 2 * (MAX_MESSAGE_BYTES + (1 << 20))
    reserved = accepted.reserved_bytes
    assert (slot, accepted.credit_blocks) == (8 * MIB, 4)
    assert 4 * slot + messages < reserved < 4 * slot + messages + 8 * MIB


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
