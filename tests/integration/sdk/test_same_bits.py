"""One job gives the same bits, however it travels."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from gradwire.wire.limits import MIB
from tests import oracle
from tests.integration.sdk.callers import SyncCaller

M, N, K = 211, 30, 20


@pytest.fixture(scope="module", params=oracle.DTYPES)
def job(request: pytest.FixtureRequest, sync_caller: SyncCaller) -> Any:
    """A job of many row blocks, the last one short, and its results."""
    operands = oracle.operands(M, N, K, request.param)
    sync_caller.tune(unary=True)
    result = sync_caller.gradients(*operands)
    sync_caller.tune()
    assert result.receipt.blocks > 2
    assert M % result.receipt.block_rows
    return operands, result


def assert_same(actual: Any, expected: Any) -> None:
    for name, one, other in zip(("y", "dx", "dw"), actual, expected, strict=True):
        assert oracle.same_bits(one, other), name


@pytest.mark.parametrize(
    "tuning",
    [
        {"unary": True},
        {"unary": False},
        {"unary": False, "chunk_bytes": 50},
        {"unary": False, "chunk_bytes": 4095},
        {"unary": False, "chunk_bytes": 4 * MIB},
    ],
    ids=str,
)
def test_in_one_message_or_in_many_of_any_size(
    caller: Any, job: Any, tuning: dict[str, Any]
) -> None:
    operands, expected = job
    caller.tune(**tuning)
    assert_same(caller.gradients(*operands), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_one_element_at_a_time(caller: Any, dtype: str) -> None:
    operands = oracle.operands(101, 7, 5, dtype)
    expected = caller.gradients(*operands)
    caller.tune(unary=False, chunk_bytes=1)
    assert_same(caller.gradients(*operands), expected)


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


@pytest.mark.parametrize("known", [True, False], ids=["known m", "unknown m"])
@pytest.mark.parametrize(
    "arrival", [[M], [1], [1, 0, 7, 64], [63]], ids=["whole", "rows", "uneven", "63"]
)
@pytest.mark.parametrize("pace", ["fast", "slow"])
def test_as_a_stream_of_rows_however_they_arrive(
    caller: Any, job: Any, known: bool, arrival: list[int], pace: str
) -> None:
    (x, w, dy), expected = job
    rows = parts(x, dy, arrival)
    blocks, dw, receipt = caller.stream(
        rows if pace == "fast" else slowly(rows), w, m=M if known else None
    )
    assert [block.first_row for block in blocks] == list(
        range(0, M, receipt.block_rows)
    )
    y = np.concatenate([block.y for block in blocks])
    dx = np.concatenate([block.dx for block in blocks])
    assert_same((y, dx, dw), expected)


def test_beside_eight_other_jobs(small_blocks: Any, job: Any) -> None:
    import threading

    import gradwire

    operands, expected = job
    others = oracle.operands(2000, 50, 40)
    stop = threading.Event()
    with gradwire.connect(small_blocks.address) as client:

        def keep_busy() -> None:
            while not stop.is_set():
                client.gradients(*others)

        threads = [threading.Thread(target=keep_busy) for _ in range(8)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(5):
                assert_same(client.gradients(*operands), expected)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
