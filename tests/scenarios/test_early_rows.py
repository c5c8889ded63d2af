"""Operands leave before the server accepts their job, as many as it says it takes."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import gradwire
from gradwire._client.job_factory import Tuning
from gradwire.v1 import gradient_service_pb2 as service_pb2
from tests.scenarios.conftest import ROW_BLOCK_BYTES as ROW_BLOCK_BYTES_NOW
from tests.support import observing, oracle
from tests.support.relay import Call, Relay
from tests.support.serving import ServerProcess, running_server

ROW_BLOCK_BYTES = 1 << 20
EARLY_BYTES = 1 << 18
"""A quarter of a row block: its rows are far more than W, and far from all rows."""
X, W, DY = oracle.operands(1500, 128, 96)
QUIET_S = 0.1
SOON = gradwire.RetryPolicy(initial_backoff_s=0.01, max_backoff_s=0.1, budget=1e6)


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    settings = {"row_block_bytes": ROW_BLOCK_BYTES, "max_jobs": 1, "max_queue": 0}
    with running_server(**settings) as process:
        yield process


@pytest.fixture(scope="module")
def relay(server: ServerProcess) -> Iterator[Relay]:
    with Relay(server.address) as between:
        yield between


class Late:
    """Accepted comes late: when the client has sent so much, and is quiet."""

    def __init__(self, expected_bytes: int) -> None:
        self.quiet = False
        self._expected_bytes = expected_bytes

    def __call__(self, call: Call, answer: service_pb2.ComputeStreamResponse) -> None:
        if answer.HasField("accepted"):
            expected = self._expected_bytes
            call.wait_for(lambda: call.early_bytes >= expected, "operands come early")
            self.quiet = call.stays_for(lambda: call.early_bytes <= expected, QUIET_S)


def arrays(client: gradwire.Client) -> list[Any]:
    return list(client.gradients(X, W, DY)[:3])


def stream(client: gradwire.Client) -> list[Any]:
    rows = [(X[at : at + 70], DY[at : at + 70]) for at in range(0, len(X), 70)]
    with client.stream(iter(rows), W) as results:
        return [*_joined(list(results)), results.dw]


def session(client: gradwire.Client) -> list[Any]:
    with client.session(keep=1 << 24) as kept:
        w = kept.put(W)
        result = kept.forward(X, w)
        dw = kept.zeros_like(w)
        dx = kept.backward(result.context, DY, into=dw)
        return [result.y, dx, kept.get(dw)]


def in_loop(relay: Relay) -> list[Any]:
    async def run() -> list[Any]:
        client = gradwire.AsyncClient(relay.address, transport="grpc")
        async with client:
            await client.server_info()
            client._engine.jobs.tuning = Tuning(unary=False)
            await client._engine.handshake()
            return list((await client.gradients(X, W, DY))[:3])

    return asyncio.run(run())


def connected(relay: Relay, run: Callable[..., list[Any]]) -> list[Any]:
    with gradwire.connect(relay.address, transport="grpc", retries=SOON) as client:
        client._engine.jobs.tuning = Tuning(unary=False)
        return run(client)


def _joined(blocks: list[Any]) -> list[Any]:
    return [np.concatenate([getattr(b, name) for b in blocks]) for name in ("y", "dx")]


def _most_early(call: Call) -> int:
    """What fits: W, and then whole rows."""
    w = W.nbytes if call.job.w.HasField("inline") else 0
    row = sum(
        columns * 4
        for operand, columns in ((call.job.x, 128), (call.job.dy, 96))
        if operand.HasField("inline")
    )
    return w + (EARLY_BYTES - w) // row * row


@pytest.mark.parametrize("way", ["arrays", "stream", "async"])
def test_as_much_is_sent_early_as_the_server_takes(relay: Relay, way: str) -> None:
    relay.calls.clear()
    row = (128 + 96) * 4
    relay.gate = late = Late(W.nbytes + (EARLY_BYTES - W.nbytes) // row * row)
    ways: dict[str, Callable[..., list[Any]]] = {"arrays": arrays, "stream": stream}
    y, dx, dw = in_loop(relay) if way == "async" else connected(relay, ways[way])
    assert late.quiet
    oracle.assert_right(SimpleNamespace(y=y, dx=dx, dw=dw), X, W, DY, "float32")


def test_calls_of_a_session_send_rows_early(relay: Relay) -> None:
    relay.calls.clear()

    def gate(call: Call, answer: service_pb2.ComputeStreamResponse) -> None:
        Late(_most_early(call))(call, answer)

    relay.gate = gate
    y, dx, dw = connected(relay, session)
    forward, backward = relay.calls
    assert forward.early_bytes == EARLY_BYTES
    assert backward.early_bytes == EARLY_BYTES // (96 * 4) * 96 * 4
    oracle.assert_right(SimpleNamespace(y=y, dx=dx, dw=dw), X, W, DY, "float32")


def test_a_job_can_be_sent_to_its_end_before_it_is_accepted(relay: Relay) -> None:
    relay.calls.clear()
    x, dy = X[:50], DY[:50]

    def gate(call: Call, answer: service_pb2.ComputeStreamResponse) -> None:
        if answer.HasField("accepted"):
            call.wait_for(lambda: call.ended, "End comes early")

    relay.gate = gate
    y, dx, dw = connected(relay, lambda client: list(client.gradients(x, W, dy)[:3]))
    oracle.assert_right(SimpleNamespace(y=y, dx=dx, dw=dw), x, W, dy, "float32")


def test_after_a_refusal_nothing_is_sent_early(
    server: ServerProcess, relay: Relay
) -> None:
    """The next attempt may be refused, too."""
    relay.calls.clear()
    relay.gate = lambda call, answer: None
    with (
        gradwire.connect(server.address, transport="grpc") as other,
        other.stream(itertools.repeat((X, DY)), W) as endless,
        ThreadPoolExecutor(1) as thread,
    ):
        next(endless)  # The only place for a job is taken.
        result = thread.submit(connected, relay, arrays)
        observing.wait_until(lambda: len(relay.calls) > 1, "another attempt")
        endless.close()
        y, dx, dw = result.result()
    assert relay.calls[0].early_bytes <= EARLY_BYTES
    assert not any(call.early_bytes for call in relay.calls[1:])
    oracle.assert_right(SimpleNamespace(y=y, dx=dx, dw=dw), X, W, DY, "float32")


@pytest.mark.parametrize("run", [arrays, stream])
def test_a_server_that_has_smaller_blocks_now_gets_the_job_again(
    small_blocks: ServerProcess, run: Callable[..., list[Any]]
) -> None:
    def gate(call: Call, answer: service_pb2.ComputeStreamResponse) -> None:
        if answer.HasField("accepted") and len(relay.calls) == 1:
            # The server refuses the first row too many, and reads nothing after it.
            most = W.nbytes + X[: answer.accepted.window_rows].nbytes
            call.wait_for(lambda: call.early_bytes > most, "rows")

    with (
        Relay(small_blocks.address) as relay,
        gradwire.connect(relay.address, transport="grpc") as client,
    ):
        relay.gate = gate
        jobs = client._engine.jobs
        jobs.tuning = Tuning(unary=False)
        now = jobs.limits[0]
        assert now.early_bytes == ROW_BLOCK_BYTES_NOW // 4
        jobs.limits = (dataclasses.replace(now, early_bytes=EARLY_BYTES),)
        y, dx, dw = run(client)
    assert [call.early_bytes > 0 for call in relay.calls] == [True, False]
    oracle.assert_right(SimpleNamespace(y=y, dx=dx, dw=dw), X, W, DY, "float32")
