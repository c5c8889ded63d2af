"""The server reads as many row blocks as it says, though its client reads nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from gradwire.v1 import gradient_service_pb2 as service_pb2
from gradwire.v1 import job_pb2
from gradwire_server import Server, Settings
from gradwire_server.observability.timeline import Stage
from tests.support import raw
from tests.support.raw import whole_numbers

B, BLOCKS = 128, 40
WINDOW_BYTES = 1 << 16
"""Bytes that gRPC takes from the server for a client that does not read."""
TIMEOUT_S = 20.0


class Reading:
    """A server, and what it has read of its only job."""

    def __init__(self) -> None:
        self.channel: grpc.aio.Channel
        self._events: dict[int | None, int] = {}
        self._changed = asyncio.Event()

    def observe(self, job: str, stage: Stage, block: int | None) -> None:
        if stage is Stage.RECEIVING:
            self._events[block] = self._events.get(block, 0) + 1
            self._changed.set()

    def has_begun(self, block: int) -> bool:
        return block in self._events

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    @asynccontextmanager
    async def job(self, problem: raw.Problem, **options: Any) -> AsyncIterator[Any]:
        """A call up to Accepted, and its credit; nothing more is read."""
        method = self.channel.stream_stream(f"/{raw.SERVICE}/ComputeStream")
        call = method(timeout=TIMEOUT_S)
        job = problem.job(block_rows=B, max_chunk_bytes=WINDOW_BYTES, **options)
        await call.write(raw.Request(job=job).SerializeToString())
        answer = service_pb2.ComputeStreamResponse.FromString(await call.read())
        assert answer.accepted.block_rows == B

        async def send() -> None:
            for message in problem.body(B, 1 << 15):
                await call.write(message.SerializeToString())

        sending = asyncio.ensure_future(send())
        try:
            yield answer.accepted.credit_blocks
        finally:
            sending.cancel()
            call.cancel()


@pytest.fixture
async def reading() -> AsyncIterator[Reading]:
    seen = Reading()
    settings = Settings(
        listen=("127.0.0.1:0",), backend="numpy", row_block_bytes=1 << 20
    )
    options = (
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
    )
    async with (
        Server(settings, observe=seen.observe) as server,
        grpc.aio.insecure_channel(server.addresses[0], options) as channel,
    ):
        seen.channel = channel
        yield seen


@pytest.mark.parametrize("results", [("y",), ("y", "dx", "dw")])
async def test_it_reads_the_blocks_of_its_credit(
    reading: Reading, results: tuple[str, ...]
) -> None:
    problem = whole_numbers(B * BLOCKS, 128, 512, results=results)
    async with reading.job(problem) as credit:
        assert 3 <= credit < BLOCKS
        await reading.until(lambda: reading.has_begun(credit - 1))


async def test_it_reads_all_rows_of_a_job_without_results_of_rows(
    reading: Reading,
) -> None:
    """Not even a checkpoint that nobody reads keeps it from that."""
    problem = whole_numbers(B * BLOCKS, 128, 128, results=("dw",))
    checkpoints = job_pb2.Checkpoints(rows=B)
    async with reading.job(problem, checkpoints=checkpoints):
        await reading.until(lambda: reading.has_begun(BLOCKS - 1))


async def test_it_reads_two_segments_whose_sums_nobody_reads(reading: Reading) -> None:
    segment = 8
    numerics = job_pb2.Numerics(dw_segment_rows=segment * B)
    problem = whole_numbers(B * BLOCKS, 128, 512, results=("dw",))
    async with reading.job(problem, numerics=numerics, segment_sums=True):
        await reading.until(lambda: reading.has_begun(2 * segment - 1))
