"""The rows of a block that a job asks for by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwire._api.options import parse_options
from gradwire._core.block_rows import automatic_block_rows
from gradwire._core.job_plan import plan_arrays, read_operands
from gradwire._resilience.replay_buffer import ReplayBuffer
from gradwire._resilience.row_reader import RowReader
from gradwire._resilience.stream_job import StreamJob
from gradwire.v1.job_pb2 import Job
from gradwire_protocol import framing
from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.matrices import Matrix

LEAST_BYTES = 1 << 18


@given(
    st.integers(0, 1 << 40),
    st.integers(1, 1 << 20),
    st.integers(0, 1 << 20),
    st.sampled_from(Dtype),
)
def test_blocks_are_about_an_eighth_of_the_rows_but_not_tiny(
    m: int, n: int, k: int, dtype: Dtype
) -> None:
    rows = automatic_block_rows(m, n, k, dtype)
    row_bytes = max(n, k) * dtype.itemsize
    if not rows:
        # Two blocks would be too small.
        assert m <= 128 or m * row_bytes <= 2 * LEAST_BYTES
        return
    assert rows & (rows - 1) == 0
    assert rows >= 64
    assert rows * row_bytes > LEAST_BYTES - row_bytes
    assert 2 <= -(-m // rows) <= 16
    # It is no larger than it has to be.
    assert rows * 8 <= m or rows // 2 < 64 or rows // 2 * row_bytes < LEAST_BYTES


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((1024, 512, 2048), 128),
        ((2048, 2048, 2048), 256),
        ((1024, 1024, 1024), 128),
        ((1024, 512, 512), 128),
        ((1024, 512, 256), 128),
        ((256, 256, 256), 0),
        ((64, 10**6, 10**6), 0),
        ((0, 5, 5), 0),
        ((None, 1024, 1024), 0),
    ],
)
def test_the_rows_of_some_jobs(shape: Any, rows: int) -> None:
    assert automatic_block_rows(*shape, Dtype.FLOAT32) == rows


def test_a_job_of_arrays_asks_for_them() -> None:
    x, w, dy = (np.ones(s, np.float32) for s in ((4096, 300), (300, 100), (4096, 100)))
    given_: dict[Matrix, object] = {Matrix.X: x, Matrix.W: w, Matrix.DY: dy}
    for asked, expected in (("auto", 512), (64, 64), (np.int64(8), 8), (0, 0)):
        options = parse_options(block_rows=asked)  # type: ignore[arg-type]
        job = plan_arrays(read_operands(given_, options), options)[0].header()
        assert job.block_rows == expected
        assert list(job.required_features) == (["block-rows"] if expected else [])


@pytest.mark.parametrize("m", [None, 20_000])
def test_a_stream_asks_for_the_same_in_every_attempt(m: int | None) -> None:
    """When a stream is tried again, its rows may be known that were not before."""
    reader = RowReader(None, m, parse_options(results="dw", block_rows="auto"))
    item = np.ones((20_000, 40), np.float32), np.ones((20_000, 20), np.float32)
    held = ReplayBuffer(reader, 1 << 30, [item])
    held.add(item)
    job = StreamJob(reader.plan(held.first), None, held)
    asked = []
    for _ in range(2):
        opening = framing.decode_request(job.begin().opening())
        assert isinstance(opening, Job)
        asked.append((opening.HasField("m"), opening.block_rows))
        row = 0
        while (batch := held.batch(row)) is not None:
            row += next(iter(batch.values())).rows
        held.complete = True
    rows = 0 if m is None else 2048
    assert asked == [(m is not None, rows), (True, rows)]
