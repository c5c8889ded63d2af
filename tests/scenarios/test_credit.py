"""A client has no more row blocks outstanding than the server reads on its own.

A peer between client and server counts them. At first it holds all results back, so
that a client that kept to nothing would send all of its rows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import gradwire
from gradwire._client.job_factory import Tuning
from gradwire.v1 import gradient_service_pb2 as service_pb2
from tests.support import oracle
from tests.support.relay import Call, CutError, Relay
from tests.support.serving import running_server

B, BLOCKS = 64, 24
X, W, DY = oracle.operands(B * BLOCKS - 5, 128, 128)
QUIET_S = 0.1
SOON = gradwire.RetryPolicy(initial_backoff_s=0.01, max_backoff_s=0.1, budget=1e6)


@pytest.fixture(scope="module")
def relay() -> Iterator[Relay]:
    with (
        running_server(row_block_bytes=1 << 20) as server,
        Relay(server.address) as between,
    ):
        yield between


def arrays(client: gradwire.Client, **options: Any) -> list[Any]:
    y, dx, dw = client.gradients(X, W, DY, block_rows=B, **options)
    return [y, dx, dw]


def stream(client: gradwire.Client, **options: Any) -> list[Any]:
    rows = [(X[at : at + 150], DY[at : at + 150]) for at in range(0, len(X), 150)]
    with client.stream(iter(rows), W, block_rows=B, **options) as results:
        blocks = list(results)
    return [*_joined(blocks), results.dw]


def _joined(blocks: list[Any]) -> list[Any]:
    return [np.concatenate([getattr(b, name) for b in blocks]) for name in ("y", "dx")]


def in_loop(address: str, what: str) -> list[Any]:
    async def run() -> list[Any]:
        async with gradwire.AsyncClient(address, transport="grpc") as client:
            if what == "arrays":
                return list(await client.gradients(X, W, DY, block_rows=B))
            rows = [(X[i : i + 333], DY[i : i + 333]) for i in range(0, len(X), 333)]
            async with client.stream(rows, W, block_rows=B) as results:
                blocks = [block async for block in results]
            return [*_joined(blocks), results.dw]

    return asyncio.run(run())


def connected(relay: Relay, run: Callable[..., list[Any]]) -> list[Any]:
    with gradwire.connect(relay.address, transport="grpc", retries=SOON) as client:
        return run(client)


WAYS: dict[str, Callable[[Relay], list[Any]]] = {
    "arrays": lambda relay: connected(relay, arrays),
    "stream": lambda relay: connected(relay, stream),
    "async-arrays": lambda relay: in_loop(relay.address, "arrays"),
    "async-stream": lambda relay: in_loop(relay.address, "stream"),
}


class HeldBack:
    """Holds all results back until the client has sent what it may, and is quiet.

    Args:
        cut_at: Number of the row block whose results end the first call.
    """

    def __init__(self, cut_at: int | None = None) -> None:
        self.quiet: list[bool] = []
        self._cut_at = cut_at
        self._held: list[Call] = []

    def __call__(self, call: Call, answer: service_pb2.ComputeStreamResponse) -> None:
        if not answer.HasField("chunk"):
            return
        if call not in self._held:
            self._held.append(call)
            assert call.accepted is not None
            credit = call.accepted.credit_blocks
            call.wait_for(lambda: call.most_outstanding >= credit, "credit is used")
            self.quiet.append(
                call.stays_for(lambda: call.most_outstanding <= credit, QUIET_S)
            )
        if len(self._held) == 1 and call.received == self._cut_at:
            raise CutError


@pytest.mark.parametrize("way", WAYS)
def test_no_more_row_blocks_are_outstanding_than_the_server_allows(
    relay: Relay, way: str
) -> None:
    relay.calls.clear()
    relay.gate = held = HeldBack()
    y, dx, dw = WAYS[way](relay)
    (call,) = relay.calls
    assert call.accepted is not None
    assert call.accepted.block_rows == B
    assert 3 < call.accepted.credit_blocks < BLOCKS
    assert held.quiet == [True]
    assert call.most_outstanding == call.accepted.credit_blocks
    oracle.assert_right(SimpleNamespace(y=y, dx=dx, dw=dw), X, W, DY, "float32")


@pytest.mark.parametrize("way", ["arrays", "stream"])
def test_a_job_that_goes_on_elsewhere_keeps_to_it_too(relay: Relay, way: str) -> None:
    relay.calls.clear()
    relay.gate = held = HeldBack(cut_at=4)
    y, dx, dw = WAYS[way](relay)
    first, second = relay.calls
    assert second.job.resume.results_from_row == 4 * B
    assert second.accepted is not None
    assert held.quiet == [True, True]
    credit = second.accepted.credit_blocks
    assert (first.most_outstanding, second.most_outstanding) == (credit, credit)
    oracle.assert_right(SimpleNamespace(y=y, dx=dx, dw=dw), X, W, DY, "float32")


@pytest.mark.parametrize("results", ["dw", "db"])
def test_rows_without_results_are_not_outstanding(relay: Relay, results: Any) -> None:
    """Nothing would say when they are not any more."""
    relay.calls.clear()
    relay.gate = lambda call, answer: None
    with gradwire.connect(relay.address, transport="grpc") as client:
        client._engine.jobs.tuning = Tuning(unary=False)
        client.gradients(X, W, DY, block_rows=B, results=results)
    (call,) = relay.calls
    assert call.begun == BLOCKS
    assert call.most_outstanding == 0
