"""Streams whose rows come once have checkpoints that nobody requested."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import gradwire
from gradwire._api.options import parse_options
from gradwire._client.job_factory import JobFactory
from gradwire._resilience.row_reader import RowReader
from gradwire.v1.job_pb2 import Job
from gradwire_protocol import framing
from gradwire_protocol.limits import MIB, RESUME


@pytest.mark.parametrize(
    ("columns", "options", "apart_mib"),
    [
        (256, {}, 16),
        (1024, {}, 64),
        (1040, {}, None),
        (1040, {"dw_accumulator": "float32"}, 33.01),
        (1040, {"wire_dtype": "bfloat16"}, 33.01),
        (1024, {"checkpoint_rows": 7}, 7 * 2 * 1024 * 4 / MIB),
    ],
)
def test_they_are_as_far_apart_as_the_sum_is_large(
    columns: int, options: dict[str, Any], apart_mib: float | None
) -> None:
    """8 times its bytes, in the dtype of the sum, and at most 64 MiB."""
    policy = gradwire.RetryPolicy()
    factory = JobFactory(policy, None, None, (), lambda _: None)
    factory.features = frozenset({RESUME})
    reader = RowReader(None, None, parse_options(results="dw", **options))
    rows = factory.replay_buffer(reader, iter(()))
    row = np.ones((1, columns), np.float32)
    rows.add((row, row))
    job = factory.stream_job(reader, rows)
    opening = framing.decode_request(job.begin().opening())
    assert isinstance(opening, Job)
    row_bytes = 2 * columns * (2 if "wire_dtype" in options else 4)
    apart = opening.checkpoints.rows * row_bytes
    assert opening.HasField("checkpoints")
    assert apart == pytest.approx((apart_mib or 0) * MIB, rel=1e-3)
