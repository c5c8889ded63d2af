"""What a server may send of checkpoints, and where a job goes on after which."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import gradwire
from gradwire._api.options import parse_options
from gradwire._core.exchange import JobExchange
from gradwire._core.job_plan import Plan
from gradwire._core.resume import (
    Checkpoint,
    Checkpoints,
    ResumePoint,
    made_progress,
    point_after,
)
from gradwire._core.sender import Sender
from gradwire._resilience.replay_buffer import ReplayBuffer
from gradwire._resilience.retry import Attempts, Retries
from gradwire._resilience.row_reader import RowReader
from gradwire._resilience.stream_job import StreamJob
from gradwire.v1.job_pb2 import Accepted, Job, Numerics, NumericsFingerprint
from gradwire_protocol import checksum, framing
from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.error_details import ErrorDetails
from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.framing import Chunk
from gradwire_protocol.matrices import Matrix

N, K, B = 3, 2, 16
FLOAT64 = int(Dtype.FLOAT64)
ACCEPTED = Accepted(
    block_rows=B,
    fingerprint=NumericsFingerprint(library="one", block_rows=B),
    effective_job=Job(numerics=Numerics(dw_accumulator=FLOAT64)),  # type: ignore[arg-type]
)
SUM = np.arange(6, dtype=np.float64)


def plan(*results: str, **options: Any) -> Plan:
    parsed = parse_options(results=results or ("y", "dx", "dw"), **options)
    return Plan(None, N, K, Dtype.FLOAT32, parsed)


def checkpoints(before: Checkpoint | None = None, **options: Any) -> Checkpoints:
    made = Checkpoints(plan(**options), before)
    made.accept(ACCEPTED)
    return made


def chunk(index: int, elements: Any, crc32c: int | None = None) -> Chunk:
    payload = memoryview(np.asarray(elements).tobytes())
    return Chunk(int(Matrix.DW_SUM), index, payload, crc32c)


def send(to: Checkpoints, rows: int, value: float = 0.0) -> None:
    to.begin(rows, 1000, B)
    to.take(chunk(0, SUM[:4] + value))
    to.take(chunk(4, SUM[4:] + value))


def test_a_checkpoint_comes_in_parts_and_counts_when_it_is_whole() -> None:
    one = checkpoints()
    one.begin(32, 1000, B)
    one.take(chunk(0, SUM[:4]))
    assert one.coming
    assert one.within(None) is None
    one.take(chunk(4, SUM[4:]))
    assert not one.coming
    came = one.within(None)
    assert came is not None
    assert came.rows == 32
    assert came.sums[Matrix.DW].tobytes() == SUM.tobytes()


def test_the_last_one_counts_for_which_no_result_is_missing() -> None:
    one = checkpoints()
    send(one, 32, 1)
    send(one, 48, 2)
    assert one.within(16) is None
    sure = one.within(40)
    assert sure is not None
    assert (sure.rows, sure.sums[Matrix.DW][0, 0]) == (32, 1)
    send(one, 64, 3)
    assert one.committed_rows == 32
    assert one.within(64) is not None
    assert one.committed_rows == 64


@pytest.mark.parametrize("rows", [0, 16, 40, 1008, -16])
def test_a_checkpoint_that_cannot_be_is_refused(rows: int) -> None:
    one = checkpoints(Checkpoint(16, {Matrix.DW: SUM.reshape(N, K)}))
    with pytest.raises(gradwire.ProtocolError, match=f"a checkpoint of {rows} rows"):
        one.begin(rows, 1000, B)


@pytest.mark.parametrize(
    "wrong", [chunk(1, SUM), chunk(0, np.arange(7.0)), chunk(0, np.zeros(3, np.int8))]
)
def test_elements_that_are_not_next_are_refused(wrong: Chunk) -> None:
    one = checkpoints()
    with pytest.raises(gradwire.ProtocolError, match="did not announce"):
        one.take(chunk(0, SUM))
    one.begin(16, 1000, B)
    with pytest.raises(gradwire.ProtocolError, match="bytes of a sum of dw"):
        one.take(wrong)


def test_a_damaged_sum_is_found_out() -> None:
    one = checkpoints(checksum=True)
    one.begin(16, 1000, B)
    right = checksum.crc32c(memoryview(SUM.tobytes()))
    with pytest.raises(gradwire.ChecksumError):
        one.take(chunk(0, SUM, right ^ 1))
    one.take(chunk(0, SUM, right))
    assert not one.coming


SUMMED = Checkpoint(32, {Matrix.DW: SUM.reshape(N, K)})


@pytest.mark.parametrize(
    ("results", "results_row", "checkpoint", "expected"),
    [
        (("y", "dx"), 0, None, None),
        (("y", "dx"), 48, None, (48, 48)),
        # The last block is short, and here: it is sent again, and not wanted.
        (("y", "dx"), 50, None, (48, 64)),
        (("y", "dw"), 48, None, (0, 48)),
        (("y", "dw"), 48, SUMMED, (32, 48)),
        (("y", "dw"), 32, SUMMED, (32, 32)),
        (("y", "dw"), 0, None, None),
        (("dw",), None, None, None),
        (("dw",), None, SUMMED, (32, 32)),
    ],
)
def test_where_a_job_goes_on(
    results: Any, results_row: Any, checkpoint: Any, expected: Any
) -> None:
    point = point_after(plan(*results), ACCEPTED, results_row, checkpoint)
    if expected is None:
        assert point is None
        return
    assert point is not None
    assert (point.first_row, point.results_from_row) == expected
    assert point.fingerprint == ACCEPTED.fingerprint
    assert point.checkpoint is checkpoint
    goes_on = plan(*results)
    opening = JobExchange(goes_on, Sender(goes_on), {}, point=point).opening()
    job = framing.decode_request(opening)
    assert isinstance(job, Job)
    assert list(job.required_features) == ["resume"]
    assert job.resume.HasField("dw_sum") == (checkpoint is not None)


def test_a_job_goes_on_with_the_blocks_that_it_had() -> None:
    """Its first server may have had smaller blocks than it asked for."""
    point = point_after(plan(), ACCEPTED, 32, SUMMED)
    for asked, expected in ((4 * B, B), (0, 0)):
        goes_on = replace(plan(), block_rows=asked)
        for at, rows in ((None, asked), (point, expected)):
            exchange = JobExchange(goes_on, Sender(goes_on), {}, point=at)
            job = framing.decode_request(exchange.opening())
            assert isinstance(job, Job)
            assert job.block_rows == rows
            assert ("block-rows" in job.required_features) == bool(asked)


def test_which_of_two_points_is_further() -> None:
    def at(first: int, results: int) -> ResumePoint:
        return ResumePoint(ACCEPTED.fingerprint, first, results, None)

    assert made_progress(at(0, 16), None)
    assert made_progress(at(16, 32), at(16, 16))
    assert made_progress(at(32, 32), at(16, 64))
    assert not made_progress(at(16, 16), at(16, 16))
    assert not made_progress(None, at(16, 16))
    assert not made_progress(None, None)


def refusal(reason: Reason) -> gradwire.CallError:
    return gradwire.CallError(
        "no", status=reason.status, attached=ErrorDetails(reason=reason)
    )


@pytest.mark.parametrize("asked", [None, 100])
def test_a_server_without_checkpoints_does_without_unless_they_were_asked_for(
    asked: int | None,
) -> None:
    parsed = parse_options(results="dw", checkpoint_rows=asked)
    reader = RowReader(None, None, parsed)
    pair = np.ones((4, N), np.float32), np.ones((4, K), np.float32)
    held = ReplayBuffer(reader, 1 << 20)
    held.add(pair)
    attempts = Attempts(Retries(gradwire.RetryPolicy()), None)
    job = StreamJob(reader.plan(held.first), None, held, checkpoint_rows=asked or 0)
    opening = framing.decode_request(job.begin().opening())
    assert isinstance(opening, Job)
    assert list(opening.required_features) == ["resume"]
    assert not job.cut_off(refusal(Reason.BUSY), attempts)
    assert job.cut_off(refusal(Reason.FEATURE_UNKNOWN), attempts) == (asked is None)
    opening = framing.decode_request(job.begin().opening())
    assert isinstance(opening, Job)
    assert opening.HasField("checkpoints") == (asked is not None)
