"""Jobs over several connections: the same bits, and the same failures."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import gradwire
from gradwire._base import Tuning
from tests.integration.sdk.callers import AsyncCaller, SyncCaller
from tests.serving import ServerProcess, running_server

CALLERS = {"sync": SyncCaller, "async": AsyncCaller}
SHAPES = [
    pytest.param(1000, 30, 20, id="many-blocks"),
    pytest.param(40, 30, 20, id="fewer-blocks-than-channels"),
    pytest.param(0, 30, 20, id="no-rows"),
    pytest.param(129, 30, 20, id="a-last-block-of-one-row"),
    pytest.param(500, 0, 20, id="rows-of-x-without-elements"),
]
WANTED = [("y", "dx", "dw"), ("y",), ("dx",), ("dw",)]


@pytest.fixture(params=list(itertools.product(CALLERS, (2, 3, 4))), ids=str)
def spread(
    request: pytest.FixtureRequest, small_blocks: ServerProcess
) -> Iterator[Any]:
    """Each client over several connections, for small jobs too."""
    kind, channels = request.param
    caller = CALLERS[kind](small_blocks.address, channels=channels)
    caller.tune(unary=False, chunk_bytes=1024)
    caller.channels = channels
    yield caller
    caller.close()


def operands(m: int, n: int, k: int) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(0)
    return tuple(
        rng.standard_normal(shape, np.float32) for shape in ((m, n), (n, k), (m, k))
    )


def pieces(x: Any, dy: Any, rows: int) -> Iterator[Any]:
    for first in range(0, len(x), rows):
        yield x[first : first + rows], dy[first : first + rows]


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_a_job_has_the_same_bits_over_any_number_of_channels(
    client: gradwire.Client, spread: Any, m: int, n: int, k: int
) -> None:
    x, w, dy = operands(m, n, k)
    for results in WANTED:
        expected = client.gradients(x, w, dy, results=results)
        actual = spread.gradients(x, w, dy, results=results, checksum=True)
        assert actual.receipt.connections == spread.channels
        for one, other in zip(expected, actual, strict=True):
            assert (one is None) == (other is None)
            assert one is None or one.tobytes() == other.tobytes()


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("rows", [7, 64, 1000])
def test_a_stream_has_the_same_bits_over_any_number_of_channels(
    client: gradwire.Client, spread: Any, known: bool, rows: int
) -> None:
    x, w, dy = operands(777, 30, 20)
    y, dx, dw = client.gradients(x, w, dy)
    m = 777 if known else None
    blocks, streamed_dw, receipt = spread.stream(pieces(x, dy, rows), w, m=m)
    assert receipt.connections == spread.channels
    firsts = [block.first_row for block in blocks]
    assert firsts == sorted(firsts)
    assert np.concatenate([block.y for block in blocks]).tobytes() == y.tobytes()
    assert np.concatenate([block.dx for block in blocks]).tobytes() == dx.tobytes()
    assert streamed_dw.tobytes() == dw.tobytes()


def test_results_go_where_out_says_in_any_layout(
    client: gradwire.Client, spread: Any
) -> None:
    x, w, dy = operands(777, 30, 20)
    expected = client.gradients(x, w, dy)
    out = tuple(np.empty(each.shape, each.dtype, order="F") for each in expected)
    spread.gradients(x, w, dy, out=out)
    for one, other in zip(expected, out, strict=True):
        assert np.array_equal(one, other)


def test_small_jobs_take_one_connection(small_blocks: ServerProcess) -> None:
    x, w, dy = operands(50, 30, 20)
    with gradwire.connect(small_blocks.address, channels=4) as client:
        assert client.gradients(x, w, dy).receipt.connections == 1


@pytest.mark.parametrize("kind", CALLERS)
def test_a_job_in_shared_memory_takes_one_connection_and_a_stream_many(
    kind: str,
) -> None:
    x, w, dy = operands(300, 30, 20)
    with running_server(allow_shared_memory=True, block_bytes=4096) as server:
        caller = CALLERS[kind](server.address, channels=3, transport="shm")
        shared = caller.gradients(x, w, dy)
        blocks, dw, receipt = caller.stream(pieces(x, dy, 100), w)
        caller.close()
    assert (shared.receipt.transport, shared.receipt.connections) == ("shm", 1)
    assert (receipt.transport, receipt.connections) == ("tcp", 3)
    assert dw.tobytes() == shared.dw.tobytes()
    assert np.concatenate([b.y for b in blocks]).tobytes() == shared.y.tobytes()


def test_many_jobs_share_a_clients_channels(
    client: gradwire.Client, small_blocks: ServerProcess
) -> None:
    jobs = [operands(400 + 10 * number, 30, 20) for number in range(8)]
    expected = [client.gradients(*job) for job in jobs]
    with gradwire.connect(small_blocks.address, channels=3, timeout_s=60) as spread:
        spread._tuning = Tuning(unary=False)
        with ThreadPoolExecutor(8) as pool:
            actual = list(pool.map(lambda job: spread.gradients(*job), jobs))
    for one, other in zip(expected, actual, strict=True):
        assert [a.tobytes() for a in one] == [b.tobytes() for b in other]
        assert other.receipt.connections == 3


@pytest.mark.parametrize("channels", [0, 17, -1, 1.5, "2"])
def test_channels_that_cannot_be_are_refused(channels: Any) -> None:
    with pytest.raises(gradwire.InputError, match="channels is"):
        gradwire.Client("localhost:1", channels=channels)


def failing_rows() -> Iterator[Any]:
    x, _, dy = operands(100, 30, 20)
    yield from [(x, dy)] * 5
    raise KeyError("the caller's own")


def test_what_the_callers_iterable_raises_is_raised(spread: Any) -> None:
    with pytest.raises(KeyError, match="the caller's own"):
        spread.stream(failing_rows(), np.ones((30, 20), np.float32))


def test_a_progress_callback_that_raises_cancels_the_job(
    spread: Any, small_blocks: ServerProcess
) -> None:
    def refuse(progress: gradwire.Progress) -> None:
        if progress.bytes_sent:
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        spread.gradients(*operands(1000, 30, 20), on_progress=refuse)
    assert spread.gradients(*operands(10, 30, 20)).receipt.m == 10


def endless() -> Iterator[Any]:
    x, _, dy = operands(100, 30, 20)
    while True:
        yield x, dy


def test_a_stream_that_is_left_early_cancels_its_job_on_all_connections(
    small_blocks: ServerProcess,
) -> None:
    with gradwire.connect(small_blocks.address, channels=3) as client:
        w = np.ones((30, 20), np.float32)
        for _ in client.stream(endless(), w, request_id="left-early"):
            break
        record = small_blocks.wait_for_log(
            lambda r: r.get("job_id") == "left-early" and r["message"] == "job"
        )
        assert record["outcome"] == "CANCELLED"


def test_a_stream_that_another_thread_closes_is_over(
    small_blocks: ServerProcess,
) -> None:
    drawn, enough = threading.Event(), threading.Event()

    def rows() -> Iterator[Any]:
        yield np.ones((100, 30), np.float32), np.ones((100, 20), np.float32)
        drawn.set()
        enough.wait(20)

    with gradwire.connect(small_blocks.address, channels=3) as client:
        stream = client.stream(rows(), np.ones((30, 20), np.float32))

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


def test_a_deadline_ends_the_job(spread: Any) -> None:
    with pytest.raises(gradwire.DeadlineError):
        spread.stream(endless(), np.ones((30, 20), np.float32), timeout_s=0.5)


def test_a_cancelled_coroutine_cancels_its_job_on_all_connections(
    small_blocks: ServerProcess,
) -> None:
    async def leave() -> None:
        async with gradwire.AsyncClient(small_blocks.address, channels=3) as client:
            stream = client.stream(
                endless(), np.ones((30, 20), np.float32), request_id="cancelled-all"
            )

            async def use() -> None:
                async with stream:
                    async for _ in stream:
                        pass

            task = asyncio.create_task(use())
            await anext(aiter(stream), None)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(leave())
    small_blocks.wait_for_log(
        lambda r: r.get("job_id") == "cancelled-all" and r["message"] == "job"
    )


@pytest.mark.parametrize("kind", CALLERS)
def test_a_server_without_the_feature_is_asked_over_one_connection(
    client: gradwire.Client,
    small_blocks: ServerProcess,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, w, dy = operands(300, 30, 20)
    expected = client.gradients(x, w, dy)
    monkeypatch.setattr("gradwire._base.limits.CONNECTIONS", "of-the-future")
    caller = CALLERS[kind](small_blocks.address, channels=3)
    caller.tune(unary=False)
    actual = caller.gradients(x, w, dy)
    caller.close()
    assert actual.receipt.connections == 1
    assert actual.dw.tobytes() == expected.dw.tobytes()


@pytest.mark.parametrize("kind", CALLERS)
def test_a_server_that_refuses_the_feature_is_asked_again_for_one_connection(
    small_blocks: ServerProcess, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one replica of several may, that is older than the one first asked."""
    monkeypatch.setattr("gradwire._exchange.CONNECTIONS", "of-the-future")
    caller = CALLERS[kind](small_blocks.address, channels=3)
    caller.tune(unary=False)
    x, w, dy = operands(300, 30, 20)
    assert caller.gradients(x, w, dy).receipt.connections == 1
    _, _, receipt = caller.stream(pieces(x, dy, 100), w)
    caller.close()
    assert (receipt.m, receipt.connections) == (300, 1)


@pytest.mark.parametrize("kind", CALLERS)
def test_connections_that_reach_another_replica_leave_the_job_on_one(
    small_blocks: ServerProcess, kind: str
) -> None:
    with (
        running_server(block_bytes=4096) as other,
        Balancer(small_blocks.address, other.address) as balancer,
    ):
        caller = CALLERS[kind](balancer.address, channels=2)
        caller.tune(unary=False)
        x, w, dy = operands(300, 30, 20)
        actual = caller.gradients(x, w, dy)
        blocks, dw, receipt = caller.stream(pieces(x, dy, 100), w)
        caller.close()
        assert actual.receipt.connections == receipt.connections == 1
        assert np.concatenate([b.y for b in blocks]).tobytes() == actual.y.tobytes()
        assert dw.tobytes() == actual.dw.tobytes()
        other.wait_for_log("JOIN_UNKNOWN")


@pytest.mark.parametrize("kind", CALLERS)
def test_connections_that_reach_nobody_leave_the_job_on_one(kind: str) -> None:
    with (
        running_server(block_bytes=4096, idle_timeout=0.5) as server,
        Balancer(server.address, None) as balancer,
    ):
        caller = CALLERS[kind](balancer.address, channels=2)
        caller.tune(unary=False)
        actual = caller.gradients(*operands(300, 30, 20))
        assert actual.receipt.connections == 1
        caller.close()


@pytest.mark.parametrize("kind", CALLERS)
def test_a_deadline_passes_while_connections_are_waited_for(
    small_blocks: ServerProcess, kind: str
) -> None:
    with Balancer(small_blocks.address, None) as balancer:
        caller = CALLERS[kind](balancer.address, channels=2)
        caller.tune(unary=False)
        with pytest.raises(gradwire.DeadlineError):
            caller.gradients(*operands(300, 30, 20), timeout_s=0.5)
        caller.close()


@pytest.mark.parametrize("kind", CALLERS)
@pytest.mark.parametrize("broken", [0, 1])
def test_a_connection_that_breaks_fails_the_job_and_says_so(
    small_blocks: ServerProcess, kind: str, broken: int
) -> None:
    with Balancer(small_blocks.address) as balancer:
        caller = CALLERS[kind](balancer.address, channels=2)

        def rows() -> Iterator[Any]:
            for number, item in enumerate(endless()):
                if number == 20:
                    balancer.cut(broken)
                yield item

        with pytest.raises(gradwire.ConnectionLostError):
            caller.stream(rows(), np.ones((30, 20), np.float32))
        caller.close()


class Balancer:
    """A proxy that leads one connection after another to servers in turn.

    Nobody answers where there is None instead.
    """

    def __init__(self, *addresses: str | None) -> None:
        self._targets = itertools.cycle(addresses)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Balancer:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for number in range(len(self._pairs)):
            self.cut(number)
        for thread in self._threads:
            thread.join()

    def cut(self, number: int) -> None:
        """Break a connection."""
        for end in self._pairs[number]:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _start(self, run: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=run, args=args)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            target = next(self._targets)
            if target is None:
                self._pairs.append((client, client))
                continue
            host, _, port = target.rpartition(":")
            server = socket.create_connection((host, int(port)))
            self._pairs.append((client, server))
            self._start(_copy, client, server)
            self._start(_copy, server, client)


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
