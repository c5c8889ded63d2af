"""Jobs and sessions through each proxy, as without one."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import gradwire
from tests.proxies.conftest import caller
from tests.proxies.running import Kind
from tests.scenarios.callers import CALLERS
from tests.scenarios.ways import COMPUTE, STREAM, Way
from tests.support import oracle
from tests.support.serving import ServerProcess

X, W, DY = oracle.operands(3000, 120, 80)


def same(results: Any, expected: Any) -> bool:
    return all(
        oracle.same_bits(np.asarray(one), np.asarray(other))
        for one, other in zip(results, expected, strict=True)
    )


@pytest.mark.parametrize("of", CALLERS)
@pytest.mark.parametrize("way", [COMPUTE, STREAM], ids=str)
def test_a_job_has_the_bits_of_one_without_a_proxy(
    proxy: str, direct: gradwire.Client, of: str, way: Way
) -> None:
    expected = direct.gradients(X, W, DY)
    with contextlib.closing(caller(of, proxy, way)) as one:
        for _ in range(4):
            result = one.gradients(X, W, DY)
            assert result.receipt.attempts == 1
            assert same(result, expected)


@pytest.mark.parametrize("of", CALLERS)
def test_a_stream_has_the_bits_of_one_without_a_proxy(
    proxy: str, direct: gradwire.Client, of: str
) -> None:
    expected = direct.gradients(X, W, DY)
    rows = ((X[at : at + 100], DY[at : at + 100]) for at in range(0, len(X), 100))
    with contextlib.closing(caller(of, proxy)) as one:
        blocks, dw, receipt = one.stream(rows, W)
    assert receipt.attempts == 1
    y = np.concatenate([block.y for block in blocks])
    dx = np.concatenate([block.dx for block in blocks])
    assert same((y, dx, dw), expected)


def test_a_big_job_is_not_limited(proxy: str, direct: gradwire.Client) -> None:
    """More than any window, buffer and limit that a proxy has by default."""
    x, w, dy = oracle.operands(200_000, 64, 64)
    expected = direct.gradients(x, w, dy)
    with gradwire.connect(proxy, transport="grpc", timeout_s=100) as client:
        result = client.gradients(x, w, dy)
    assert result.receipt.bytes_received > 90 << 20
    assert result.receipt.attempts == 1
    assert same(result, expected)


def test_a_session_stays_with_its_server(
    proxy: str,
    kind: Kind,
    direct: gradwire.Client,
    servers: tuple[ServerProcess, ServerProcess],
) -> None:
    def train(client: gradwire.Client) -> tuple[str, Any]:
        with client.session("16MiB") as session:
            w = session.put(W)
            g = session.zeros_like(w)
            for _ in range(3):
                y, context = session.forward(X, w)
                dx = session.backward(context, DY, into=g)
                session.step(gradwire.AdamW(lr=0.1), {w: g})
            return session.describe().server_instance, (y, dx, session.get(w))

    def through(_: int) -> tuple[str, Any]:
        with gradwire.connect(proxy, transport="grpc", timeout_s=60) as client:
            return train(client)

    _, expected = train(direct)
    with ThreadPoolExecutor(4) as pool:
        trained = list(pool.map(through, range(12)))
    assert all(same(result, expected) for _, result in trained)
    # Both servers have sessions: one in 2048 times, by chance, they do not.
    assert len({instance for instance, _ in trained}) == 2
