"""One job gives the same bits, however it travels."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import gradwire
from gradwire_protocol.limits import MIB
from tests.scenarios import ways
from tests.scenarios.ways import Way
from tests.support import oracle
from tests.support.serving import running_server

M, N, K = 211, 30, 20


@pytest.fixture(scope="module", params=oracle.DTYPES)
def job(request: pytest.FixtureRequest, caller_of: Any) -> Any:
    """A job of many row blocks, the last one short, and its results."""
    operands = oracle.operands(M, N, K, request.param)
    result = caller_of("sync", ways.COMPUTE).gradients(*operands)
    assert result.receipt.blocks > 2
    assert M % result.receipt.block_rows
    return operands, result


def assert_same(actual: Any, expected: Any) -> None:
    for name, one, other in zip(("y", "dx", "dw"), actual, expected, strict=True):
        assert oracle.same_bits(one, other), name


def test_in_every_way(caller: Any, job: Any) -> None:
    operands, expected = job
    assert_same(caller.gradients(*operands), expected)


@pytest.mark.big
@pytest.mark.parametrize("chunk_bytes", [50, 4095, 4 * MIB])
def test_in_messages_of_any_size(streamer: Any, job: Any, chunk_bytes: int) -> None:
    operands, expected = job
    streamer.tune(chunk_bytes=chunk_bytes)
    assert_same(streamer.gradients(*operands), expected)


@pytest.mark.big
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_one_element_at_a_time(streamer: Any, dtype: str) -> None:
    operands = oracle.operands(101, 7, 5, dtype)
    expected = streamer.gradients(*operands)
    streamer.tune(chunk_bytes=1)
    assert_same(streamer.gradients(*operands), expected)


def test_with_checksums(caller: Any, job: Any) -> None:
    operands, expected = job
    assert_same(caller.gradients(*operands, checksum=True), expected)


def slowly(items: Iterator[Any]) -> Iterator[Any]:
    for number, item in enumerate(items):
        if number % 64 == 63:
            time.sleep(0.03)
        yield item


def parts(x: Any, dy: Any, sizes: list[int]) -> Iterator[Any]:
    """Rows of both in turn, in parts of these sizes over and over."""
    row, number = 0, 0
    while row < len(x):
        size = sizes[number % len(sizes)]
        yield x[row : row + size], dy[row : row + size]
        row, number = row + size, number + 1


def assert_streamed(
    streamer: Any, rows: Iterator[Any], w: Any, expected: Any, **options: Any
) -> None:
    blocks, dw, receipt = streamer.stream(rows, w, **options)
    assert [block.first_row for block in blocks] == list(
        range(0, M, receipt.block_rows)
    )
    y = np.concatenate([block.y for block in blocks])
    dx = np.concatenate([block.dx for block in blocks])
    assert_same((y, dx, dw), expected)


@pytest.mark.big
@pytest.mark.parametrize("known", [True, False], ids=["known m", "unknown m"])
@pytest.mark.parametrize(
    "arrival", [[M], [1], [1, 0, 7, 64], [63]], ids=["whole", "rows", "uneven", "63"]
)
def test_as_a_stream_of_rows_however_they_arrive(
    streamer: Any, job: Any, known: bool, arrival: list[int]
) -> None:
    (x, w, dy), expected = job
    rows = parts(x, dy, arrival)
    assert_streamed(streamer, rows, w, expected, m=M if known else None)


def test_as_a_stream_of_rows_that_arrive_slowly(streamer: Any, job: Any) -> None:
    (x, w, dy), expected = job
    assert_streamed(streamer, slowly(parts(x, dy, [1, 0, 2])), w, expected)


@pytest.fixture(scope="module")
def halves(client: gradwire.Client, job: Any) -> Any:
    """The job in blocks of half the rows of the server's own, and its results."""
    operands, whole = job
    rows = whole.receipt.block_rows // 2
    itemsize = operands[0].itemsize
    row_bytes = (N + K) * itemsize
    with (
        running_server(row_block_bytes=rows * row_bytes) as server,
        gradwire.connect(server.address, transport="grpc") as other,
    ):
        own = other.gradients(*operands)
    assert own.receipt.block_rows == rows
    if itemsize > 2:  # otherwise rounding to 16 bits may hide the difference
        assert not oracle.same_bits(own.dw, whole.dw)
    return rows, own


def test_the_rows_of_a_block_that_a_call_names_in_every_way(
    caller: Any, job: Any, halves: Any
) -> None:
    operands, _ = job
    rows, expected = halves
    result = caller.gradients(*operands, block_rows=rows)
    assert result.receipt.block_rows == rows
    assert_same(result, expected)
    x, w, dy = operands
    back = caller.backward(x, w, dy, block_rows=rows)
    assert oracle.same_bits(back.dx, expected.dx)
    assert oracle.same_bits(back.dw, expected.dw)


@pytest.mark.parametrize("known", [True, False], ids=["known m", "unknown m"])
def test_a_stream_has_the_bits_of_a_call_that_names_the_same_rows(
    streamer: Any, job: Any, halves: Any, known: bool
) -> None:
    (x, w, dy), _ = job
    rows, expected = halves
    assert_streamed(
        streamer,
        parts(x, dy, [7, 64]),
        w,
        expected,
        m=M if known else None,
        block_rows=rows,
    )


def test_a_client_names_the_rows_for_its_calls(
    way: Way, small_blocks: Any, job: Any, halves: Any
) -> None:
    operands, own = job
    rows, expected = halves
    with way.connect(small_blocks, block_rows=rows) as client:
        assert_same(client.gradients(*operands), expected)
        assert_same(client.gradients(*operands, block_rows=0), own)


@pytest.fixture(scope="module")
def automatic() -> Iterator[Any]:
    """A server with large blocks, and a job that asks for smaller ones by itself."""
    operands = oracle.operands(3000, 200, 150)
    with ways.serving_all() as server:
        with ways.STREAM.connect(server) as client:
            expected = client.gradients(*operands, block_rows=512)
        assert expected.receipt.blocks == 6
        yield server, operands, expected


def test_the_rows_of_a_block_that_the_client_chooses_in_every_way(
    way: Way, automatic: Any
) -> None:
    server, operands, expected = automatic
    x, w, dy = operands
    with way.connect(server, block_rows="auto") as client:
        result = client.gradients(*operands)
        assert result.receipt.block_rows == 512
        assert_same(result, expected)
        # Each result alone, too: what is wanted does not decide.
        dw = client.gradients(x, None, dy, results="dw").dw
        assert oracle.same_bits(dw, expected.dw)
        with client.stream(iter([(x, dy)]), w, m=len(x)) as stream:
            blocks = list(stream)
        assert len(blocks) == 6
        assert oracle.same_bits(stream.dw, expected.dw)
        # Without m, the server's own blocks.
        with client.stream(iter([(x, dy)]), w) as stream:
            assert len(list(stream)) == 1


@pytest.mark.big
def test_beside_eight_other_jobs(way: Way, caller_of: Any) -> None:
    """That go the same way, and are of the same client."""
    one = caller_of("sync", way)
    operands = oracle.operands(M, N, K)
    expected = caller_of("sync", ways.COMPUTE).gradients(*operands)
    others = oracle.operands(2000, 50, 40)
    stop = threading.Event()

    def keep_busy() -> None:
        while not stop.is_set():
            one.gradients(*others)

    threads = [threading.Thread(target=keep_busy) for _ in range(8)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(5):
            assert_same(one.gradients(*operands), expected)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
