"""What a server answers when it is full, or when its client keeps it waiting."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import psutil
import pytest
from grpc import StatusCode

from gradwire.v1 import job_pb2, matrix_pb2
from gradwire_protocol.limits import SERVICE
from gradwire_server.admission.controller import CALL_BYTES
from tests.contract.conftest import assert_untroubled, serving_both
from tests.support.observing import wait_until
from tests.support.raw import (
    TIMEOUT_S,
    CallError,
    Outcome,
    Problem,
    Stream,
    assert_exact,
    chunk,
    compute_job,
    end,
    stream_job,
    whole_numbers,
)
from tests.support.serving import BACKEND, ServerProcess, running_server

MIB = 1 << 20
SMALL = whole_numbers(40, 5, 4)


@contextlib.contextmanager
def serving(**settings) -> Iterator[tuple[ServerProcess, grpc.Channel]]:
    settings = {"row_block_bytes": 1024} | settings
    with (
        running_server(**settings) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        yield server, channel
        assert_untroubled(server)


def finish(stream: Stream, outcome: Outcome, problem: Problem) -> None:
    """Sends what a job still lacks, which is everything, and checks it."""
    stream.send_all(problem.body(outcome.accepted.block_rows))
    stream.half_close()
    assert_exact(stream.receive_results(outcome), problem)


@contextlib.contextmanager
def running_job(channel: grpc.Channel) -> Iterator[tuple[Stream, Outcome]]:
    with Stream(channel) as stream:
        stream.send(SMALL.job())
        yield stream, stream.receive_accepted()


def queued_behind(stream: Stream) -> int:
    message = stream.receive()
    assert message.WhichOneof("message") == "queued"
    return message.queued.jobs_ahead


def test_a_job_that_finds_the_queue_full_is_told_when_to_come_again():
    with serving(max_jobs=1, max_queue=0) as (_, channel):
        with running_job(channel) as first:
            for call in (stream_job, compute_job):
                with pytest.raises(CallError) as raised:
                    call(channel, SMALL, job_id="one-too-many")
                error = raised.value
                assert error.status is StatusCode.RESOURCE_EXHAUSTED
                assert error.reason == "BUSY"
                assert error.metadata["job_id"] == "one-too-many"
                assert 0 < error.retry_after_s <= 60
                assert "busy" in error.text
            finish(*first, SMALL)
        assert_exact(stream_job(channel, SMALL), SMALL)


def test_jobs_wait_in_the_order_in_which_they_came():
    with (
        serving(max_jobs=1, max_queue=2) as (_, channel),
        running_job(channel) as first,
        Stream(channel) as second,
        Stream(channel) as third,
    ):
        second.send(SMALL.job())
        assert queued_behind(second) == 1
        third.send(SMALL.job())
        assert queued_behind(third) == 2
        with pytest.raises(CallError, match="BUSY"):
            stream_job(channel, SMALL)
        finish(*first, SMALL)
        finish(second, second.receive_accepted(), SMALL)
        outcome = third.receive_accepted()
        assert outcome.queued == [1]
        finish(third, outcome, SMALL)
        assert outcome.receipt.queued_seconds > 0


def test_a_job_that_waits_hears_its_place_again_and_again():
    """So a proxy that ends idle calls does not end it."""
    with (
        serving(max_jobs=1, max_queue=2, queued_every_s=0.15) as (_, channel),
        running_job(channel) as first,
        Stream(channel) as second,
    ):
        second.send(SMALL.job())
        began = time.monotonic()
        assert [queued_behind(second) for _ in range(4)] == [1] * 4
        assert time.monotonic() - began >= 0.3  # not without pause
        finish(*first, SMALL)
        finish(second, second.receive_accepted(), SMALL)


def test_a_waiting_caller_who_leaves_gives_up_its_place():
    with (
        serving(max_jobs=1, max_queue=2) as (_, channel),
        running_job(channel) as first,
    ):
        with Stream(channel) as leaver:
            leaver.send(SMALL.job())
            assert queued_behind(leaver) == 1
            last = Stream(channel)
            last.send(SMALL.job())
            assert queued_behind(last) == 2
        assert queued_behind(last) == 1
        finish(*first, SMALL)
        finish(last, last.receive_accepted(), SMALL)


def has_room_in_its_queue(channel: grpc.Channel) -> bool:
    with Stream(channel) as probe:
        probe.send(SMALL.job())
        try:
            queued_behind(probe)
        except CallError:
            return False
        return True


def test_a_small_call_waits_for_its_turn_too():
    with (
        serving(max_jobs=1, max_queue=1) as (_, channel),
        running_job(channel) as first,
    ):
        compute = channel.unary_unary("/gradwire.v1.GradientService/Compute")
        request = SMALL.compute_request().SerializeToString()
        waiting = compute.future(request, timeout=20)
        while has_room_in_its_queue(channel):
            pass
        assert not waiting.done()
        finish(*first, SMALL)
        assert waiting.result()


@pytest.mark.parametrize("open_m", [False, True])
def test_a_job_larger_than_the_server_is_refused_for_good(open_m):
    with serving(memory_limit=64 * MIB) as (_, channel):
        large = whole_numbers(1, 4096, 4096)  # W alone has 64 MiB
        with pytest.raises(CallError) as raised:
            stream_job(channel, large, open_m=open_m, job_id="large")
        error = raised.value
        assert error.status is StatusCode.RESOURCE_EXHAUSTED
        assert error.reason == "JOB_TOO_LARGE"
        assert error.metadata["job_id"] == "large"
        assert error.retry_after_s is None
        assert str(64 * MIB) in error.text
        assert_exact(stream_job(channel, SMALL), SMALL)


def test_a_job_with_any_number_of_rows_is_accepted_by_a_small_server():
    rows = whole_numbers(1, 64, 64)
    with (
        serving(memory_limit=64 * MIB, row_block_bytes=MIB) as (_, channel),
        Stream(channel) as stream,
    ):
        stream.send(rows.job(m=10**14))
        accepted = stream.receive_accepted().accepted
        assert accepted.reserved_bytes < 64 * MIB


def test_jobs_wait_for_memory():
    with serving(memory_limit=160 * MIB) as (_, channel):
        half = whole_numbers(1, 2500, 2500, results=("dw",))
        with Stream(channel) as first, Stream(channel) as second:
            first.send(half.job())
            outcome = first.receive_accepted()
            # Of a GPU's job the sum of dW is in the device's own memory.
            least = 40 * MIB if BACKEND == "numpy" else 32 * MIB
            assert outcome.accepted.reserved_bytes > least
            others = []
            while True:
                others.append(Stream(channel))
                others[-1].send(half.job())
                if others[-1].receive().WhichOneof("message") == "queued":
                    break
            finish(first, outcome, half)
            finish(others[-1], others[-1].receive_accepted(), half)
            for other in others:
                other.__exit__()
            second.send(SMALL.job())
            finish(second, second.receive_accepted(), SMALL)


def test_a_queue_of_large_jobs_never_stands_in_its_own_way():
    large = whole_numbers(1, 1500, 1500, results=("dw",))
    with serving(memory_limit=64 * MIB) as (_, channel):
        reserved = stream_job(channel, large).accepted.reserved_bytes
    # The open calls of those that wait must leave room for the one that runs.
    with serving(memory_limit=reserved + CALL_BYTES + MIB) as (_, channel):
        with Stream(channel) as first:
            # Calls that all open before any is read may all be told to come back.
            first.send(large.job())
            outcome = first.receive_accepted()
            others = [Stream(channel) for _ in range(12)]
            for stream in others:
                stream.send(large.job())
                stream.send_all(large.body(1))
                stream.half_close()
            finish(first, outcome, large)
        with ThreadPoolExecutor(len(others)) as pool:
            endings = list(pool.map(ending, others, [large] * len(others)))
        assert set(endings) <= {"OK", "BUSY"}


def ending(stream: Stream, problem: Problem) -> str:
    try:
        outcome = stream.receive_accepted()
        assert_exact(stream.receive_results(outcome), problem)
    except CallError as error:
        return error.reason or error.status.name
    return "OK"


IDLE = SMALL.job(job_id="idle")


@pytest.fixture(scope="module")
def impatient(transport) -> Iterator[tuple[ServerProcess, grpc.Channel]]:
    with (
        serving_both(row_block_bytes=1024, idle_timeout=0.4, max_jobs=2) as server,
        grpc.insecure_channel(server.addresses[transport == "unix"]) as channel,
    ):
        yield server, channel


@pytest.mark.parametrize(
    "messages",
    [
        pytest.param([], id="nothing"),
        pytest.param([IDLE], id="the-header"),
        pytest.param([IDLE, chunk("w", 0, bytes(8))], id="some-of-w"),
        pytest.param([IDLE, *list(SMALL.body(16))[:-2]], id="some-rows"),
        pytest.param([IDLE, *list(SMALL.body(16))[:-1]], id="all-but-end"),
    ],
)
def test_a_client_that_stops_sending_is_given_up(impatient, messages):
    _, channel = impatient
    started = time.monotonic()
    with Stream(channel) as stream:
        stream.send(*messages)
        error = stream.failure()
    assert time.monotonic() - started < 5
    assert error.status is StatusCode.ABORTED
    assert error.reason == "CLIENT_IDLE"
    assert "sent nothing for 0.4 s" in error.text
    if messages:
        assert error.metadata["job_id"] == "idle"
    assert_exact(stream_job(channel, SMALL), SMALL)


def test_messages_without_elements_are_no_progress(impatient):
    _, channel = impatient
    gone = threading.Event()

    def nothing_at_all():
        while not gone.wait(0.05):
            yield chunk("w", 0, b"")

    with Stream(channel) as stream:
        stream.send(IDLE)
        stream.send_all(nothing_at_all())
        error = stream.failure()
        gone.set()
    assert (error.status, error.reason) == (StatusCode.ABORTED, "CLIENT_IDLE")


def test_a_request_of_compute_that_never_comes_is_given_up(impatient):
    _, channel = impatient
    gone = threading.Event()

    def no_request():
        gone.wait(TIMEOUT_S)
        yield from ()

    method = channel.stream_stream(f"/{SERVICE}/Compute")
    with pytest.raises(grpc.RpcError) as caught:
        list(method(no_request(), timeout=TIMEOUT_S))
    gone.set()
    assert CallError(caught.value).reason == "CLIENT_IDLE"


@pytest.mark.big
def test_a_job_that_nobody_reads_gives_its_memory_back_before_its_status_is_read():
    count, ring = 6, 3 * 16 * MIB
    # Memory that is pinned for a GPU is kept for other jobs.
    options = {"idle_timeout": 0.4, "row_block_bytes": 16 * MIB}
    with serving(backend="numpy", **options) as (server, channel):
        assert_exact(stream_job(channel, SMALL), SMALL)
        process = psutil.Process(server.pid)
        before = process.memory_info().rss
        header = job_pb2.Job(
            m=10**9, n=0, k=1024, dtype=matrix_pb2.DTYPE_FLOAT64, job_id="unread"
        )
        for operand in (header.x, header.w):
            operand.inline.SetInParent()
        header.y.inline.SetInParent()
        with contextlib.ExitStack() as stack:
            for _ in range(count):
                stream = stack.enter_context(Stream(channel))
                stream.send(header, end(10**9))
                assert stream.receive_accepted().accepted.reserved_bytes > ring
            wait_until(
                lambda: sum("outcome" in record for record in server.records) > count,
                "every job has ended",
            )
            wait_until(
                lambda: process.memory_info().rss - before < count * ring / 4,
                "their memory is back",
            )


def test_a_client_that_never_half_closes_is_told_what_was_expected(impatient):
    _, channel = impatient
    with Stream(channel) as stream:
        stream.send(IDLE, *SMALL.body(16))
        error = stream.failure()
    assert (error.status, error.reason) == (StatusCode.ABORTED, "CLIENT_IDLE")
    assert "half-close" in error.text


def test_a_client_that_does_not_read_is_given_up(impatient):
    server, channel = impatient
    wide = whole_numbers(4000, 1, 2000, results=("y",))  # 32 MB of results
    with Stream(channel) as stream:
        stream.send(wide.job(job_id="unread"))
        stream.send_all(wide.body(1))
        record = server.wait_for_log(
            lambda r: r.get("job_id") == "unread" and "outcome" in r
        )
        assert record["outcome"] == "ABORTED"
        error = stream.failure()
    assert error.status is StatusCode.ABORTED
    assert error.reason == "CLIENT_IDLE"
    assert "did not read for 0.4 s" in error.text
    assert_exact(stream_job(channel, SMALL), SMALL)


def test_an_answer_of_compute_that_nobody_reads_does_not_count_for_ever(impatient):
    """It is 3.2 MB, and this client takes 64 KiB that it does not read."""
    server, channel = impatient
    narrow = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1 << 16))
    wide = whole_numbers(800, 1, 1000, results=("y",))
    request = wide.compute_request(job_id="unread-answer").SerializeToString()
    with grpc.insecure_channel(server.address, options=narrow) as small_window:
        unread = small_window.stream_stream(f"/{SERVICE}/Compute")(
            iter((request,)), timeout=TIMEOUT_S
        )
        wait_until(lambda: "the answer was not read" in server.logs, "it is given up")
        unread.cancel()
    assert_exact(compute_job(channel, SMALL), SMALL)


def test_a_slow_client_that_makes_progress_is_not_given_up(impatient):
    _, channel = impatient

    def slowly(messages):
        for message in messages:
            time.sleep(0.1)  # the slowness is what is tested
            yield message

    with Stream(channel) as stream:
        stream.send(SMALL.job())
        outcome = stream.receive_accepted()
        stream.send_all(slowly(SMALL.body(10)))
        stream.half_close()
        assert_exact(stream.receive_results(outcome), SMALL)
    assert outcome.receipt.total_seconds > 2 * 0.4


def test_a_client_that_waits_in_the_queue_is_not_given_up():
    with serving(idle_timeout=0.4, max_jobs=1) as (_, channel):

        def slowly(messages):
            for message in messages:
                time.sleep(0.15)  # the slowness is what is tested
                yield message

        with running_job(channel) as (first, outcome), Stream(channel) as second:
            second.send(SMALL.job())
            queued_behind(second)
            first.send_all(slowly(SMALL.body(10)))
            first.half_close()
            assert_exact(first.receive_results(outcome), SMALL)
            assert outcome.receipt.total_seconds > 2 * 0.4
            finish(second, second.receive_accepted(), SMALL)


def outcome_of(server: ServerProcess, job_id: str) -> dict:
    return server.wait_for_log(lambda r: r.get("job_id") == job_id and "outcome" in r)


@pytest.mark.parametrize("when", ["running", "queued"])
def test_a_deadline_ends_the_job_and_makes_room(when):
    with serving(max_jobs=1, max_queue=1) as (server, channel):
        with contextlib.ExitStack() as stack:
            if when == "queued":
                stack.enter_context(running_job(channel))
            late = stack.enter_context(Stream(channel, timeout_s=0.3))
            late.send(SMALL.job(job_id="late"))
            assert late.failure().status is StatusCode.DEADLINE_EXCEEDED
            record = outcome_of(server, "late")
            assert record["outcome"] == "DEADLINE_EXCEEDED"
            assert record["reason"] == "DEADLINE_PASSED"
        assert_exact(stream_job(channel, SMALL), SMALL)


@pytest.mark.parametrize("when", ["running", "queued"])
def test_a_caller_who_leaves_makes_room(when):
    with serving(max_jobs=1, max_queue=1) as (server, channel):
        with contextlib.ExitStack() as stack:
            if when == "queued":
                stack.enter_context(running_job(channel))
            with Stream(channel) as leaver:
                leaver.send(SMALL.job(job_id="leaver"))
                if when == "queued":
                    queued_behind(leaver)
                else:
                    leaver.receive_accepted()
            record = outcome_of(server, "leaver")
            assert record["outcome"] == "CANCELLED"
            assert record["reason"] == "JOB_CANCELLED"
        assert_exact(stream_job(channel, SMALL), SMALL)


def test_places_and_memory_come_back_whenever_a_caller_leaves():
    jobs = 4
    random = np.random.default_rng(0)
    messages = [SMALL.job(), *SMALL.body(8, 64)]
    with serving(max_jobs=jobs, max_queue=4, memory_limit=64 * MIB) as (_, channel):
        for _ in range(150):
            with Stream(channel) as leaver:
                sent = random.integers(0, len(messages) + 1)
                leaver.send(*messages[:sent])
                if sent and random.integers(0, 2):
                    with contextlib.suppress(CallError):
                        leaver.receive()
        wait_until_all_are_accepted(channel, jobs)


def wait_until_all_are_accepted(channel: grpc.Channel, jobs: int) -> None:
    """So many jobs run at once, none of them queued, within good time."""
    deadline = time.monotonic() + 10
    while True:
        with contextlib.ExitStack() as stack:
            streams = [stack.enter_context(Stream(channel)) for _ in range(jobs)]
            for stream in streams:
                stream.send(SMALL.job())
            if not any(stream.receive_accepted().queued for stream in streams):
                return
        assert time.monotonic() < deadline


def test_a_deadline_that_passes_in_compute_ends_it():
    with serving(max_jobs=1, max_queue=1) as (server, channel):
        with running_job(channel) as first:
            request = SMALL.compute_request(job_id="late").SerializeToString()
            with pytest.raises(grpc.RpcError) as raised:
                channel.unary_unary("/gradwire.v1.GradientService/Compute")(
                    request, timeout=0.3
                )
            assert raised.value.code() is StatusCode.DEADLINE_EXCEEDED
            assert outcome_of(server, "late")["outcome"] == "DEADLINE_EXCEEDED"
            finish(*first, SMALL)
        assert_exact(compute_job(channel, SMALL), SMALL)


def test_every_job_has_one_line_in_the_log_with_what_it_was():
    with serving() as (server, channel):
        stream_job(channel, SMALL, job_id="by-stream")
        compute_job(channel, SMALL, job_id="by-compute")
        with pytest.raises(CallError):
            stream_job(channel, SMALL, job_id="refused", max_chunk_bytes=-1)
        for job_id in ("by-stream", "by-compute"):
            record = outcome_of(server, job_id)
            assert record["outcome"] == "OK"
            assert (record["m"], record["n"], record["k"]) == (40, 5, 4)
            assert record["dtype"] == "float32"
            assert record["blocks"] == 3
            assert record["total_s"] > 0
        record = outcome_of(server, "refused")
        assert record["outcome"] == "INVALID_ARGUMENT"
        assert record["reason"] == "OPTION_INVALID"
        lines = [r for r in server.records if "outcome" in r]
        assert len(lines) == 3
