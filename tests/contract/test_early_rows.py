"""Operands that come before their job is accepted, in any language."""

from __future__ import annotations

from typing import Any

import grpc
import numpy as np
import pytest

from tests.support import raw
from tests.support.raw import Stream, whole_numbers


def early_bytes(channel: grpc.Channel) -> int:
    info = raw.server_info(channel)
    assert "early-rows" in info.features
    return info.limits.early_bytes


@pytest.mark.parametrize("block_rows", [0, 1, 4])
@pytest.mark.parametrize(("n", "k"), [(1, 9), (9, 1), (3, 3), (0, 5)])
def test_one_operand_may_be_ahead_by_what_fits(
    channel: grpc.Channel, n: int, k: int, block_rows: int
) -> None:
    """Whatever the row blocks are, which the client cannot know."""
    most = early_bytes(channel)
    w_bytes, row_bytes = 4 * n * k, 4 * (n + k)
    ahead = (most - w_bytes) // row_bytes
    assert ahead > 0
    problem = whole_numbers(3 * ahead, n, k)
    options: Any = {"block_rows": block_rows} if block_rows else {}
    with Stream(channel) as stream:
        stream.send(problem.job(**options), *problem.chunks("w", 0, n))
        for name in ("x", "dy"):
            stream.send(*problem.chunks(name, 0, ahead))
        outcome = stream.receive_accepted()
        rest = outcome.accepted.block_rows
        for first in range(ahead, 3 * ahead, rest):
            for name in ("x", "dy"):
                stream.send(*problem.chunks(name, first, min(first + rest, 3 * ahead)))
        stream.send(raw.end(3 * ahead))
        stream.half_close()
        stream.receive_results(outcome)
    for name, expected in problem.expected().items():
        if expected.size:
            np.testing.assert_array_equal(outcome.arrays[name], expected)


def test_a_whole_job_may_come_before_it_is_accepted(channel: grpc.Channel) -> None:
    problem = whole_numbers(4, 3, 2)
    with Stream(channel) as stream:
        stream.send(problem.job(), *problem.body(1))
        stream.half_close()
        outcome = stream.receive_results(stream.receive_accepted())
    for name, expected in problem.expected().items():
        np.testing.assert_array_equal(outcome.arrays[name], expected)
