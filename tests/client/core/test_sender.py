from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gradwire
from gradwire._api.options import parse_options
from gradwire._arrays.operand import operand
from gradwire._core.exchange import JobExchange
from gradwire._core.job_plan import check, with_rows
from gradwire._core.sender import STALE_S, Sender
from gradwire.v1.job_pb2 import End
from gradwire_protocol import framing
from gradwire_protocol.matrices import Matrix
from tests.client.core.fake_server import FakeServer

RESULTS = [("y",), ("dx",), ("dw",), ("y", "dx"), ("y", "dx", "dw")]


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, pause: float = 0.0) -> None:
        self.now = 1000.0
        self.pause = pause

    def __call__(self) -> float:
        return self.now


def rows_of(results: Any, sizes: list[int], n: int, k: int) -> list[dict[Any, Any]]:
    """Items of so many rows, of the operands that are needed."""
    rng = np.random.default_rng(0)
    plan = check({Matrix.W: operand(np.ones((n, k)), "w")}, results)
    return [
        {
            matrix: operand(rng.normal(size=plan.shape(matrix, size)), matrix.label)
            for matrix in plan.operands
            if matrix is not Matrix.W
        }
        for size in sizes
    ]


def play(
    server: FakeServer,
    sizes: list[int],
    *,
    n: int = 3,
    k: int = 2,
    results: Any = ("y", "dx", "dw"),
    chunk_bytes: int = 1 << 20,
    m: int | None = None,
    clock: Clock | None = None,
    early_bytes: int = 0,
    early_messages: int = 0,
) -> Iterator[bytes]:
    """Send items of so many rows to a server that checks their order.

    Args:
        early_bytes: Bytes that may be sent before Accepted.
        early_messages: When Accepted comes, unless the sender waits for it sooner.
    """
    options = parse_options(results=results)
    w = operand(np.ones((n, k)), "w")
    plan = with_rows(check({Matrix.W: w}, options), m)
    plan = replace(plan, chunk_bytes=chunk_bytes)
    sender = Sender(plan, clock or Clock())
    exchange = JobExchange(plan, sender, {}, early_bytes=early_bytes)
    answers = server.open(exchange.opening())

    def messages() -> Iterator[bytes]:
        yield from exchange.weight_messages(w if Matrix.W in plan.operands else None)
        for item in rows_of(options, sizes, n, k):
            if clock is not None:
                clock.now += clock.pause
            yield from exchange.row_messages(item)
        yield from exchange.end_messages()

    sent = 0
    for message in messages():
        if not sender.accepted:
            assert sender.bytes_sent <= early_bytes
        if not message or sent == early_messages:
            for answer in answers:
                exchange.receive(answer)
            answers.clear()
            assert sender.accepted
        if message:
            sent += 1
            yield message


@given(
    sizes=st.lists(st.integers(0, 13), max_size=8),
    n=st.integers(0, 5),
    k=st.integers(0, 5),
    results=st.sampled_from(RESULTS),
    block_rows=st.integers(1, 7),
    window_rows=st.integers(1, 14),
    chunk_bytes=st.integers(1, 120),
    known=st.booleans(),
    early_bytes=st.just(0) | st.integers(0, 400),
    early_messages=st.integers(0, 12),
)
def test_every_stream_keeps_to_the_contracts_order(
    sizes: list[int],
    n: int,
    k: int,
    results: Any,
    block_rows: int,
    window_rows: int,
    chunk_bytes: int,
    known: bool,
    early_bytes: int,
    early_messages: int,
) -> None:
    # What a server promises that takes so many bytes early.
    window_rows = max(window_rows, early_bytes // max(8 * (n + k), 1))
    server = FakeServer(block_rows, window_rows)
    m = sum(sizes) if known else None
    options: Any = {"n": n, "k": k, "results": results, "chunk_bytes": chunk_bytes}
    options |= {"early_bytes": early_bytes, "early_messages": early_messages}
    for message in play(server, sizes, m=m, **options):
        server.take(message)
    list(server.responses())
    assert all(size <= max(8, chunk_bytes) for size in server.payload_sizes)


def test_x_goes_first_and_neither_operand_runs_ahead() -> None:
    server = FakeServer(block_rows=2, window_rows=4)
    for message in play(server, [6]):
        server.take(message)
    assert server.order == ["w", "x", "dy", "x", "dy", "x", "dy"]


def test_single_rows_that_come_quickly_travel_together() -> None:
    server = FakeServer(block_rows=64, window_rows=128)
    for message in play(server, [1] * 64):
        server.take(message)
    # The first goes at once, the others in one message.
    assert server.order == ["w", "x", "dy", "x", "dy"]


def test_single_rows_that_come_slowly_travel_alone() -> None:
    server = FakeServer(block_rows=64, window_rows=128)
    for message in play(server, [1] * 5, clock=Clock(pause=2 * STALE_S)):
        server.take(message)
    assert server.order == ["w", *["x", "dy"] * 5]


def test_a_row_block_is_complete_as_soon_as_its_rows_are_there() -> None:
    server = FakeServer(block_rows=4, window_rows=8)
    messages = play(server, [1] * 4 + [1000])
    kinds = [framing.decode_request(next(messages)) for _ in range(5)]
    # w, the first row alone, and the other three: before the next item.
    indices = [(k.matrix, k.index) for k in kinds if isinstance(k, framing.Chunk)]
    assert indices == [(2, 0), (1, 0), (3, 0), (1, 3), (3, 2)]


def test_memory_of_an_item_may_be_used_again_for_the_next() -> None:
    options = parse_options(results=("dw",))
    rows = np.empty((1, 3))
    item = {Matrix.X: operand(rows, "x"), Matrix.DY: operand(rows, "dy")}
    plan = with_rows(check(item, options), None)
    server = FakeServer(block_rows=8, window_rows=16)
    sender = Sender(plan, Clock())
    exchange = JobExchange(plan, sender, {})
    for answer in server.open(exchange.opening()):
        exchange.receive(answer)
    for number in range(8):
        rows[:] = number
        for message in exchange.row_messages(item):
            server.take(message)
    sent = np.frombuffer(bytes(server._parts[Matrix.X])).reshape(8, 3)
    assert sent[:, 0].tolist() == list(range(8))


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ([3, 3], "rows has at least 6 rows: expected m = 5"),
        ([3], "rows has 3 rows: expected m = 5"),
    ],
)
def test_rows_that_disagree_with_m_are_refused(sizes: list[int], says: str) -> None:
    server = FakeServer()
    with pytest.raises(gradwire.InputError, match=says):
        list(play(server, sizes, m=5))


def test_end_says_how_many_rows_there_were() -> None:
    server = FakeServer()
    *_, last = play(server, [2, 0, 5])
    end = framing.decode_request(last)
    assert isinstance(end, End)
    assert end.m == 7
