"""While a row block is computed the next arrives and the last leaves."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import gradwire
from bench import trace
from bench.links.relay import Link
from bench.report.timeline import Event, Timeline
from gradwire._client.job_factory import Tuning
from gradwire_server import Server, Settings
from gradwire_server.backends.base import RowBlock
from gradwire_server.backends.numpy.backend import NumpyBackend
from gradwire_server.observability.timeline import Stage
from tests.support import oracle

COMPUTING_S = 0.1
ATTEMPTS = 3
BLOCKS = 16
N = K = 128
ROW_BLOCK_BYTES = 1 << 21


class PacedBackend(NumpyBackend):
    """NumPy, but that a row block takes at least so long, as on a slower device.

    Then what overlaps does not depend on how fast the tests' machine is.
    """

    def open_job(self, *args: Any, **kwargs: Any) -> Any:
        return _PacedJob(super().open_job(*args, **kwargs))


class _PacedJob:
    def __init__(self, job: Any) -> None:
        self._job = job
        self.take_w, self.finish = job.take_w, job.finish
        self.close = job.close

    def compute_block(self, block: RowBlock) -> None:
        until = time.monotonic() + COMPUTING_S
        self._job.compute_block(block)
        time.sleep(max(0, until - time.monotonic()))


@contextmanager
def observed_server(directory: Path, seen: dict[str, list[Event]]) -> Iterator[str]:
    """The address of a server that computes at that pace and is looked at."""

    def observe(job: str, stage: Stage, block: int | None) -> None:
        seen.setdefault(job, []).append((time.perf_counter(), stage.value, block))

    settings = Settings(
        listen=(f"unix:{directory}/socket",),
        row_block_bytes=ROW_BLOCK_BYTES,
        keep_memory=False,
    )
    server = Server(settings, PacedBackend(), observe)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(server.start(), loop).result(30)
        yield server.addresses[0]
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.mark.thorough
def test_stages_of_a_balanced_job_overlap(tmp_path: Path) -> None:
    rows = ROW_BLOCK_BYTES // (4 * (N + K))
    x, w, dy = oracle.operands(BLOCKS * rows, N, K)
    seen: dict[str, list[Event]] = {}
    shares = []
    with (
        observed_server(tmp_path, seen) as address,
        # A block takes a little longer on the link than its products: were the
        # link the faster one, operands would come further ahead than one block.
        Link(address, ROW_BLOCK_BYTES / (1.25 * COMPUTING_S)) as link,
        gradwire.connect(link.address, timeout_s=60) as client,
    ):
        # Small messages, so that a block's first and last are seen apart.
        client._engine.jobs.tuning = Tuning(chunk_bytes=1 << 16)
        # Others may take the processor away for a while, but not every time.
        while len(shares) < ATTEMPTS and max(shares, default=0.0) < 0.8:
            result = client.gradients(x, w, dy)
            assert result.receipt.blocks == BLOCKS
            timeline = Timeline.of(seen[result.receipt.job_id])
            assert timeline.count == BLOCKS
            assert timeline.w is not None
            assert timeline.dw is not None
            met, of = timeline.overlapped()
            assert of == BLOCKS - 2
            shares.append(met / of)
    oracle.assert_right(result, x, w, dy, "float32")
    # What the server sees of receiving and sending is a part of them: bytes
    # are under way before it takes them in and after it has handed them over.
    assert max(shares) >= 0.8


def test_without_rows_or_results_nothing_is_seen_of_them(tmp_path: Path) -> None:
    x, w, _ = oracle.operands(0, N, K)
    seen: dict[str, list[Event]] = {}
    with (
        observed_server(tmp_path, seen) as address,
        gradwire.connect(address) as client,
    ):
        client._engine.jobs.tuning = Tuning(unary=False)
        receipt = client.gradients(x, w, None, results="y").receipt
    timeline = Timeline.of(seen[receipt.job_id])
    assert timeline.count == 0
    assert timeline.w is not None
    assert timeline.dw is None


def test_the_trace_is_written_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    sizes = ("--columns", "32x64", "--row-block-bytes", "65536", "--blocks", "5")
    assert trace.main([*sizes, "--rate", "0.1", "--out", str(tmp_path)]) == 0
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {event["name"] for event in events if event["ph"] == "X"}
    assert names == {"W", "dW", *(f"block {number}" for number in range(5))}
    assert "</svg>" in (tmp_path / "trace.svg").read_text()
    printed = capsys.readouterr().out
    assert "640x32x64: 5 row blocks of 128, over a link of 0.10 Gbit/s" in printed
    assert "of 3 row blocks" in printed
