"""Direct connections that break, and bytes that change on them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import gradwire
from tests.support import oracle
from tests.support.behind_proxies import ALL, DY, LOST, SOON, Behind, K, M, N, W, X
from tests.support.proxy import Direction, Fault, Proxy
from tests.thorough.faults.conftest import EXTENTS
from tests.thorough.faults.table import FAULTS

UP_BYTES = 4 * (M * (N + K) + N * K)
DOWN_BYTES = UP_BYTES + 4 * K
STEP = 211


def places() -> list[tuple[Direction, int]]:
    """After how many bytes of all connections together, in which direction."""
    first = [0, 1, 39, 40, 41, 80, 160, 161, 192, 200]  # around Attach and a header
    up = [*first, *range(300, UP_BYTES, STEP)]
    down = [*first[1:], *range(300, DOWN_BYTES, STEP)]
    return [*(("requests", at) for at in up), *(("responses", at) for at in down)]


@contextlib.contextmanager
def calling(behind: Behind, kind: str) -> Iterator[Callable[..., gradwire.Gradients]]:
    """`gradients` of either client."""
    if kind == "sync":
        with behind.connect() as client:
            yield client.gradients
        return
    options: Any = {"transport": "direct", "retries": SOON, "timeout_s": 60}
    with asyncio.Runner() as runner:
        other = gradwire.AsyncClient(behind.call.address, **options)
        try:
            yield lambda *args, **more: runner.run(other.gradients(*args, **more))
        finally:
            runner.run(other.close())


@pytest.mark.parametrize("extent", EXTENTS)
def test_a_job_cut_off_anywhere_has_the_bits_of_one_that_was_not(
    behind: Behind, expected: gradwire.Gradients, extent: str
) -> None:
    cases = list(itertools.product(("sync", "async"), places()))
    with calling(behind, "sync") as one, calling(behind, "async") as other:
        clients = {"sync": one, "async": other}
        for number, (kind, (of, at)) in enumerate(
            FAULTS["cut-direct"].cases(cases, extent)
        ):
            out = {"y": np.full((M, K), 7, np.float32)}
            faults = behind.data.faults
            behind.data.arm(Fault(of, cut_after_bytes=at))
            more: Any = {"out": out, "checkpoint_rows": (None, 50)[number % 2]}
            try:
                result = clients[kind](X, W, DY, results=ALL, **more)
            except gradwire.ConnectError:
                # Connections that cannot be opened are an error if they are demanded.
                assert at <= 200, (of, at)
                continue
            assert behind.data.faults == faults + 1, (of, at)
            assert set(result.receipt.retried) <= LOST, (of, at)
            assert result.receipt.transport == "direct"
            assert result.y is out["y"]
            for name in ALL:
                got, due = getattr(result, name), getattr(expected, name)
                assert oracle.same_bits(got, due), (name, of, at)


def parts() -> Iterator[Any]:
    """X and dY some rows at a time, from a generator that can be read once."""
    for first in range(0, M, 37):
        yield X[first : first + 37], DY[first : first + 37]


@pytest.mark.parametrize("extent", EXTENTS)
def test_a_stream_cut_off_anywhere_gives_every_row_block_once(
    behind: Behind, expected: gradwire.Gradients, extent: str
) -> None:
    options: Any = {"transport": "direct", "retries": SOON, "timeout_s": 60}
    cases = list(itertools.product(("sync", "async"), places()))
    with behind.connect() as one, asyncio.Runner() as runner:
        other = gradwire.AsyncClient(behind.call.address, **options)

        def run(kind: str, **more: Any) -> Any:
            if kind == "sync":
                stream = one.stream(parts(), W, **more)
                return list(stream), stream.dw

            async def collect() -> Any:
                stream = other.stream(parts(), W, **more)
                return [block async for block in stream], stream.dw

            return runner.run(collect())

        try:
            for number, (kind, (of, at)) in enumerate(
                FAULTS["cut-direct-stream"].cases(cases, extent)
            ):
                behind.data.arm(Fault(of, cut_after_bytes=at))
                try:
                    blocks, dw = run(kind, checkpoint_rows=(None, 50)[number % 2])
                except gradwire.ConnectError:
                    assert at <= 200, (of, at)
                    continue
                rows = blocks[1].first_row
                assert [each.first_row for each in blocks] == list(range(0, M, rows))
                y = np.concatenate([each.y for each in blocks])
                assert oracle.same_bits(y, expected.y), (of, at)
                assert oracle.same_bits(dw, expected.dw), (of, at)
        finally:
            runner.run(other.close())


@pytest.mark.parametrize("extent", EXTENTS)
def test_a_contribution_to_a_session_counts_once_wherever_it_is_cut_off(
    behind: Behind, expected: gradwire.Gradients, extent: str
) -> None:
    """Also where the operand that is cut off is kept."""
    faults: list[tuple[Proxy, Fault]] = [
        (behind.data, Fault(of, cut_after_bytes=at)) for of, at in places() if at > 40
    ]
    faults += [
        (behind.call, Fault("responses", cut_after_messages=at)) for at in (1, 2, 3)
    ]
    faults = FAULTS["cut-direct-session"].cases(faults, extent)
    with behind.connect() as client, client.session("16MiB") as session:
        weight = session.put(W)
        for number, (proxy, fault) in enumerate(faults):
            gradient = session.zeros_like(weight)
            bias = session.zeros_like(session.put(np.zeros_like(DY[0])))
            before = behind.data.faults + behind.call.faults
            if number % 2:
                proxy.arm(fault)
            y, context = session.forward(X, weight)
            if not number % 2:
                proxy.arm(fault)
            dx = session.backward(context, DY, into=gradient, bias_into=bias)
            assert behind.data.faults + behind.call.faults <= before + 1
            proxy.arm(None)
            got = y, dx, session.get(gradient), session.get(bias)
            for name, one in zip(ALL, got, strict=True):
                assert oracle.same_bits(one, getattr(expected, name)), (name, fault)
