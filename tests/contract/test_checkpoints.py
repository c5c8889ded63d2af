"""Checkpoints, and jobs that go on where others were cut off, as any client can."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from grpc import StatusCode

from gradwire.v1 import job_pb2, matrix_pb2
from tests.support.raw import (
    INLINE,
    CallError,
    Outcome,
    Problem,
    Stream,
    chunk,
    compute_request,
    end,
    make_job,
    normal_numbers,
    stream_job,
)
from tests.support.serving import ServerProcess, running_server

PROBLEM = normal_numbers(300, 30, 20, seed=5)
M, N, K = PROBLEM.shape
SUM = matrix_pb2.MATRIX_DW_SUM


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with running_server(row_block_bytes=4096) as process:
        yield process


@pytest.fixture(scope="module")
def channel(server: ServerProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as opened:
        yield opened


def with_checkpoints(
    channel: grpc.Channel, rows: int, **options: Any
) -> tuple[job_pb2.Accepted, dict[int, bytes], list[str], dict[str, bytes]]:
    """What a job is sent: Accepted, sums by their rows, the order, results."""
    sums: dict[int, bytes] = {}
    order: list[str] = []
    results: dict[str, bytes] = {}
    with Stream(channel) as stream:
        checkpoints = job_pb2.Checkpoints(rows=rows)
        stream.send(PROBLEM.job(checkpoints=checkpoints, **options))
        accepted = stream.receive_accepted().accepted
        stream.send_all(PROBLEM.body(accepted.block_rows))
        stream.half_close()
        while (message := stream.receive()) is not None:
            kind = message.WhichOneof("message")
            if kind == "checkpoint":
                last = message.checkpoint.rows
                sums[last] = b""
                order.append(f"sum of {last}")
            elif kind == "chunk" and message.chunk.matrix == SUM:
                assert message.chunk.index * 8 == len(sums[last])
                sums[last] += message.chunk.data
            elif kind == "chunk":
                name = matrix_pb2.Matrix.Name(message.chunk.matrix)[7:].lower()
                order.append(name)
                results[name] = results.get(name, b"") + message.chunk.data
    return accepted, sums, order, results


def resume(
    accepted: job_pb2.Accepted, first: int, results_from: int, *, dw_sum: bool
) -> job_pb2.Resume:
    return job_pb2.Resume(
        fingerprint=accepted.fingerprint,
        first_row=first,
        results_from_row=results_from,
        dw_sum=INLINE if dw_sum else None,
    )


def body_from(first: int, dw_sum: bytes) -> Iterator[Any]:
    yield from PROBLEM.chunks("w", 0, N)
    if dw_sum:
        yield chunk(SUM, 0, dw_sum)
    for row in range(first, M, 16):
        for name in ("x", "dy"):
            yield from PROBLEM.chunks(name, row, min(row + 16, M))
    yield end(M)


def go_on(
    channel: grpc.Channel,
    accepted: job_pb2.Accepted,
    first: int,
    results_from: int,
    dw_sum: bytes = b"",
    **options: Any,
) -> tuple[Outcome, dict[str, tuple[int, bytes]]]:
    """The results of a job that goes on, each with its first element's index."""
    results: dict[str, tuple[int, bytes]] = {}
    asked = resume(accepted, first, results_from, dw_sum=bool(dw_sum))
    with Stream(channel) as stream:
        stream.send(PROBLEM.job(resume=asked, **options))
        outcome = stream.receive_accepted()
        stream.send_all(body_from(first, dw_sum))
        stream.half_close()
        while (message := stream.receive()) is not None:
            if message.WhichOneof("message") == "receipt":
                outcome.receipt = message.receipt
                continue
            name = matrix_pb2.Matrix.Name(message.chunk.matrix)[7:].lower()
            index, data = results.get(name, (message.chunk.index, b""))
            results[name] = index, data + message.chunk.data
    return outcome, results


def test_a_server_offers_to_go_on_with_jobs(channel: grpc.Channel) -> None:
    outcome = stream_job(channel, PROBLEM, required_features=["resume"])
    assert outcome.receipt.m == M


def test_checkpoints_come_at_the_ends_of_blocks_behind_their_results(
    channel: grpc.Channel,
) -> None:
    accepted, sums, order, results = with_checkpoints(channel, 100)
    assert accepted.block_rows == 16
    assert accepted.effective_job.checkpoints.rows == 100
    assert list(sums) == [112, 224]
    assert all(len(each) == N * K * 8 for each in sums.values())
    # Each comes when as many row blocks of Y and of dX as it sums have come.
    for rows in sums:
        before = order[: order.index(f"sum of {rows}")]
        assert before.count("y") == before.count("dx") == rows // 16
    expected = stream_job(channel, PROBLEM)
    assert results == expected.bits


def test_a_job_that_goes_on_has_the_bits_of_the_whole(channel: grpc.Channel) -> None:
    expected = stream_job(channel, PROBLEM).bits
    accepted, sums, _, _ = with_checkpoints(channel, 16)
    for first, dw_sum in sums.items():
        for results_from in (first, 272, 304):
            if results_from < first:
                continue
            outcome, results = go_on(channel, accepted, first, results_from, dw_sum)
            assert results["dw"] == (0, expected["dw"])
            for name, columns in (("y", K), ("dx", N)):
                at = min(results_from, M) * columns
                came = results.get(name, (at, b""))
                assert came == (at, expected[name][at * 4 :])
            assert outcome.receipt.m == M
            assert outcome.receipt.blocks == -(-(M - first) // 16)


def test_rows_may_come_again_for_their_share_of_dw_alone(channel: grpc.Channel) -> None:
    expected = stream_job(channel, PROBLEM)
    _, results = go_on(channel, expected.accepted, 0, 160)
    assert results["dw"] == (0, expected.bits["dw"])
    assert results["y"] == (160 * K, expected.bits["y"][160 * K * 4 :])


def test_without_dw_a_job_goes_on_with_its_rows(channel: grpc.Channel) -> None:
    expected = stream_job(channel, PROBLEM)
    _, results = go_on(channel, expected.accepted, 160, 176, results=("y", "dx"))
    assert results["dx"] == (176 * N, expected.bits["dx"][176 * N * 4 :])


def test_only_jobs_that_ask_for_checkpoints_hold_room_for_them(
    channel: grpc.Channel,
) -> None:
    def reserved(**options: Any) -> int:
        return stream_job(channel, PROBLEM, **options).accepted.reserved_bytes

    plain = reserved()
    # The last one of a server that stops takes the room of rows.
    assert reserved(checkpoints=job_pb2.Checkpoints()) == plain
    accepted = with_checkpoints(channel, 1000)[0]
    assert 0 <= accepted.reserved_bytes - plain - N * K * 8 < 256


ACCEPTED = job_pb2.NumericsFingerprint(
    library="a", device="b", block_rows=16, segment_rows=16
)


def wrong(name: str, reason: str, field: str, says: str, **fields: Any) -> Any:
    return pytest.param(fields, reason, field, says, id=name)


def going_on(first: int = 16, results_from: int = 16, **fields: Any) -> Any:
    fields = {"fingerprint": ACCEPTED, "dw_sum": INLINE} | fields
    return job_pb2.Resume(first_row=first, results_from_row=results_from, **fields)


def test_a_job_goes_on_with_the_blocks_that_it_asked_for(channel: grpc.Channel) -> None:
    asked = {"block_rows": 8, "required_features": ["resume", "block-rows"]}
    accepted, sums, _, results = with_checkpoints(channel, 100, **asked)
    assert accepted.block_rows == accepted.fingerprint.block_rows == 8
    (rows, dw_sum) = next(iter(sums.items()))
    assert rows == 104
    _, further = go_on(channel, accepted, rows, rows, dw_sum, **asked)
    assert further["dw"] == (0, results["dw"])
    for name, columns in (("y", K), ("dx", N)):
        first, data = further[name]
        assert first == rows * columns
        assert data == results[name][first * 4 :]
    # Whoever forgets to ask again is told so, and does not get other bits.
    with Stream(channel) as stream:
        again = resume(accepted, rows, rows, dw_sum=True)
        stream.send(PROBLEM.job(resume=again))
        failure = stream.failure()
    assert failure.reason == "RESUME_MISMATCH"
    assert "block_rows is 8, and is 16 here" in failure.text


REFUSED = [
    wrong(
        "checkpoints-negative",
        "OPTION_INVALID",
        "job.checkpoints.rows",
        "is -1: expected at least 0",
        checkpoints=job_pb2.Checkpoints(rows=-1),
    ),
    wrong(
        "checkpoints-without-dw",
        "OPTION_INVALID",
        "job.checkpoints",
        "dw is not wanted",
        checkpoints=job_pb2.Checkpoints(),
        results=("y",),
    ),
    wrong(
        "no-fingerprint",
        "OPTION_INVALID",
        "job.resume.fingerprint",
        "is absent",
        resume=job_pb2.Resume(first_row=16),
    ),
    wrong(
        "first-row-negative",
        "OPTION_INVALID",
        "job.resume.first_row",
        "is -16: expected 0 to 300",
        resume=going_on(-16),
    ),
    wrong(
        "first-row-behind-m",
        "OPTION_INVALID",
        "job.resume.first_row",
        "is 304: expected 0 to 300",
        resume=going_on(304),
    ),
    wrong(
        "first-row-off-the-grid",
        "OPTION_INVALID",
        "job.resume.first_row",
        "is 17: expected a multiple of 16",
        resume=going_on(17, 32),
    ),
    wrong(
        "results-off-the-grid",
        "OPTION_INVALID",
        "job.resume.results_from_row",
        "is 33: expected a multiple of 16",
        resume=going_on(16, 33),
    ),
    wrong(
        "results-before-rows",
        "OPTION_INVALID",
        "job.resume.results_from_row",
        "is 0: expected at least 16",
        resume=going_on(16, 0),
    ),
    wrong(
        "sum-missing",
        "OPERAND_MISSING",
        "job.resume.dw_sum",
        "dw is wanted and first_row is not 0",
        resume=going_on(dw_sum=None),
    ),
    wrong(
        "sum-of-nothing",
        "OPERAND_UNEXPECTED",
        "job.resume.dw_sum",
        "first_row is 0",
        resume=going_on(0),
    ),
    wrong(
        "sum-without-dw",
        "OPERAND_UNEXPECTED",
        "job.resume.dw_sum",
        "dw is not wanted",
        resume=going_on(),
        results=("y",),
    ),
    wrong(
        "sum-from-nowhere",
        "OPTION_UNKNOWN",
        "job.resume.dw_sum.source",
        "expected inline",
        resume=going_on(dw_sum=job_pb2.Operand()),
    ),
    wrong(
        "other-device",
        "RESUME_MISMATCH",
        "job.resume.fingerprint",
        "job.resume.fingerprint.library is 'a', and is",
        resume=going_on(),
    ),
    wrong(
        "other-blocks",
        "RESUME_MISMATCH",
        "job.resume.fingerprint",
        "block_rows is 32, and is 16 here: the job has to begin anew",
        resume=going_on(32, 32, fingerprint=job_pb2.NumericsFingerprint(block_rows=32)),
    ),
]


@pytest.mark.parametrize(("fields", "reason", "field", "says"), REFUSED)
def test_what_cannot_be_is_refused_before_an_element_is_sent(
    channel: grpc.Channel, fields: Any, reason: str, field: str, says: str
) -> None:
    with Stream(channel) as stream:
        stream.send(PROBLEM.job(**fields))
        failure = stream.failure()
    assert (failure.reason, list(failure.fields)) == (reason, [field])
    assert says in failure.text
    if reason == "RESUME_MISMATCH":
        assert failure.status is StatusCode.FAILED_PRECONDITION


@pytest.mark.parametrize(
    "fields",
    [{"checkpoints": job_pb2.Checkpoints()}, {"resume": going_on()}],
    ids=["checkpoints", "resume"],
)
def test_compute_has_neither(channel: grpc.Channel, fields: Any) -> None:
    small = Problem(PROBLEM.x[:32], PROBLEM.w, PROBLEM.dy[:32])
    with pytest.raises(CallError) as refused:
        compute_request(channel, small.compute_request(**fields))
    assert refused.value.reason == "OPTION_INVALID"
    assert "ComputeStream does" in refused.value.text


def test_a_sum_comes_after_w_before_rows_and_only_where_it_was_announced(
    channel: grpc.Channel,
) -> None:
    accepted = stream_job(channel, PROBLEM).accepted
    sum_bytes = np.zeros(N * K, np.float64).tobytes()
    too_long = sum_bytes + bytes(8)
    w = list(PROBLEM.chunks("w", 0, N))
    rows = list(PROBLEM.chunks("x", 16, 32))
    asked = resume(accepted, 16, 16, dw_sum=True)
    for options, messages, reason in (
        ({}, [*w, chunk(SUM, 0, sum_bytes)], "MATRIX_INVALID"),
        ({"resume": asked}, [chunk(SUM, 0, sum_bytes)], "ORDER_INVALID"),
        ({"resume": asked}, [*w, *rows], "ORDER_INVALID"),
        ({"resume": asked}, [*w, chunk(SUM, 4, sum_bytes)], "INDEX_INVALID"),
        ({"resume": asked}, [*w, chunk(SUM, 0, too_long)], "PAYLOAD_EXCESS"),
        ({"resume": asked}, [*w, chunk(SUM, 0, sum_bytes), end(M)], "PAYLOAD_MISSING"),
        ({"resume": asked}, [*w, chunk(SUM, 0, sum_bytes), end(8)], "M_MISMATCH"),
    ):
        with Stream(channel) as stream:
            stream.send(PROBLEM.job(open_m=True, **options))
            stream.receive_accepted()
            stream.send(*messages)
            stream.half_close()
            failure = stream.failure()
        assert failure.reason == reason, messages


def test_a_job_of_no_elements_goes_on_too(channel: grpc.Channel) -> None:
    header = make_job(m=40, n=0, k=4, checkpoints=job_pb2.Checkpoints(rows=16))
    with Stream(channel) as stream:
        stream.send(header)
        stream.receive_accepted()
        stream.send(chunk("dy", 0, bytes(40 * 4 * 4)), end(40))
        stream.half_close()
        while (message := stream.receive()) is not None:
            assert message.WhichOneof("message") != "checkpoint" or (
                message.checkpoint.rows % 16 == 0
            )
