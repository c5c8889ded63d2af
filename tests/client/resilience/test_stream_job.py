from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gradwire
from gradwire._api.options import parse_options
from gradwire._client._sync.engine import stream_messages
from gradwire._client._sync.row_source import SyncRowSource
from gradwire._resilience.replay_buffer import ReplayBuffer
from gradwire._resilience.row_reader import RowReader
from gradwire._resilience.stream_job import StreamJob
from gradwire_protocol.matrices import Matrix
from tests.client.core.fake_server import FakeServer, converse
from tests.support import oracle

X, W, DY = oracle.operands(5, 3, 2)
ALL = ("y", "dx", "dw")


def reader(w: Any = W, m: Any = None, **options: Any) -> RowReader:
    return RowReader(w, m, parse_options(**{"results": ALL} | options))


def run(items: list[Any], w: Any = W, server: FakeServer | None = None, **options: Any):
    read = reader(w, **options)
    held = ReplayBuffer(read)
    drawn = SyncRowSource(iter(items), held)
    drawn.fetch(0)
    job = StreamJob(read.plan(held.first), read.w, held)
    messages = stream_messages(job, job.begin(), drawn.batches(0))
    blocks = []
    for answer in converse(job.exchange, messages, server or FakeServer()):
        job.receive(answer)
        while job.ready:
            blocks.append(job.ready.popleft())
    job.finish()
    return job, [*blocks, *job.ready]


@pytest.mark.parametrize("kind", [tuple, list])
def test_a_pair_may_be_a_list_as_loaders_give_it(kind: Any) -> None:
    for results in (ALL, ("y",)):
        _, blocks = run([kind([X, DY])], results=results)
        assert sum(len(block) for block in blocks) == len(X)
    two_rows = list(X[:2])  # and no pair
    _, blocks = run([two_rows], results=("y",))
    assert [len(block) for block in blocks] == [2]


@given(
    sizes=st.lists(st.integers(0, 6), max_size=5),
    n=st.integers(0, 3),
    k=st.integers(0, 3),
    results=st.sampled_from([("y",), ("dx",), ("dw",), ("y", "dx"), ALL]),
    block_rows=st.integers(1, 4),
    known=st.booleans(),
)
def test_row_blocks_come_back_in_order_and_whole(
    sizes: list[int], n: int, k: int, results: Any, block_rows: int, known: bool
) -> None:
    m = sum(sizes)
    x, w, dy = oracle.operands(m, n, k, "float64")
    ends = np.cumsum(sizes, dtype=int)
    items = [(x[e - s : e], dy[e - s : e]) for s, e in zip(sizes, ends, strict=True)]
    job, blocks = run(
        items,
        w,
        FakeServer(block_rows, 2 * block_rows),
        results=results,
        m=m if known else None,
    )
    rows = set(results) & {"y", "dx"}
    starts = range(0, m, block_rows) if rows else ()
    assert [block.first_row for block in blocks] == list(starts)
    expected = oracle.exact(x, w, dy)
    for block in blocks:
        where = slice(block.first_row, block.first_row + block_rows)
        assert len(block) == len(expected["y"][where])
        for name in ("y", "dx"):
            part = getattr(block, name)
            assert (part is not None) == (name in results)
            if part is not None:
                assert np.allclose(part, expected[name][where])
    assert [matrix.label for matrix in job.sums] == [r for r in results if r == "dw"]
    for matrix, array in job.sums.items():
        assert np.allclose(array, expected[matrix.label])
    assert job.receipt is not None
    assert job.receipt.m == m


@pytest.mark.parametrize(
    ("results", "item"),
    [
        ("y", (X, None)),
        ("y", X),
        ("dx", (None, DY)),
        ("dx", DY),
        ("y", (X, DY)),
        ("y", X.tolist()),
    ],
)
def test_what_is_not_needed_may_be_left_out(results: str, item: Any) -> None:
    dtype = "float64" if isinstance(item, list) else "float32"
    _, blocks = run([item], W.astype(dtype), results=results)
    assert sum(len(block) for block in blocks) == 5


def test_no_rows_at_all_give_empty_results() -> None:
    job, blocks = run([])
    assert blocks == []
    dw = job.sums[Matrix.DW]
    assert not dw.any()
    assert dw.shape == (3, 2)


@pytest.mark.parametrize(
    ("items", "w", "options", "says"),
    [
        ([], None, {"results": "dw"}, "rows is empty and w is None"),
        (
            [X],
            W,
            {},
            "item 0 of rows: it is a ndarray: expected a pair (x_rows, dy_rows)",
        ),
        ([[X, DY, DY]], W, {}, "item 0 of rows: it is a list: expected a pair"),
        ([(X, DY, DY)], W, {}, "item 0 of rows: it is a tuple: expected a pair"),
        (
            [(X, None)],
            W,
            {},
            "item 0 of rows: dy's rows are None, but needed for y and dx and dw",
        ),
        (
            [(X, DY[:4])],
            W,
            {},
            "item 0 of rows: x has shape (5, 3) and dy (4, 2): x's rows (5) must equal",
        ),
        (
            [(X, DY), (X[:, :2], DY)],
            W,
            {},
            "item 1 of rows: x has shape (5, 2) and w (3, 2): x's columns (2) must",
        ),
        (
            [(X, DY), (X, DY), (X.astype("f8"), DY.astype("f8"))],
            W,
            {},
            "item 2 of rows: x is float64 and w is float32",
        ),
        (
            [(X[0], DY[0])],
            W,
            {},
            "item 0 of rows: x has shape (3,): expected at least two dimensions",
        ),
        (
            [(X[None], DY[None])],
            W,
            {},
            "item 0 of rows: x has shape (1, 5, 3): expected two dimensions",
        ),
        (
            [(X, DY), (X[:, :2], DY)],
            None,
            {"results": "dw"},
            "item 1 of rows has n = 2: expected n = 3",
        ),
        (
            [(X, DY), (X, DY[:, :1])],
            None,
            {"results": "dw"},
            "item 1 of rows has k = 1: expected k = 2",
        ),
        (
            [(X, DY), (X.astype("f8"), DY.astype("f8"))],
            None,
            {"results": "dw"},
            "item 1 of rows has float64: expected float32",
        ),
        ([(X, DY)], None, {}, "y needs x and w, but w is None"),
        ([(X, DY)], W, {"m": -1}, "m is -1: expected an integer of at least 0"),
        ([(X, DY)], W, {"m": 2.5}, "m is 2.5: expected an integer of at least 0"),
        (
            [(X, DY)],
            W,
            {"m": 2**70},
            f"m is {2**70}: expected at most {2**63 - 1}",
        ),
        ([(X, DY)], W, {"m": 4}, "rows has at least 5 rows: expected m = 4"),
        ([(X, DY)], W, {"m": 6}, "rows has 5 rows: expected m = 6"),
    ],
)
def test_items_that_cannot_be_are_refused_by_their_number(
    items: Any, w: Any, options: Any, says: str
) -> None:
    with pytest.raises(gradwire.InputError) as refused:
        run(items, w, **options)
    assert says in str(refused.value)
