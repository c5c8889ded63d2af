"""A device that computes for longer than a client may be idle."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

import gradwire
from gradwire._client.job_factory import Tuning
from gradwire_server.backends.numpy.backend import NumpyBackend
from gradwire_server.jobs.stream.pipeline import RowBlockPipeline
from tests.support import oracle
from tests.support.in_process import serving

IDLE_S = 0.3
BLOCK_S = 0.6


@pytest.mark.parametrize("transport", ["grpc", "direct"])
def test_a_client_that_waits_for_its_results_is_not_idle(
    transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = RowBlockPipeline.compute

    def slow(self: Any, number: int, block: Any) -> Any:
        time.sleep(BLOCK_S)
        return right(self, number, block)

    monkeypatch.setattr(RowBlockPipeline, "compute", slow)
    x, w, dy = oracle.operands(48, 8, 4, "float32")
    with (
        serving(NumpyBackend(), idle_timeout=IDLE_S, row_block_bytes=16 * 48) as server,
        gradwire.connect(
            server.addresses[0], transport=transport, retries=False
        ) as client,
    ):
        client._engine.jobs.tuning = Tuning(unary=False)
        result = client.gradients(x, w, dy)
    assert result.receipt.blocks == 3
    assert result.receipt.total_s > 3 * BLOCK_S
    np.testing.assert_array_equal(result.y, x @ w)
