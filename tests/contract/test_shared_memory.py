"""Jobs in memory that server and client share, and what a hostile client gets."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
from grpc import StatusCode

from gradwire.v1 import gradient_service_pb2 as service_pb2
from gradwire.v1 import job_pb2, matrix_pb2
from tests.support.proxy import Proxy
from tests.support.raw import (
    DTYPES,
    INLINE,
    SERVICE,
    CallError,
    Problem,
    Stream,
    chunk,
    compute_job,
    compute_request,
    end,
    normal_numbers,
    stream_job,
)
from tests.support.serving import ServerProcess, running_server
from tests.support.shared_memory import (
    RawRegion,
    descriptors,
    open_region,
    proof_for,
    shared_job,
)

MIB = 1 << 20
INVALID = StatusCode.INVALID_ARGUMENT
BAD_REF = "BUFFER_REF_INVALID"


@pytest.fixture(scope="module")
def sharing() -> Iterator[ServerProcess]:
    with running_server(
        allow_shared_memory=True, row_block_bytes=10_000, memory_limit=256 * MIB
    ) as server:
        yield server


@pytest.fixture(scope="module")
def channel(sharing: ServerProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(sharing.address) as opened:
        yield opened


@pytest.fixture
def region(channel: grpc.Channel) -> Iterator[RawRegion]:
    with RawRegion(channel, 2 * MIB) as opened:
        yield opened


@pytest.fixture
def problem() -> Problem:
    return normal_numbers(300, 40, 30)


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_who_cannot_read_the_servers_file_gets_no_memory(sharing):
    """A proxy on the server's host makes all its callers local."""
    before = descriptors(sharing.pid)
    with Proxy(sharing.address) as proxy, grpc.insecure_channel(proxy.address) as far:
        (answer,) = open_region(far, size_bytes=MIB)
        told = [field.name for field, _ in answer.ListFields()]
        assert told == ["challenge"]
        for guess in (bytes(32), answer.challenge.cookie, b"x", bytes(4096)):
            with pytest.raises(grpc.RpcError) as raised:
                next(open_region(far, size_bytes=MIB, proof=guess))
            refused = CallError(raised.value)
            assert refused.status is StatusCode.PERMISSION_DENIED
            assert (refused.reason, refused.fields.keys()) == ("NOT_ALLOWED", {"proof"})
        assert descriptors(sharing.pid) == before
        # One that can is local indeed.
        with RawRegion(far, MIB):
            assert descriptors(sharing.pid) > before


def test_the_file_that_proves_it_cannot_be_changed(sharing, channel):
    (answer,) = open_region(channel)
    path = f"/proc/{answer.challenge.pid}/fd/{answer.challenge.fd}"
    fd = os.open(path, os.O_RDWR)
    try:
        for change in (
            lambda: os.write(fd, b"x"),
            lambda: os.ftruncate(fd, 0),
            lambda: os.ftruncate(fd, 4096),
        ):
            with pytest.raises(PermissionError):
                change()
    finally:
        os.close(fd)
    assert len(proof_for(channel)) == 32


def failure(channel: grpc.Channel, *messages: Any) -> CallError:
    with Stream(channel) as stream:
        stream.send(*messages)
        stream.half_close()
        return stream.failure()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(300, 40, 30), (1, 1, 1), (0, 3, 2), (65, 7, 0)])
def test_a_job_has_the_bits_that_it_has_in_messages(channel, region, dtype, shape):
    problem = normal_numbers(*shape, dtype)
    job = region.lay_out(problem)
    receipt = shared_job(channel, job)
    expected = stream_job(channel, problem)
    assert region.bits(job) == expected.bits
    assert receipt.transport == "shm"
    assert receipt.blocks == expected.receipt.blocks
    assert (receipt.bytes_received, receipt.bytes_sent) == (
        expected.receipt.bytes_received,
        expected.receipt.bytes_sent,
    )


@pytest.mark.parametrize("results", [("y",), ("dx",), ("dw",), ("y", "dw")])
def test_some_results_alone(channel, region, results):
    problem = Problem(*vars(normal_numbers(200, 30, 20)).values())
    problem = Problem(problem.x, problem.w, problem.dy, results)
    job = region.lay_out(problem)
    shared_job(channel, job)
    assert region.bits(job) == stream_job(channel, problem).bits


def test_results_of_other_dtypes_and_a_wider_sum(channel, region):
    problem = normal_numbers(200, 30, 20, "bfloat16")
    options: dict[str, Any] = {
        "results": {"y": "float32", "dx": "float16", "dw": "float64"},
        "numerics": job_pb2.Numerics(dw_accumulator=matrix_pb2.DTYPE_FLOAT64),
    }
    job = region.lay_out(problem, **options)
    shared_job(channel, job)
    assert region.bits(job) == stream_job(channel, problem, **options).bits


def test_matrices_may_lie_in_several_regions(channel, region, problem):
    expected = stream_job(channel, problem).bits
    with RawRegion(channel, MIB) as other:
        job = region.lay_out(problem)
        job.regions.add(token=other.answer.token)
        job.y.shared.region = 1
        job.y.shared.offset_bytes = 0
        shared_job(channel, job)
        bits = region.bits(job) | {"y": other.memory[: 300 * 30 * 4].tobytes()}
    assert bits == expected


def test_what_was_asked_comes_back_in_accepted(channel, region, problem):
    job = region.lay_out(problem)
    with Stream(channel) as stream:
        stream.send(job)
        effective = stream.receive_accepted().accepted.effective_job
    assert effective.regions == job.regions
    for name in ("x", "w", "dy", "y", "dx", "dw"):
        assert getattr(effective, name).shared == getattr(job, name).shared


def test_the_cookie_stands_at_the_beginning(region):
    cookie = region.answer.cookie
    assert len(cookie) >= 16
    assert region.memory[: len(cookie)].tobytes() == cookie
    assert not region.memory[len(cookie) :].any()


@pytest.mark.parametrize("size_bytes", [0, 1, 100 * MIB])
def test_a_client_cannot_change_the_size(region, size_bytes):
    fd = os.open(region.path, os.O_RDWR)
    try:
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size_bytes)
    finally:
        os.close(fd)


def shift(matrix: str, **fields: int) -> Callable[[job_pb2.Job], None]:
    def change(job: job_pb2.Job) -> None:
        for name, value in fields.items():
            setattr(getattr(job, matrix).shared, name, value)

    return change


def same_buffer(matrix: str, as_: str) -> Callable[[job_pb2.Job], None]:
    def change(job: job_pb2.Job) -> None:
        offset = getattr(job, as_).shared.offset_bytes
        getattr(job, matrix).shared.offset_bytes = offset + 64

    return change


def inline_x(job: job_pb2.Job) -> None:
    job.x.CopyFrom(INLINE)


def inline_dw(job: job_pb2.Job) -> None:
    job.dw.inline.SetInParent()


def all_inline(job: job_pb2.Job) -> None:
    for name in ("x", "w", "dy", "y", "dx", "dw"):
        getattr(job, name).inline.SetInParent()


def twice(job: job_pb2.Job) -> None:
    job.regions.add(token=job.regions[0].token)


def no_regions(job: job_pb2.Job) -> None:
    del job.regions[:]


def open_m(job: job_pb2.Job) -> None:
    job.ClearField("m")


def checksums(job: job_pb2.Job) -> None:
    job.checksum = matrix_pb2.CHECKSUM_CRC32C


@pytest.mark.parametrize(
    ("change", "reason", "field"),
    [
        (shift("x", offset_bytes=4), BAD_REF, "job.x.source.offset_bytes"),
        (
            shift("w", offset_bytes=-64),
            BAD_REF,
            "job.w.source.offset_bytes",
        ),
        (
            shift("dy", offset_bytes=2 * MIB - 64),
            BAD_REF,
            "job.dy.source.offset_bytes",
        ),
        (
            shift("dx", offset_bytes=2**63 - 64),
            BAD_REF,
            "job.dx.destination.offset_bytes",
        ),
        (shift("y", region=1), BAD_REF, "job.y.destination.region"),
        (shift("y", region=-1), BAD_REF, "job.y.destination.region"),
        (same_buffer("y", "x"), BAD_REF, "job.y.destination.offset_bytes"),
        (
            same_buffer("dw", "w"),
            BAD_REF,
            "job.dw.destination.offset_bytes",
        ),
        (
            same_buffer("dx", "y"),
            BAD_REF,
            "job.dx.destination.offset_bytes",
        ),
        (inline_x, BAD_REF, "job.x.source"),
        (inline_dw, BAD_REF, "job.dw.destination"),
        (all_inline, BAD_REF, "job.regions"),
        (twice, BAD_REF, "job.regions"),
        (no_regions, BAD_REF, "job.x.source.region"),
        (open_m, "SHAPE_INVALID", "job.m"),
        (checksums, "OPTION_INVALID", "job.checksum"),
    ],
    ids=lambda value: getattr(value, "__qualname__", str(value)),
)
def test_buffer_references_that_cannot_be_are_refused(
    channel, region, problem, change, reason, field
):
    job = region.lay_out(problem)
    before = region.memory.copy()
    change(job)
    refused = failure(channel, job, end(300))
    assert (refused.status, refused.reason) == (INVALID, reason)
    assert list(refused.fields) == [field]
    assert np.array_equal(region.memory, before)


# NumPy multiplies a matrix by its own transpose with SYRK: other bits than GEMM's.


@pytest.mark.parametrize(("m", "n"), [(50, 20), (4096, 8), (300, 200)])
def test_operands_may_lie_in_the_same_bytes(channel, region, m, n):
    same = normal_numbers(m, n, n)
    problem = Problem(same.x, same.w, same.x)
    job = region.lay_out(problem)
    job.dy.shared.offset_bytes = job.x.shared.offset_bytes
    shared_job(channel, job)
    assert region.bits(job) == stream_job(channel, problem).bits


def test_w_may_lie_where_dy_does(channel, region):
    square = normal_numbers(200, 200, 200)
    problem = Problem(square.x, square.w, square.w)
    job = region.lay_out(problem)
    job.dy.shared.offset_bytes = job.w.shared.offset_bytes
    shared_job(channel, job)
    assert region.bits(job) == stream_job(channel, problem).bits


def test_operands_may_overlap(channel, region):
    shift = 160
    elements = normal_numbers(301, 320, 1).x.reshape(-1)
    x, dy = (elements[at:][: 300 * 320].reshape(300, 320) for at in (0, shift))
    problem = Problem(x, normal_numbers(1, 320, 320).w, dy, ("dw",))
    job = region.lay_out(problem)
    job.dy.shared.offset_bytes = job.x.shared.offset_bytes + shift * 4
    region.memory[: 301 * 320 * 4] = elements.view(np.uint8)
    shared_job(channel, job)
    assert region.bits(job) == stream_job(channel, problem).bits


def test_only_the_token_of_an_open_region_of_this_server_is_taken(
    channel, region, problem
):
    with (
        running_server(allow_shared_memory=True) as other_server,
        grpc.insecure_channel(other_server.address) as other_channel,
        RawRegion(other_channel, MIB) as of_another_server,
    ):
        job = region.lay_out(problem)
        closed = RawRegion(channel, MIB)
        closed.close()
        made_up = region.answer.token[:-1] + "~"
        closed_token, other_token = closed.answer.token, of_another_server.answer.token
        for token in ("", made_up, other_token):
            job.regions[0].token = token
            refused = failure(channel, job, end(300))
            assert refused.status is StatusCode.FAILED_PRECONDITION
            assert refused.reason == "REGION_UNKNOWN"
            assert list(refused.fields) == ["job.regions[0].token"]
            assert not token or token not in refused.text
        job.regions[0].token = closed_token

        def is_refused() -> bool:
            with Stream(channel) as stream:
                stream.send(job, end(300))
                stream.half_close()
                try:
                    while stream.receive() is not None:
                        pass
                except CallError as error:
                    return error.reason in {"REGION_UNKNOWN", BAD_REF}
            return False

        wait_until(is_refused)


def test_what_comes_after_the_header_must_be_end_alone(channel, region, problem):
    job = region.lay_out(problem)
    refusals = [
        ((chunk("x", 0, bytes(160)),), "MESSAGE_UNEXPECTED"),
        ((end(299),), "M_MISMATCH"),
        ((end(300), end(300)), "MESSAGE_UNEXPECTED"),
        ((), "END_MISSING"),
    ]
    for messages, reason in refusals:
        assert failure(channel, job, *messages).reason == reason
    shared_job(channel, job)


def test_compute_takes_no_shared_memory(channel, region, problem):
    request = service_pb2.ComputeRequest(job=region.lay_out(problem))
    with pytest.raises(CallError) as refused:
        compute_request(channel, request)
    assert (refused.value.status, refused.value.reason) == (INVALID, "OPTION_INVALID")


@pytest.mark.parametrize("size_bytes", [0, -1, 2**63 - 1])
def test_a_region_has_a_size(channel, size_bytes):
    with pytest.raises(CallError) as refused:
        RawRegion(channel, size_bytes)
    assert (refused.value.status, refused.value.reason) == (INVALID, "OPTION_INVALID")
    assert list(refused.value.fields) == ["size_bytes"]


def test_regions_count_in_the_servers_memory(channel, sharing, problem):
    with pytest.raises(CallError) as refused:
        RawRegion(channel, 256 * MIB)
    assert refused.value.reason == "JOB_TOO_LARGE"
    with RawRegion(channel, 200 * MIB):
        with pytest.raises(CallError) as refused:
            RawRegion(channel, 100 * MIB)
        assert refused.value.reason == "BUSY"
        assert refused.value.retry_after_s
        # What is left suffices for small jobs, and is not enough for a large one.
        compute_job(channel, problem)
        large = normal_numbers(8, 4096, 2048)
        assert failure(channel, large.job()).reason == "BUSY"

    def fits_again() -> bool:
        try:
            RawRegion(channel, 200 * MIB).close()
        except CallError:
            return False
        return True

    wait_until(fits_again)


def test_a_server_without_the_setting_has_none_of_it(server, region, problem):
    with grpc.insecure_channel(server.address) as plain:
        with pytest.raises(CallError) as refused:
            RawRegion(plain, MIB)
        assert refused.value.status is StatusCode.UNIMPLEMENTED
        job = region.lay_out(problem)
        no_job = failure(plain, job, end(300))
        assert (no_job.status, no_job.reason) == (
            StatusCode.UNIMPLEMENTED,
            "OPTION_UNKNOWN",
        )
        info = plain.unary_unary(
            f"/{SERVICE}/GetServerInfo",
            response_deserializer=service_pb2.GetServerInfoResponse.FromString,
        )(b"")
        assert "shared-memory" not in info.features


def test_a_server_with_it_says_so_and_takes_it_as_a_required_feature(
    channel, region, problem
):
    job = region.lay_out(problem, required_features=["shared-memory"])
    shared_job(channel, job)


CLIENT = """
    import sys, time, grpc
    from tests.support.shared_memory import RawRegion
    channel = grpc.insecure_channel(sys.argv[1])
    regions = [RawRegion(channel, 4 << 20) for _ in range(3)]
    print("open", flush=True)
    time.sleep(600)
"""


def test_the_regions_of_a_killed_client_are_reclaimed(sharing):
    before = descriptors(sharing.pid)
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CLIENT), sharing.address],
        stdout=subprocess.PIPE,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"open\n"
        assert descriptors(sharing.pid) >= before + 3
        process.send_signal(signal.SIGKILL)
    wait_until(lambda: descriptors(sharing.pid) <= before)


@pytest.mark.thorough
def test_a_region_that_is_closed_in_mid_job_lasts_until_the_job_is_done(
    sharing, channel
):
    before = descriptors(sharing.pid)
    problem = normal_numbers(5_000, 128, 96)
    expected = stream_job(channel, problem).bits
    region = RawRegion(channel, 64 * MIB)
    job = region.lay_out(problem)
    with Stream(channel) as stream:
        stream.send(job)
        stream.receive_accepted()
        region.close()
        stream.send(end(job.m))
        stream.half_close()
        answer = stream.receive()
        assert answer is not None
        assert answer.receipt.m == 5_000
        assert stream.receive() is None
    assert region.bits(job) == expected
    wait_until(lambda: descriptors(sharing.pid) <= before)


def test_a_cancelled_job_lets_go_of_its_region(sharing, channel):
    before = descriptors(sharing.pid)
    problem = normal_numbers(20_000, 128, 96)
    with RawRegion(channel, 64 * MIB) as region:
        job = region.lay_out(problem)
        with Stream(channel) as stream:
            stream.send(job, end(job.m))
            stream.receive_accepted()
    wait_until(lambda: descriptors(sharing.pid) <= before)
    compute_job(channel, normal_numbers(3, 2, 2))


def test_operands_that_change_meanwhile_harm_nothing_else(channel, region, problem):
    other = normal_numbers(300, 40, 30, seed=1)
    expected = stream_job(channel, other).bits
    job = region.lay_out(problem)
    stop = []

    def scribble() -> None:
        random = np.random.default_rng(0)
        while not stop:
            region.memory[: 64 * 1024] = random.integers(0, 256, 64 * 1024)

    with ThreadPoolExecutor(1) as pool:
        scribbling = pool.submit(scribble)
        try:
            for _ in range(20):
                shared_job(channel, job)
                assert stream_job(channel, other).bits == expected
        finally:
            stop.append(True)
        scribbling.result()


def test_it_is_for_clients_of_the_same_host():
    with contextlib.closing(socket.socket(type=socket.SOCK_DGRAM)) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent
        except OSError:
            pytest.skip("this machine has no address but loopback's")
        host = probe.getsockname()[0]
    with (
        running_server(
            allow_shared_memory=True, listen=["0.0.0.0:0"], insecure=True
        ) as server,
        grpc.insecure_channel(f"{host}:{server.address.rpartition(':')[2]}") as channel,
    ):
        with pytest.raises(CallError) as refused:
            RawRegion(channel, MIB)
        assert refused.value.status is StatusCode.PERMISSION_DENIED
        assert refused.value.reason == "NOT_ALLOWED"
