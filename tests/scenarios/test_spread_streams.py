"""Streams over several servers: `client.stream(..., spread=True)`."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

import gradwire
from tests.scenarios.test_several_servers import (
    KINDS,
    SOON,
    addresses,
    several,
    until,
)
from tests.support import oracle
from tests.support.serving import ServerProcess

ROW_BLOCK_BYTES = 1 << 16
RESULTS = ("y", "dx", "dw", "db")
M, N, K = 5000, 32, 32
X, W, DY = oracle.operands(M, N, K)


@pytest.fixture(scope="module")
def three() -> Iterator[list[ServerProcess]]:
    """Servers that all tests share which leave them unharmed."""
    with several(3, row_block_bytes=ROW_BLOCK_BYTES) as servers:
        yield servers


@pytest.fixture(scope="module")
def whole(three: list[ServerProcess]) -> Any:
    """The results for arrays."""
    with gradwire.connect(three[0].address) as client:
        return client.gradients(X, W, DY, spread=True, results=RESULTS)


@pytest.fixture(params=KINDS)
def joined(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Makes clients of each kind in turn."""
    with ExitStack() as stack:

        def make(servers: Any, **options: Any) -> Any:
            client = KINDS[request.param](servers, **options)
            stack.callback(client.close)
            return client

        yield make


def items(rows: int, m: int = M) -> Iterator[Any]:
    for first in range(0, m, rows):
        last = min(first + rows, m)
        yield X[first:last], DY[first:last]


def collected(client: Any, rows: Any, *args: Any, **options: Any) -> Any:
    """All row blocks, and the exhausted stream."""
    options = {"results": RESULTS, "spread": True} | options
    if isinstance(client.client, gradwire.Client):
        stream = client.client.stream(rows, *args, **options)
        return list(stream), stream

    async def collect() -> Any:
        stream = client.client.stream(rows, *args, **options)
        return [block async for block in stream], stream

    return client.run(collect())


def assert_whole(blocks: Any, stream: Any, whole: Any) -> None:
    at = 0
    for block in blocks:
        assert block.first_row == at
        at += len(block)
    assert at == M
    assert oracle.same_bits(np.concatenate([block.y for block in blocks]), whole.y)
    assert oracle.same_bits(np.concatenate([block.dx for block in blocks]), whole.dx)
    assert oracle.same_bits(stream.dw, whole.dw)
    assert oracle.same_bits(stream.db, whole.db)


@pytest.mark.parametrize("rows", [37, 512, M])
@pytest.mark.parametrize("m", [None, M])
def test_a_stream_has_the_bits_of_arrays(
    three: list[ServerProcess], joined: Any, whole: Any, rows: int, m: int | None
) -> None:
    client = joined(addresses(three))
    blocks, stream = collected(client, items(rows), W, m=m)
    assert_whole(blocks, stream, whole)
    segments = stream.receipt.segments
    assert [each.first_row for each in segments] == list(range(0, M, 512))
    assert len({each.server_address for each in segments}) > 1
    assert stream.receipt.m == M


def test_the_memory_of_an_item_may_be_reused(
    three: list[ServerProcess], joined: Any, whole: Any
) -> None:
    x, dy = np.empty((100, N), np.float32), np.empty((100, K), np.float32)

    def reused() -> Iterator[Any]:
        for x_rows, dy_rows in items(100):
            x[:], dy[:] = x_rows, dy_rows
            yield x, dy
            x[:] = dy[:] = np.nan

    blocks, stream = collected(joined(addresses(three)), reused(), W)
    assert_whole(blocks, stream, whole)


def test_little_memory_for_rows_is_enough(
    three: list[ServerProcess], joined: Any, whole: Any
) -> None:
    little = gradwire.RetryPolicy(held_bytes=1)
    client = joined(addresses(three), retries=little)
    assert_whole(*collected(client, items(300), W), whole)
    client = joined(addresses(three), retries=False)
    assert_whole(*collected(client, items(300), W), whole)


@pytest.mark.parametrize("rows", [[], [(np.empty((0, N), np.float32),) * 2]])
def test_streams_without_rows(
    three: list[ServerProcess], joined: Any, rows: Any
) -> None:
    blocks, stream = collected(joined(addresses(three)), rows, W)
    assert blocks == []
    assert not stream.dw.any()
    assert stream.dw.shape == (N, K)


def test_sums_alone(three: list[ServerProcess], joined: Any, whole: Any) -> None:
    client = joined(addresses(three))
    blocks, stream = collected(client, items(300), results=("dw", "db"))
    assert blocks == []
    assert oracle.same_bits(stream.dw, whole.dw)


def test_wrong_numbers_of_rows_are_errors(
    three: list[ServerProcess], joined: Any
) -> None:
    client = joined(addresses(three))
    with pytest.raises(gradwire.InputError, match=f"expected m = {M - 1}"):
        collected(client, items(300), W, m=M - 1)
    with pytest.raises(gradwire.InputError, match=f"{M} rows: expected m = {M + 1000}"):
        collected(client, items(300), W, m=M + 1000)
    with pytest.raises(gradwire.InputError, match="item 1 of rows"):
        collected(client, [(X[:9], DY[:9]), (X[:9], DY[:8])], W)


def test_an_exception_of_the_iterable_reaches_the_caller(
    three: list[ServerProcess], joined: Any
) -> None:
    class MineError(Exception):
        pass

    def failing() -> Iterator[Any]:
        yield from items(300, 3000)
        raise MineError

    with pytest.raises(MineError):
        collected(joined(addresses(three)), failing(), W)


def test_blocks_come_while_rows_are_still_missing(
    three: list[ServerProcess], joined: Any
) -> None:
    came = threading.Event()

    def waiting() -> Iterator[Any]:
        yield X[:300], DY[:300]
        assert came.wait(20)
        yield X[300:], DY[300:]

    def take(first: Any) -> None:
        assert first.first_row == 0
        came.set()

    client = joined(addresses(three))
    if isinstance(client.client, gradwire.Client):
        with client.client.stream(waiting(), W, spread=True) as stream:
            take(next(stream))
            assert sum(map(len, stream)) == M - 256
        return

    async def awaiting() -> Any:
        yield X[:300], DY[:300]
        await asyncio.to_thread(came.wait, 20)
        yield X[300:], DY[300:]

    async def go() -> None:
        async with client.client.stream(awaiting(), W, spread=True) as stream:
            take(await anext(stream))
            assert sum([len(block) async for block in stream]) == M - 256

    client.run(go())


def test_a_stream_can_be_left(three: list[ServerProcess], joined: Any) -> None:
    def endless() -> Iterator[Any]:
        while True:
            yield X[:400], DY[:400]

    client = joined(addresses(three))
    if isinstance(client.client, gradwire.Client):
        with client.client.stream(endless(), W, spread=True) as stream:
            next(stream)
        assert list(stream) == []
        with pytest.raises(gradwire.ClientStateError):
            _ = stream.dw
        stream = client.client.stream(endless(), W, spread=True)
        next(stream)
        del stream
        gc.collect()
        until(lambda: not any("spread" in t.name for t in threading.enumerate()))
        return

    async def go() -> None:
        async with client.client.stream(endless(), W, spread=True) as stream:
            await anext(stream)
        stream = client.client.stream(endless(), W, spread=True)
        await anext(stream)
        del stream
        gc.collect()
        begun = time.monotonic()
        while len(asyncio.all_tasks()) > 1:
            assert time.monotonic() < begun + 20
            await asyncio.sleep(0.01)

    client.run(go())


def test_a_killed_server_changes_nothing(joined: Any, whole: Any) -> None:
    with several(3, row_block_bytes=ROW_BLOCK_BYTES) as servers:
        killed: list[ServerProcess] = []

        def rows() -> Iterator[Any]:
            for number, item in enumerate(items(250)):
                if number == 8:
                    servers[1].kill()
                    killed.append(servers[1])
                yield item

        client = joined(addresses(servers), retries=SOON)
        assert_whole(*collected(client, rows(), W), whole)
        assert killed


def test_stopped_servers_hold_up_nothing(joined: Any, whole: Any) -> None:
    with several(3, row_block_bytes=ROW_BLOCK_BYTES) as servers:
        stopped: list[ServerProcess] = []

        def rows() -> Iterator[Any]:
            for number, item in enumerate(items(250)):
                if number == 8:
                    for each in servers[1:]:
                        os.kill(each.pid, signal.SIGSTOP)
                        stopped.append(each)
                yield item

        client = joined(addresses(servers), timeout_s=30)
        try:
            begun = time.monotonic()
            assert_whole(*collected(client, rows(), W), whole)
            assert stopped
            assert time.monotonic() < begun + 10
        finally:
            for each in stopped:
                os.kill(each.pid, signal.SIGCONT)


def test_an_error_names_the_row_of_the_stream(
    three: list[ServerProcess], joined: Any
) -> None:
    x = X.copy()
    x[4321, 7] = 1e30
    rows = [(x[:3000], DY[:3000]), (x[3000:], DY[3000:])]
    with pytest.raises(gradwire.InputError, match="in row 4321, column 7"):
        collected(joined(addresses(three)), rows, W, wire_dtype="float16")


def test_an_iterable_that_blocks_holds_up_neither_leaving_nor_errors() -> None:
    few = gradwire.RetryPolicy(attempts=1)
    goes_on = threading.Event()

    def blocking() -> Iterator[Any]:
        yield X[:300], DY[:300]
        goes_on.wait(20)

    try:
        with (
            several(1, row_block_bytes=ROW_BLOCK_BYTES) as servers,
            gradwire.connect(addresses(servers), retries=few) as client,
        ):
            begun = time.monotonic()
            stream = client.stream(blocking(), W, spread=True)
            next(stream)
            stream.close()
            stream = client.stream(blocking(), W, spread=True)
            next(stream)
            servers[0].kill()
            with pytest.raises((gradwire.UnavailableError, gradwire.ConnectError)):
                next(stream)
            assert time.monotonic() < begun + 10
    finally:
        goes_on.set()
    until(lambda: not any("spread" in t.name for t in threading.enumerate()))


def test_progress_of_a_stream(three: list[ServerProcess], joined: Any) -> None:
    seen: list[gradwire.Progress] = []
    client = joined(addresses(three))
    collected(client, items(300), W, m=M, on_progress=seen.append)
    last = seen[-1]
    assert last.m == last.rows_sent == M
    assert last.bytes_sent == last.bytes_to_send
    assert sum((last.rows_by_server or {}).values()) == M


def test_results_are_verified(
    three: list[ServerProcess], joined: Any, whole: Any
) -> None:
    client = joined(addresses(three))
    assert_whole(*collected(client, items(300), W, verify=True), whole)
