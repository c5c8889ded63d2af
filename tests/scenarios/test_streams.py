"""Streams of rows: what a caller may rely on while they run."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import resource
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import gradwire
from tests.scenarios.ways import Way
from tests.support import oracle
from tests.support.serving import ServerProcess

X, W, DY = oracle.operands(400, 30, 20)


def pairs(count: int = 400, step: int = 10) -> Iterator[Any]:
    for row in range(0, count, step):
        yield X[row : row + step], DY[row : row + step]


def endless() -> Iterator[Any]:
    while True:
        yield X, DY


def outcome(server: ServerProcess, job_id: str) -> str:
    """How the server says that a job ended, once it says so."""
    record = server.wait_for_log(
        lambda r: r.get("job_id") == job_id and r["message"] == "job"
    )
    return str(record["outcome"])


def test_results_come_while_rows_are_still_missing(
    stream_client: gradwire.Client,
) -> None:
    first_is_back = threading.Event()

    def rows() -> Iterator[Any]:
        yield X, DY
        assert first_is_back.wait(30)
        yield X, DY

    seen = []
    with stream_client.stream(rows(), W) as stream:
        for block in stream:
            first_is_back.set()
            seen.append(block.first_row)
    assert seen[0] == 0
    assert len(seen) == stream.receipt.blocks


async def test_async_rows_are_awaited_while_results_come(
    small_blocks: ServerProcess, stream_way: Way
) -> None:
    first_is_back = asyncio.Event()

    async def rows() -> AsyncIterator[Any]:
        yield X, DY
        await asyncio.wait_for(first_is_back.wait(), 30)
        yield X, DY

    async with stream_way.async_client(small_blocks) as client:
        stream = client.stream(rows(), W)
        async for _ in stream:
            first_is_back.set()
        assert stream.receipt.m == 800
        oracle.assert_right(
            gradwire.Gradients(None, None, stream.dw, stream.receipt),
            np.vstack([X, X]),
            W,
            np.vstack([DY, DY]),
            "float32",
        )


def test_threads_that_share_a_stream_share_its_blocks(
    stream_client: gradwire.Client,
) -> None:
    start = threading.Barrier(4)

    def take(stream: gradwire.GradientStream) -> list[gradwire.RowBlock]:
        start.wait()
        return list(stream)

    for _ in range(5):
        with (
            stream_client.stream(pairs(), W) as stream,
            ThreadPoolExecutor(4) as pool,
        ):
            shares = [pool.submit(take, stream) for _ in range(4)]
            blocks = [block for share in shares for block in share.result(60)]
        firsts = sorted(block.first_row for block in blocks)
        assert firsts == list(range(0, 400, stream.receipt.block_rows))


async def test_coroutines_that_share_a_stream_share_its_blocks(
    small_blocks: ServerProcess, stream_way: Way
) -> None:
    async def rows() -> AsyncIterator[Any]:
        for pair in pairs():
            await asyncio.sleep(0)
            yield pair

    async def take(stream: gradwire.AsyncGradientStream) -> list[gradwire.RowBlock]:
        return [block async for block in stream]

    async with (
        stream_way.async_client(small_blocks) as client,
        client.stream(rows(), W) as stream,
    ):
        shares = await asyncio.gather(*(take(stream) for _ in range(4)))
    firsts = sorted(block.first_row for share in shares for block in share)
    assert firsts == list(range(0, 400, stream.receipt.block_rows))


@pytest.mark.parametrize("results", ["y", "dx", "dw", ("y", "dw")])
def test_a_stream_of_some_results(streamer: Any, results: Any) -> None:
    blocks, dw, receipt = streamer.stream(pairs(), W, results=results)
    expected = oracle.exact(X, W, DY)
    allowed = oracle.bounds(X, W, DY, "float32")
    for name in ("y", "dx"):
        parts = [getattr(block, name) for block in blocks]
        if name in results:
            error = np.abs(np.concatenate(parts) - expected[name])
            assert (error <= allowed[name]).all()
        else:
            assert parts == [None] * len(blocks)
    assert (dw is not None) == ("dw" in results)
    assert bool(blocks) == (results != "dw")
    assert receipt.m == 400


def test_no_rows_at_all(streamer: Any) -> None:
    blocks, dw, receipt = streamer.stream([], W)
    assert blocks == []
    assert dw.shape == W.shape
    assert not dw.any()
    assert receipt.m == 0


def test_memory_stays_flat_however_many_rows_there_are(server_address: str) -> None:
    rows = (np.ones((4000, 32), "f4"), np.ones((4000, 32), "f4"))
    w = np.ones((32, 32), "f4")

    def consume(count: int) -> None:
        with (
            gradwire.connect(server_address) as client,
            client.stream((rows for _ in range(count)), w) as stream,
        ):
            for block in stream:
                assert block.y is not None
        assert stream.dw is not None
        assert (stream.dw == 4000 * count).all()

    consume(50)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    consume(200)  # 205 MB each way
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 48 * 1024


def test_dw_is_there_only_at_the_end(stream_client: gradwire.Client) -> None:
    stream = stream_client.stream(pairs(), W)
    with pytest.raises(gradwire.ClientStateError, match="once the stream is exhausted"):
        _ = stream.dw
    next(stream)
    with pytest.raises(gradwire.ClientStateError, match="once the stream is exhausted"):
        _ = stream.receipt
    assert sum(len(block) for block in stream) > 0
    assert stream.dw is not None
    assert next(stream, None) is None


def test_nothing_is_sent_before_the_stream_is_iterated(
    client: gradwire.Client,
) -> None:
    asked = []

    def rows() -> Iterator[Any]:
        asked.append(True)
        yield X, DY

    stream = client.stream(rows(), W)
    assert asked == []
    stream.close()
    assert list(stream) == []
    assert asked == []


LEAVE: dict[str, Any] = {}


def leaving(function: Any) -> Any:
    LEAVE[function.__name__] = function
    return function


@leaving
def by_break(client: gradwire.Client, **options: Any) -> None:
    for _ in client.stream(endless(), W, **options):
        break


@leaving
def by_an_exception(client: gradwire.Client, **options: Any) -> None:
    def fail() -> None:
        for _ in client.stream(endless(), W, **options):
            raise KeyError("the caller's own")

    with pytest.raises(KeyError):
        fail()


@leaving
def by_close(client: gradwire.Client, **options: Any) -> None:
    stream = client.stream(endless(), W, **options)
    next(stream)
    stream.close()
    assert list(stream) == []


@leaving
def by_the_end_of_with(client: gradwire.Client, **options: Any) -> None:
    with client.stream(endless(), W, **options) as stream:
        next(stream)


@leaving
def by_garbage_collection(client: gradwire.Client, **options: Any) -> None:
    stream = client.stream(endless(), W, **options)
    next(stream)
    ring: list[Any] = [stream]
    ring.append(ring)
    del stream, ring
    gc.collect()


def test_a_stream_that_another_thread_closes_is_over(
    stream_client: gradwire.Client,
) -> None:
    drawn, enough = threading.Event(), threading.Event()

    def rows() -> Iterator[Any]:
        yield X, DY
        drawn.set()
        enough.wait(20)

    stream = stream_client.stream(rows(), W)

    def close() -> None:
        drawn.wait(20)
        stream.close()
        enough.set()

    closing = threading.Thread(target=close)
    closing.start()
    # Closed between two blocks, or while one is waited for.
    with contextlib.suppress(gradwire.JobCancelledError):
        for _ in stream:
            pass
    closing.join()
    with pytest.raises(gradwire.ClientStateError):
        _ = stream.receipt


async def test_a_cancelled_coroutine_cancels_its_job(
    small_blocks: ServerProcess, stream_way: Way
) -> None:
    job_id = f"cancelled {stream_way}"
    async with stream_way.async_client(small_blocks) as client:
        stream = client.stream(endless(), W, request_id=job_id)

        async def use() -> None:
            async with stream:
                async for _ in stream:
                    pass

        task = asyncio.create_task(use())
        await anext(aiter(stream), None)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(outcome, small_blocks, job_id) == "CANCELLED"


def test_a_deadline_ends_a_stream_whatever_it_is_doing(streamer: Any) -> None:
    for _ in range(10):
        with pytest.raises(gradwire.DeadlineError):
            streamer.stream(endless(), W, timeout_s=0.05)


@pytest.mark.parametrize("leave", LEAVE)
def test_leaving_a_stream_early_cancels_its_job(
    small_blocks: ServerProcess,
    stream_way: Way,
    stream_client: gradwire.Client,
    leave: str,
) -> None:
    job_id = f"left {leave} {stream_way}"
    LEAVE[leave](stream_client, request_id=job_id)
    assert outcome(small_blocks, job_id) == "CANCELLED"


@pytest.mark.parametrize("leave", ["break", "aclose", "with", "collected"])
async def test_leaving_an_async_stream_early_cancels_its_job(
    small_blocks: ServerProcess, stream_way: Way, leave: str
) -> None:
    job_id = f"left async {leave} {stream_way}"
    async with stream_way.async_client(small_blocks) as client:
        stream = client.stream(endless(), W, request_id=job_id)
        match leave:
            case "break":
                async for _ in stream:
                    break
            case "aclose":
                await anext(stream)
                await stream.aclose()
            case "with":
                async with stream:
                    await anext(stream)
            case "collected":
                await anext(stream)
        del stream
        gc.collect()
        ended = await asyncio.to_thread(outcome, small_blocks, job_id)
        assert ended == "CANCELLED"


class OwnError(Exception):
    pass


def failing_rows(after: int, error: Exception) -> Iterator[Any]:
    for _ in range(after):
        yield X, DY
    raise error


@pytest.mark.parametrize("after", [0, 1, 3])
# The second one is of another call, which the rows come from. It says nothing of this
# call, which is not tried again.
@pytest.mark.parametrize("kind", [OwnError, gradwire.ConnectionLostError])
def test_what_the_callers_iterable_raises_is_raised_unchanged(
    streamer: Any, small_blocks: ServerProcess, after: int, kind: type[Exception]
) -> None:
    job_id = f"{kind.__name__} {after} {type(streamer).__name__} {streamer.way}"
    error = kind("no more")
    with pytest.raises(kind, match="no more") as raised:
        streamer.stream(failing_rows(after, error), W, request_id=job_id)
    assert raised.value is error
    if after:
        assert outcome(small_blocks, job_id) == "CANCELLED"
        records = small_blocks.records
        assert len([each for each in records if each.get("job_id") == job_id]) == 1
    # The client is as good as before.
    assert streamer.stream(pairs(), W)[2].m == 400


async def test_what_an_async_iterable_raises_is_raised_unchanged(
    small_blocks: ServerProcess, stream_way: Way
) -> None:
    async def rows() -> AsyncIterator[Any]:
        yield X, DY
        raise OwnError("no more")

    async with stream_way.async_client(small_blocks) as client:
        with pytest.raises(OwnError, match="no more"):
            async for _ in client.stream(rows(), W):
                pass


@pytest.mark.parametrize(
    ("rows", "options", "says"),
    [
        ([(X, DY), (X, DY[:1])], {}, "item 1 of rows: x has shape"),
        (
            [(X, DY), (X, DY)],
            {"m": 700},
            "rows has at least 800 rows: expected m = 700",
        ),
        ([(X, DY)], {"m": 700}, "rows has 400 rows: expected m = 700"),
        ([X], {}, "item 0 of rows: it is a ndarray: expected a pair"),
    ],
)
def test_a_bad_item_ends_the_stream_with_its_number(
    streamer: Any, rows: Any, options: Any, says: str
) -> None:
    with pytest.raises(gradwire.InputError, match=says):
        streamer.stream(rows, W, **options)


def test_rows_that_cannot_be_iterated_are_refused(streamer: Any) -> None:
    with pytest.raises(
        gradwire.InputError, match="rows is a int: expected an iterable"
    ):
        streamer.stream(7, W)


def test_progress_is_told_in_order_and_one_at_a_time(streamer: Any) -> None:
    seen: list[gradwire.Progress] = []
    busy = threading.Lock()

    def on_progress(progress: gradwire.Progress) -> None:
        assert busy.acquire(blocking=False)
        seen.append(progress)
        busy.release()

    streamer.stream(pairs(), W, on_progress=on_progress)
    assert seen[0].m is None
    assert seen[0].bytes_to_send is None
    assert seen[-1] == gradwire.Progress(
        bytes_sent=X.nbytes + W.nbytes + DY.nbytes,
        bytes_to_send=X.nbytes + W.nbytes + DY.nbytes,
        bytes_received=X.nbytes + W.nbytes + DY.nbytes,
        bytes_to_receive=X.nbytes + W.nbytes + DY.nbytes,
        rows_sent=400,
        m=400,
        jobs_ahead=None,
    )
    for name in ("bytes_sent", "bytes_received", "rows_sent"):
        values = [getattr(progress, name) for progress in seen]
        assert values == sorted(values)


def test_what_on_progress_raises_is_raised_unchanged(caller: Any) -> None:
    def on_progress(progress: gradwire.Progress) -> None:
        if progress.bytes_sent:
            raise OwnError("enough")

    with pytest.raises(OwnError, match="enough"):
        caller.gradients(X, W, DY, on_progress=on_progress)
    assert caller.gradients(X, W, DY).receipt.m == 400


async def test_many_streams_on_direct_connections_share_one_event_loop(
    small_blocks: ServerProcess,
) -> None:
    """Each waits in threads of its own: the loop's are fewer than these streams."""

    async def slow_pairs() -> AsyncIterator[Any]:
        for pair in pairs(step=40):
            await asyncio.sleep(0)
            yield pair

    async with gradwire.AsyncClient(
        small_blocks.address, transport="direct", timeout_s=60
    ) as client:

        async def dw() -> Any:
            async with client.stream(slow_pairs(), W) as stream:
                async for _ in stream:
                    pass
            return stream.dw

        first, *others = await asyncio.gather(*(dw() for _ in range(40)))
    assert all(np.array_equal(each, first) for each in others)
