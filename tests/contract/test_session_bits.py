"""Kept matrices give the bits of sent ones, in every dtype and in every way."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from gradwire.v1 import job_pb2
from tests.contract.conftest import assert_untroubled
from tests.support.raw import (
    DTYPES,
    Outcome,
    Problem,
    compute_job,
    dtype_number,
    normal_numbers,
    result,
    stream_job,
)
from tests.support.serving import ServerProcess, running_server
from tests.support.sessions import (
    MIB,
    RawSessions,
    into,
    kept,
    sent_and_kept,
    shapes,
    shared,
)
from tests.support.shared_memory import RawRegion

W, X, DY, DW, DB = 1, 2, 3, 4, 5
NUMBERS = {"w": W, "x": X, "dy": DY, "dw": DW, "db": DB}
SHAPE = (150, 6, 5)
EMPTY = [(0, 6, 5), (150, 0, 5), (150, 6, 0), (0, 0, 0), (1, 1, 1)]


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    """Row blocks are so small that a job has several."""
    with running_server(
        row_block_bytes=1024, allow_shared_memory=True, memory_limit=512 * MIB
    ) as process:
        yield process
        assert_untroubled(process)


@pytest.fixture(scope="module")
def channel(server: ServerProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as opened:
        yield opened


@pytest.fixture
def session(channel: grpc.Channel) -> Iterator[RawSessions]:
    session = RawSessions(channel).open()
    yield session
    session.close()


@pytest.fixture(params=["compute", "stream", "shared"])
def run(
    request: pytest.FixtureRequest, channel: grpc.Channel
) -> Iterator[Callable[..., Outcome]]:
    """Runs a job of a session in one of the three ways."""
    if request.param != "shared":
        yield lambda session, problem, **fields: getattr(session, request.param)(
            problem, **fields
        )
        return
    with RawRegion(channel, MIB) as region:
        yield lambda session, problem, **fields: shared(
            session, region, problem, **fields
        )


def keeping(
    session: RawSessions, problem: Problem, names: tuple[str, ...], **dtypes: str
) -> dict[str, Any]:
    """Fields of a job whose named matrices are kept; they are put before."""
    fields: dict[str, Any] = {}
    for name in names:
        number = NUMBERS[name]
        session.drop(number)
        if name in {"dw", "db"}:
            dtype = dtypes.get(name, problem.dtype)
            shape = shapes(problem)[name]
            session.zeros(number, shape, dtype=dtype_number(dtype))
            fields[name] = into(number, dtype=dtype)
        else:
            session.put(number, getattr(problem, name))
            fields[name] = kept(number)
    return fields


def bits(session: RawSessions, outcome: Outcome, *names: str) -> dict[str, bytes]:
    """All results, with those that stayed in the session."""
    of_session = {name: session.get(NUMBERS[name]).tobytes() for name in names}
    return outcome.bits | of_session


SUBSETS = [
    subset
    for count in range(1, 5)
    for subset in itertools.combinations(("x", "w", "dy", "dw"), count)
]


@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_any_matrices_can_be_kept(session, channel, run, names) -> None:
    problem = normal_numbers(*SHAPE)
    expected = stream_job(channel, problem).bits
    assert compute_job(channel, problem).bits == expected
    outcome = run(session, problem, **keeping(session, problem, names))
    sums = [name for name in names if name == "dw"]
    assert bits(session, outcome, *sums) == expected
    assert set(outcome.arrays) == {"y", "dx", "dw"} - set(sums)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("accumulator", ["UNSPECIFIED", "float64"])
@pytest.mark.parametrize("wider", [False, True])
def test_every_dtype(session, channel, run, dtype, accumulator, wider) -> None:
    problem = normal_numbers(*SHAPE, dtype)
    dtypes = {"dw": "float64", "y": "float64", "dx": "float32"} if wider else {}
    numerics = job_pb2.Numerics(dw_accumulator=dtype_number(accumulator))
    options: dict[str, Any] = {"numerics": numerics}
    options |= {name: result(each) for name, each in dtypes.items()}
    expected = stream_job(channel, problem, **options).bits
    fields = keeping(session, problem, ("x", "w", "dy", "dw"), **dtypes)
    outcome = run(session, problem, **(options | fields))
    assert bits(session, outcome, "dw") == expected


@pytest.mark.parametrize("shape", [SHAPE, *EMPTY])
@pytest.mark.parametrize("names", [("x", "w", "dy", "dw"), ("w",), ("x",), ("dw",)])
def test_every_shape(session, channel, run, shape, names) -> None:
    problem = normal_numbers(*shape)
    expected = stream_job(channel, problem).bits
    outcome = run(session, problem, **keeping(session, problem, names))
    sums = [name for name in names if name == "dw"]
    assert bits(session, outcome, *sums) == expected


@pytest.mark.parametrize("names", [("w", "dw"), ("x", "w", "dy", "dw")], ids="+".join)
def test_row_blocks_that_the_client_asks_for(session, channel, run, names) -> None:
    problem = normal_numbers(*SHAPE)
    expected = stream_job(channel, problem, block_rows=4)
    assert expected.accepted.block_rows == 4
    assert expected.bits != stream_job(channel, problem).bits
    fields = keeping(session, problem, names)
    outcome = run(session, problem, block_rows=4, **fields)
    assert bits(session, outcome, "dw") == expected.bits


@pytest.mark.parametrize("shape", [SHAPE, *EMPTY])
def test_an_operand_that_a_job_keeps_is_the_sent_one(
    session, channel, run, shape
) -> None:
    problem = normal_numbers(*shape)
    expected = stream_job(channel, problem).bits
    first = run(session, problem, x=sent_and_kept(X), dy=sent_and_kept(DY))
    assert first.bits == expected
    assert session.get(X).tobytes() == problem.x.tobytes()
    assert session.get(DY).tobytes() == problem.dy.tobytes()
    assert session.used_bytes == problem.x.nbytes + problem.dy.nbytes
    second = run(session, problem, x=kept(X, last_use=True), dy=kept(DY))
    assert second.bits == expected
    assert session.used_bytes == problem.dy.nbytes


@pytest.mark.parametrize("message_bytes", [4, 52, 1 << 20])
def test_an_operand_is_kept_from_messages_of_any_size(
    session, channel, message_bytes
) -> None:
    problem = normal_numbers(*SHAPE)
    outcome = session.stream(problem, message_bytes=message_bytes, x=sent_and_kept(X))
    assert outcome.bits == stream_job(channel, problem).bits
    assert session.get(X).tobytes() == problem.x.tobytes()


@pytest.mark.parametrize("shape", [SHAPE, (0, 6, 5), (150, 6, 0)])
@pytest.mark.parametrize("names", [("db",), ("dw", "db"), ("x", "dy", "dw", "db")])
@pytest.mark.parametrize("way", ["compute", "stream"])
def test_column_sums_stay_in_a_row_or_a_vector(
    session, channel, way, names, shape
) -> None:
    given = normal_numbers(*shape)
    problem = Problem(given.x, given.w, given.dy, ("dx", "dw", "db"))
    expected = stream_job(channel, problem).bits
    sums = [name for name in names if name in {"dw", "db"}]
    outcome = getattr(session, way)(problem, **keeping(session, problem, names))
    assert bits(session, outcome, *sums) == expected
    session.zeros(9, (shape[2],))
    getattr(session, way)(problem, db=into(9))
    assert session.get(9).tobytes() == expected["db"]


def test_a_job_without_any_rows_on_the_wire(session, channel, run) -> None:
    """All operands are kept, and the one result stays: only the header travels."""
    given = normal_numbers(*SHAPE)
    problem = Problem(given.x, given.w, given.dy, ("dw",))
    expected = stream_job(channel, problem).bits
    outcome = run(session, problem, **keeping(session, problem, ("x", "dy", "dw")))
    assert not outcome.arrays
    assert bits(session, outcome, "dw") == expected
    receipt = outcome.receipt
    assert (receipt.bytes_received, receipt.bytes_sent) == (0, 0)
    assert receipt.m == SHAPE[0]


def test_a_receipt_counts_what_travelled(session, run) -> None:
    problem = normal_numbers(*SHAPE)
    outcome = run(session, problem, **keeping(session, problem, ("w", "x", "dw")))
    receipt = outcome.receipt
    assert receipt.bytes_received == problem.dy.nbytes
    assert receipt.bytes_sent == sum(each.nbytes for each in outcome.arrays.values())


def test_the_sum_of_parts_is_that_of_a_loop(session, run) -> None:
    parts = [normal_numbers(*SHAPE, seed=seed) for seed in range(4)]
    session.zeros(DW, (6, 5))
    total = np.zeros((6, 5), np.float32)
    for number, problem in enumerate(parts):
        session.zeros(9, (6, 5))
        run(session, problem, dw=into(9))
        total = session.get(9) if number == 0 else total + session.get(9)
        run(session, problem, dw=into(DW, number))
    assert session.get(DW).tobytes() == total.tobytes()
