"""Weights that never change: many workers with one of them send it once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import gradwire
from tests.support import oracle
from tests.support.metrics import scrape
from tests.support.proxy import Fault, Proxy
from tests.support.serving import ServerProcess, running_server

MIB = 1 << 20


@pytest.fixture(scope="module")
def serving() -> Iterator[ServerProcess]:
    with running_server(metrics_listen="0") as process:
        yield process


@pytest.fixture
def client(serving: ServerProcess) -> Iterator[gradwire.Client]:
    with gradwire.connect(serving.address, transport="grpc", timeout_s=60) as connected:
        yield connected


def received(serving: ServerProcess) -> float:
    metrics = scrape(serving.metrics_url)
    return metrics.sum("received_bytes_total", method="PutTensor")


def matrix(seed: int, shape: tuple[int, int] = (1024, 256)) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def frozen_of(session: gradwire.Session) -> list[tuple[bool, int]]:
    return [(each.frozen, each.sharers) for each in session.describe().tensors]


def test_workers_send_a_frozen_weight_once(serving: ServerProcess) -> None:
    w, before = matrix(0), received(serving)
    x = matrix(1, (16, 1024))

    ended = Barrier(4)

    def work(number: int) -> Any:
        # Equal elements, wherever they lie.
        given = w if number % 2 else np.asfortranarray(w)
        with (
            gradwire.connect(serving.address, transport="grpc") as client,
            client.session(2 * w.nbytes + MIB) as session,
        ):
            weight = session.put(given, frozen=True)
            y = session.forward(x, weight).y
            session.put(given)  # not frozen: sent
            ended.wait()
            return y, session.get(weight)

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(work, range(4)))
    for y, kept in found:
        assert oracle.same_bits(kept, w)
        np.testing.assert_allclose(y, x @ w, rtol=1e-4, atol=1e-3)
    assert received(serving) - before == 5 * w.nbytes


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_the_async_client_asks_too(serving: ServerProcess, dtype: str) -> None:
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    w, before = matrix(2, (1024, 512)).astype(kind), received(serving)

    async def run() -> None:
        async with (
            gradwire.AsyncClient(serving.address, timeout_s=60) as client,
            client.session(w.nbytes) as one,
            client.session(w.nbytes) as other,
        ):
            for session in (one, other):
                weight = await session.put(w, frozen=True)
                assert oracle.same_bits(await session.get(weight), w)

    asyncio.run(run())
    assert received(serving) - before == w.nbytes


def test_a_small_weight_is_frozen_and_sent(
    serving: ServerProcess, client: gradwire.Client
) -> None:
    """A question would take as long."""
    w, before = matrix(3, (64, 64)), received(serving)
    with client.session(MIB) as one, client.session(MIB) as other:
        for session in (one, other):
            session.put(w, frozen=True)
            assert frozen_of(session) == [(True, 0)]
    assert received(serving) - before == 2 * w.nbytes


def test_a_cut_put_of_a_frozen_weight_is_made_once(serving: ServerProcess) -> None:
    patient = gradwire.RetryPolicy(initial_backoff_s=0.01, max_backoff_s=0.02)
    faults = [
        Fault("requests", cut_after_bytes=300),
        Fault("requests", cut_after_bytes=700_000),
        *(Fault("responses", cut_after_bytes=at) for at in (1, 40, 80, 200)),
    ]
    begun = time.monotonic()
    with (
        Proxy(serving.address) as proxy,
        gradwire.connect(
            proxy.address, transport="grpc", retries=patient, timeout_s=60
        ) as client,
    ):
        for seed, fault in enumerate(faults, 10):
            w = matrix(seed)
            with client.session(w.nbytes) as session:
                proxy.arm(fault)
                weight = session.put(w, frozen=True)
                assert oracle.same_bits(session.get(weight), w)
                assert frozen_of(session) == [(True, 1)]
                assert session.describe().used_bytes == w.nbytes
        assert proxy.faults == len(faults)
    # A client never waits for itself.
    assert time.monotonic() - begun < 5 * len(faults)


def test_a_frozen_weight_can_be_replaced_and_trained(client: gradwire.Client) -> None:
    w = matrix(4)
    with client.session(4 * w.nbytes) as one, client.session(2 * w.nbytes) as other:
        weight, kept = one.put(w, frozen=True), other.put(w, frozen=True)
        gradient = one.zeros_like(weight)
        _, context = one.forward(np.ones((1, 1024), np.float32), weight)
        dy = np.ones((1, 256), np.float32)
        one.backward(context, dy, into=gradient)
        with pytest.raises(gradwire.RequestError, match="frozen"):
            one.step(gradwire.SGD(lr=1.0), {weight: gradient})
        with pytest.raises(gradwire.RequestError, match="frozen"):
            one.put_state(weight, "exp_avg", w, updates=1)
        with pytest.raises(gradwire.InputError, match="keep_states"):
            one.put(w, replace=weight, keep_states=True, frozen=True)
        one.put(w, replace=weight)
        one.step(gradwire.SGD(lr=1.0), {weight: gradient})
        assert oracle.same_bits(one.get(weight), w - np.float32(1))
        assert oracle.same_bits(other.get(kept), w)


def test_a_file_says_what_is_frozen(
    serving: ServerProcess, client: gradwire.Client, tmp_path: Path
) -> None:
    pytest.importorskip("safetensors")
    path, w = tmp_path / "run.safetensors", matrix(5)
    with client.session(4 * w.nbytes) as one, client.session(4 * w.nbytes) as other:
        one.put(w, name="base", frozen=True)
        one.put(w[:8], name="head")
        one.save(path)
        before = received(serving)
        other.restore(path)
        assert {each.name: each.frozen for each in other.describe().tensors} == {
            "base": True,
            "head": False,
        }
        assert received(serving) - before == w[:8].nbytes
