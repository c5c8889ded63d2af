"""The division of a job into segments, and the sums of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gradwire
from gradwire._api.options import Numerics, parse_options
from gradwire._arrays.operand import operand
from gradwire._core.acceptance import check_accepted
from gradwire._core.job_plan import Plan
from gradwire._core.resume import SegmentSums
from gradwire._core.segments import (
    Division,
    OrderedSums,
    block_rows_of,
    divide,
    segments_ahead,
)
from gradwire._core.sender import WAIT, Sender
from gradwire._resilience.segments_job import SegmentSink, Taken
from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.framing import Chunk
from gradwire_protocol.limits import MIB
from gradwire_protocol.matrices import Matrix
from gradwire_protocol.v1.job_pb2 import Accepted


def plan_of(m: int, n: int, k: int, **options: Any) -> Plan:
    return Plan(m, n, k, Dtype.FLOAT32, parse_options(**options))


@given(st.integers(0, 10**6), st.integers(1, 2048), st.integers(1, 2048))
def test_segments_cover_all_rows_in_order(m: int, n: int, k: int) -> None:
    division = divide(plan_of(m, n, k), 16 * MIB)
    row = 0
    for number in range(division.segments):
        first, last = division.rows_of(number)
        assert first == row
        assert last - first <= division.segment_rows
        row = last
    assert row == m
    assert division.segments == max(1, -(-m // division.segment_rows))


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_segments_do_not_depend_on_m(m: int, other: int) -> None:
    one, two = (divide(plan_of(each, 300, 200), 16 * MIB) for each in (m, other))
    assert one.segment_rows == two.segment_rows


@given(
    st.integers(1, 2048),
    st.integers(0, 10**4),
    st.integers(1, 40),
    st.integers(0, 40),
)
def test_few_segments_are_begun_ahead(
    columns: int, left: int, jobs: int, idle: int
) -> None:
    plan = plan_of(10**7, columns, columns)
    rows = divide(plan, 16 * MIB).segment_rows
    ahead = segments_ahead(plan, rows, left, jobs, idle)
    assert 1 <= ahead <= 8
    assert (ahead == 1) == (left <= idle)
    ahead = max(2, ahead)
    assert ahead == 2 or ahead * jobs <= left
    assert ahead == 2 or ahead * rows * 2 * columns * 4 <= 16 * MIB


def test_verified_results_are_checked_segment_by_segment() -> None:
    assert divide(plan_of(10**7, 64, 64), 16 * MIB).several
    assert not divide(plan_of(10**7, 64, 64, verify=True), 16 * MIB).several
    assert not divide(plan_of(10, 64, 64), 16 * MIB).several


@pytest.mark.parametrize(("n", "k"), [(0, 8), (8, 0), (0, 0)])
def test_jobs_do_not_wait_for_segments_without_elements(n: int, k: int) -> None:
    division = divide(plan_of(10**7, n, k), 1 * MIB)
    assert division.segments > 1
    assert not division.several


def accepted_with(plan: Plan, block_rows: int, accumulator: int) -> Accepted:
    message = Accepted(block_rows=block_rows, window_rows=8)
    message.effective_job.CopyFrom(plan.header())
    message.effective_job.numerics.dw_accumulator = accumulator  # type: ignore[assignment]
    numerics = plan.options.numerics
    assert numerics is not None
    message.fingerprint.library = numerics.library
    message.fingerprint.device = numerics.device
    message.fingerprint.threads = numerics.threads
    message.fingerprint.block_rows = block_rows_of(plan, numerics.row_block_bytes)
    return message


def test_all_servers_of_a_job_sum_in_the_same_dtype_and_blocks() -> None:
    options = replace(
        parse_options(results=("dw",)), numerics=Numerics("numpy", "cpu", 1, MIB)
    )
    plan = Plan(40, 2, 3, Dtype.FLOAT32, options, segment_rows=8)
    rows = block_rows_of(plan, MIB)

    def check(block_rows: int, accumulator: int) -> None:
        accepted = accepted_with(plan, block_rows, accumulator)
        check_accepted(accepted, plan.header(), plan)

    check(rows, Dtype.FLOAT64)
    with pytest.raises(gradwire.NumericsError, match="sums in float32: expected float"):
        check(rows, Dtype.FLOAT32)
    with pytest.raises(gradwire.NumericsError, match="sums in the unknown dtype 99"):
        check(rows, 99)
    with pytest.raises(gradwire.ProtocolError, match="in its fingerprint of"):
        check(1, Dtype.FLOAT64)


def test_rows_behind_the_last_segment_are_an_error() -> None:
    places = {Matrix.Y: np.zeros((3, 2), np.float32)}
    taken = [Taken(0, 0, 3, places, 0.0, duplicate=False)]
    sink = SegmentSink(taken, Matrix.Y, plan_of(3, 2, 2), 8)
    sink.seek(0)
    with pytest.raises(gradwire.ProtocolError, match="more rows of y"):
        sink.write(memoryview(np.ones(8, np.float32)).cast("B"))
    assert places[Matrix.Y].all()


@given(st.permutations(range(6)))
def test_sums_are_added_in_their_order(order: list[int]) -> None:
    plan = plan_of(1, 2, 3, dw_accumulator="float32", results=("dw",))
    rng = np.random.default_rng(0)
    sums = [(rng.standard_normal((2, 3)) * 10**i).astype(np.float32) for i in range(6)]
    expected = sums[0]
    for each in sums[1:]:
        expected = expected + each
    ordered = OrderedSums(plan)
    for number in order:
        ordered.add(number, {Matrix.DW: sums[number].copy()})
    assert ordered.added == 6
    out = np.empty((2, 3), np.float32)
    ordered.write({Matrix.DW: out})
    assert out.tobytes() == expected.tobytes()


def segment_sums(m: int | None) -> tuple[SegmentSums, list[Mapping[Matrix, Any]]]:
    plan = Plan(m, 2, 3, Dtype.FLOAT32, parse_options(results=("dw",)), segment_rows=8)
    into: list[Mapping[Matrix, Any]] = []
    sums = SegmentSums(plan, into)
    accepted = Accepted()
    accepted.effective_job.numerics.dw_accumulator = Dtype.FLOAT64.value
    sums.accept(accepted)
    return sums, into


def chunk(value: float, index: int = 0, count: int = 6) -> Chunk:
    payload = memoryview(np.full(count, float(value))).cast("B")
    return Chunk(int(Matrix.DW_SUM), index, payload, None)


@pytest.mark.parametrize("m", [20, None])
def test_each_segment_has_its_sums(m: int | None) -> None:
    sums, into = segment_sums(m)
    for number, rows in enumerate((8, 16, 20)):
        known = 20 if rows == 20 else m  # at the end, m is known
        sums.begin(rows, 20, 4, known)
        sums.take(chunk(number, 0, 2))
        assert sums.coming
        sums.take(chunk(number, 2, 4))
        assert not sums.coming
    sums.require_all(20)
    assert [each[Matrix.DW].tolist() for each in into] == [
        [[number] * 3] * 2 for number in range(3)
    ]


@pytest.mark.parametrize(
    ("m", "rows", "sent"), [(20, 16, 20), (20, 4, 20), (20, 8, 7), (None, 20, 20)]
)
def test_sums_of_no_segment_are_an_error(m: int | None, rows: int, sent: int) -> None:
    sums, _ = segment_sums(m)
    with pytest.raises(gradwire.ProtocolError, match="expected row 8"):
        sums.begin(rows, sent, 4, m)


def test_missing_sums_are_an_error() -> None:
    sums, _ = segment_sums(20)
    sums.begin(8, 20, 4)
    sums.take(chunk(1.0))
    with pytest.raises(gradwire.ProtocolError, match="sums of 1 segments: expected 3"):
        sums.require_all(20)
    with pytest.raises(gradwire.ProtocolError, match="did not announce"):
        sums.take(chunk(1.0))


def test_rows_of_a_segment_wait_for_the_sums_of_the_one_before_the_last() -> None:
    options = parse_options(results=("dw",))
    plan = Plan(40, 2, 3, Dtype.FLOAT32, options, segment_rows=8)
    sender = Sender(plan)
    sender.begin(0)
    sender.accept(4, 16)
    operands = {
        Matrix.X: operand(np.ones((40, 2), np.float32), "x"),
        Matrix.DY: operand(np.ones((40, 3), np.float32), "dy"),
    }
    messages = sender.all_rows(operands)
    for received in range(3):
        sender.received_segments = received
        while next(messages) != WAIT:
            pass
        assert sender.rows_sent == 8 * (received + 2)
    sender.received_segments = 3
    assert WAIT not in list(messages)
    assert sender.rows_sent == 40


def test_an_empty_job_has_one_segment() -> None:
    assert Division(0, 8).segments == 1
    assert Division(0, 8).rows_of(0) == (0, 0)
