"""dB, the column sums of dY: one more sum beside dW, as any client can ask for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import grpc
import pytest

from gradwire.v1 import job_pb2, matrix_pb2
from tests.support.raw import (
    INLINE,
    Problem,
    Stream,
    assert_exact,
    chunk,
    compute_job,
    end,
    normal_numbers,
    stream_job,
    whole_numbers,
)
from tests.support.serving import running_server

ALL = ("y", "dx", "dw", "db")
PROBLEM = replace(normal_numbers(300, 30, 20, seed=5), results=ALL)
M, N, K = PROBLEM.shape
SUMS = {"dw": matrix_pb2.MATRIX_DW_SUM, "db": matrix_pb2.MATRIX_DB_SUM}


@pytest.fixture(scope="module")
def channel() -> Iterator[grpc.Channel]:
    with (
        running_server(row_block_bytes=4096) as server,
        grpc.insecure_channel(server.address) as opened,
    ):
        yield opened


def test_the_numbers_of_the_contract_are_these() -> None:
    assert (matrix_pb2.MATRIX_DB, matrix_pb2.MATRIX_DB_SUM) == (8, 9)
    assert job_pb2.Job.DESCRIPTOR.fields_by_name["db"].number == 19
    assert job_pb2.Resume.DESCRIPTOR.fields_by_name["db_sum"].number == 5


def test_it_needs_dy_alone_and_comes_behind_dw(channel: grpc.Channel) -> None:
    problem = whole_numbers(100, 6, 5, results=("db",))
    assert problem.operands == ("dy",)
    assert_exact(compute_job(channel, problem), problem)
    assert_exact(stream_job(channel, problem, open_m=True), problem)
    order = [name for name, _, _ in stream_job(channel, PROBLEM).order]
    assert order[-2:] == ["dw", "db"]


@pytest.mark.parametrize("results", [("db",), ("dw", "db"), ALL])
def test_a_job_that_goes_on_has_the_bits_of_the_whole(
    channel: grpc.Channel, results: tuple[str, ...]
) -> None:
    problem = replace(PROBLEM, results=results)
    expected = stream_job(channel, problem)
    wanted = [name for name in SUMS if name in results]
    sums: dict[int, dict[str, bytes]] = {}
    order = []
    with Stream(channel) as stream:
        stream.send(problem.job(checkpoints=job_pb2.Checkpoints(rows=100)))
        accepted = stream.receive_accepted().accepted
        stream.send_all(problem.body(accepted.block_rows, message_bytes=60))
        stream.half_close()
        while (message := stream.receive()) is not None:
            if message.HasField("checkpoint"):
                last = sums[message.checkpoint.rows] = dict.fromkeys(wanted, b"")
            for name in wanted:
                if message.chunk.matrix == SUMS[name]:
                    assert message.chunk.index * 8 == len(last[name])
                    last[name] += message.chunk.data
                    order.append(name)
    assert list(sums) == [112, 224]
    assert order == wanted * 2
    for first, parts in sums.items():
        with Stream(channel) as stream:
            stream.send(problem.job(resume=going_on(accepted, first, wanted)))
            outcome = stream.receive_accepted()
            stream.send_all(body_from(problem, first, parts))
            stream.half_close()
            came = dict.fromkeys(wanted, b"")
            while (message := stream.receive()) is not None:
                for name in wanted:
                    number = matrix_pb2.Matrix.Value(f"MATRIX_{name.upper()}")
                    if message.chunk.matrix == number:
                        came[name] += message.chunk.data
        assert came == {name: expected.bits[name] for name in wanted}
        assert outcome.accepted.effective_job.resume.HasField("db_sum")


def going_on(
    accepted: job_pb2.Accepted, first: int, sums: Any = ("dw", "db")
) -> job_pb2.Resume:
    return job_pb2.Resume(
        fingerprint=accepted.fingerprint,
        first_row=first,
        results_from_row=first,
        **{f"{name}_sum": INLINE for name in sums},
    )


def body_from(problem: Problem, first: int, sums: dict[str, bytes]) -> Iterator[Any]:
    if "w" in problem.operands:
        yield from problem.chunks("w", 0, N)
    for name, data in sums.items():
        yield chunk(SUMS[name], 0, data)
    for row in range(first, M, 16):
        for name in problem.operands:
            if name != "w":
                yield from problem.chunks(name, row, min(row + 16, M))
    yield end(M)


@pytest.mark.parametrize(
    ("brings", "reason", "field"),
    [
        (("dw",), "OPERAND_MISSING", "job.resume.db_sum"),
        (("db",), "OPERAND_MISSING", "job.resume.dw_sum"),
    ],
)
def test_every_wanted_sum_has_to_come(
    channel: grpc.Channel, brings: Any, reason: str, field: str
) -> None:
    accepted = stream_job(channel, PROBLEM).accepted
    with Stream(channel) as stream:
        stream.send(PROBLEM.job(resume=going_on(accepted, 16, brings)))
        failure = stream.failure()
    assert (failure.reason, list(failure.fields)) == (reason, [field])


def test_no_other_sum_may_come(channel: grpc.Channel) -> None:
    accepted = stream_job(channel, PROBLEM).accepted
    problem = replace(PROBLEM, results=("dw",))
    with Stream(channel) as stream:
        stream.send(problem.job(resume=going_on(accepted, 16)))
        failure = stream.failure()
    assert failure.reason == "OPERAND_UNEXPECTED"
    assert "db is not wanted or first_row is 0" in failure.text


def test_sums_come_in_their_order(channel: grpc.Channel) -> None:
    accepted = stream_job(channel, PROBLEM).accepted
    with Stream(channel) as stream:
        stream.send(PROBLEM.job(resume=going_on(accepted, 16)))
        stream.receive_accepted()
        stream.send(*PROBLEM.chunks("w", 0, N), chunk(SUMS["db"], 0, b"01234567"))
        failure = stream.failure()
    assert failure.reason == "ORDER_INVALID"
    assert "dw_sum is not complete: 0 of 600 elements came" in failure.text


@pytest.mark.parametrize(
    ("fields", "reason", "field"),
    [
        ({"dy": None}, "OPERAND_MISSING", "job.dy"),
        ({"x": INLINE}, "OPERAND_UNEXPECTED", "job.x"),
        ({"db": job_pb2.Result()}, "OPTION_UNKNOWN", "job.db.destination"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(
    channel: grpc.Channel, fields: Any, reason: str, field: str
) -> None:
    job = replace(PROBLEM, results=("db",)).job()
    for name, value in fields.items():
        job.ClearField(name)
        if value is not None:
            getattr(job, name).CopyFrom(value)
    with Stream(channel) as stream:
        stream.send(job)
        failure = stream.failure()
    assert (failure.reason, list(failure.fields)) == (reason, [field])


def test_both_sums_hold_memory_where_checkpoints_are_wanted(
    channel: grpc.Channel,
) -> None:
    def reserved(**options: Any) -> int:
        with Stream(channel) as stream:
            stream.send(PROBLEM.job(**options))
            return stream.receive_accepted().accepted.reserved_bytes

    more = reserved(checkpoints=job_pb2.Checkpoints(rows=1000)) - reserved()
    assert 0 <= more - (N + 1) * K * 8 < 2 * 256
