"""Jobs that are cut off go on where they were, with the bits of those that are not."""

from __future__ import annotations

import asyncio
import platform
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

import gradwire
from gradwire._client.job_factory import Tuning
from tests.support import oracle
from tests.support.proxy import Direction, Fault, Proxy
from tests.support.serving import BACKEND, ServerProcess, running_server

X, W, DY = oracle.operands(405, 30, 20)
SETS = [("y",), ("dw",), ("dx", "dw"), ("y", "dx", "dw"), ("db",), ("dw", "db")]
SOON = gradwire.RetryPolicy(initial_backoff_s=0.01, max_backoff_s=0.1, budget=1e6)
B = 16
"""Rows of a block: 405 are 26 blocks, of which the last is short."""


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with running_server(row_block_bytes=4096) as process:
        yield process


@pytest.fixture(scope="module")
def proxy(server: ServerProcess) -> Iterator[Proxy]:
    with Proxy(server.address) as between:
        yield between


@pytest.fixture(scope="module")
def expected(server: ServerProcess) -> gradwire.Gradients:
    with gradwire.connect(server.address) as client:
        return client.gradients(X, W, DY, results=("y", "dx", "dw", "db"))


class Job:
    """One of the SDK's jobs, by either client, in small messages."""

    def __init__(
        self,
        kind: str,
        address: str,
        runner: asyncio.Runner,
        *,
        retries: Any = SOON,
    ) -> None:
        self._runner = runner
        options: Any = {"transport": "grpc", "retries": retries}
        if kind == "sync":
            self.client: Any = gradwire.connect(address, **options)
        else:
            self.client = gradwire.AsyncClient(address, **options)
            runner.run(self.client.__aenter__())
        self.is_async = kind == "async"
        self.client._engine.jobs.tuning = Tuning(chunk_bytes=3000, unary=False)

    def gradients(self, results: Any, **options: Any) -> gradwire.Gradients:
        called = self.client.gradients(X, W, DY, results=results, **options)
        return self._runner.run(called) if self.is_async else called  # type: ignore[no-any-return]

    def stream(self, rows: Any, results: Any, **options: Any) -> Any:
        """The row blocks, and the stream that gave them."""
        stream = self.client.stream(rows, W, results=results, **options)
        if not self.is_async:
            return list(stream), stream

        async def collect() -> Any:
            async with stream:
                return [block async for block in stream], stream

        return self._runner.run(collect())

    def close(self) -> None:
        closed = self.client.close()
        if self.is_async:
            self._runner.run(closed)


MakeJob = Callable[..., Job]


@pytest.fixture
def job_of(proxy: Proxy, runner: asyncio.Runner) -> Iterator[MakeJob]:
    """Makes clients that go through the proxy."""
    with ExitStack() as stack:

        def make(kind: str, address: str = proxy.address, **options: Any) -> Job:
            job = Job(kind, address, runner, **options)
            stack.callback(job.close)
            return job

        yield make
        proxy.arm(None)


def pairs(size: int = 37) -> Iterator[Any]:
    """Rows in memory that is used again for the next ones."""
    x, dy = np.empty((size, 30), np.float32), np.empty((size, 20), np.float32)
    for first in range(0, len(X), size):
        part = slice(first, first + size)
        rows = len(X[part])
        x[:rows], dy[:rows] = X[part], DY[part]
        yield x[:rows], dy[:rows]


async def pairs_in_time() -> AsyncIterator[Any]:
    for pair in pairs():
        await asyncio.sleep(0)
        yield pair


def lists() -> Any:
    return [(X[a : a + 37], DY[a : a + 37]) for a in range(0, len(X), 37)]


def assert_blocks(
    blocks: Any, results: Any, expected: gradwire.Gradients, rows: int = B
) -> None:
    """Every block once, in order, with the bits of the whole."""
    assert [block.first_row for block in blocks] == list(range(0, len(X), rows))
    for name in {"y", "dx"} & set(results):
        whole = np.concatenate([getattr(block, name) for block in blocks])
        assert oracle.same_bits(whole, getattr(expected, name))


def boundaries(job: Job, proxy: Proxy, run: Callable[[], object], step: int) -> Any:
    """Faults at message boundaries of a job, in both directions."""
    proxy.arm(None)
    run()
    count = dict(proxy.messages)
    ways: tuple[Direction, ...] = ("requests", "responses")
    for of in ways:
        for number in range(1, count[of] + 1, step):
            yield Fault(of, cut_after_messages=number)


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("results", SETS, ids="+".join)
def test_arrays_cut_off_between_any_messages(
    job_of: MakeJob,
    proxy: Proxy,
    expected: gradwire.Gradients,
    kind: str,
    results: Any,
) -> None:
    job = job_of(kind)
    for rows in (None, 50) if {"dw", "db"} & set(results) else (None,):

        def run(rows: int | None = rows) -> gradwire.Gradients:
            return job.gradients(results, checkpoint_rows=rows)

        for fault in boundaries(job, proxy, run, step=61):
            proxy.arm(fault)
            faults = proxy.faults
            result = run()
            if proxy.faults > faults:
                # gRPC may give the next attempt the broken connection, too.
                assert set(result.receipt.retried) == {"UNAVAILABLE"}
            for name in results:
                assert oracle.same_bits(
                    getattr(result, name), getattr(expected, name)
                ), (name, fault)


@pytest.mark.parametrize(
    ("kind", "source"),
    [("sync", pairs), ("sync", lists), ("async", pairs), ("async", pairs_in_time)],
)
def test_streams_cut_off_between_any_messages(
    job_of: MakeJob,
    proxy: Proxy,
    expected: gradwire.Gradients,
    kind: str,
    source: Any,
) -> None:
    job = job_of(kind)
    for results in (*SETS[::3], ("y", "dw", "db")):

        def run(results: Any = results) -> Any:
            return job.stream(source(), results, checkpoint_rows=50)

        for fault in boundaries(job, proxy, run, step=41):
            proxy.arm(fault)
            blocks, stream = run()
            if results != ("dw",):
                assert_blocks(blocks, results, expected)
            for name in {"dw", "db"} & set(results):
                assert oracle.same_bits(
                    getattr(stream, name), getattr(expected, name)
                ), fault


@pytest.mark.parametrize("of", ["requests", "responses"])
@pytest.mark.parametrize("seed", range(3))
def test_a_job_cut_off_again_and_again_after_any_bytes(
    job_of: MakeJob,
    proxy: Proxy,
    expected: gradwire.Gradients,
    of: Direction,
    seed: int,
) -> None:
    job = job_of("sync")
    random = np.random.default_rng(seed)
    cuts = 0

    def cut_soon(progress: gradwire.Progress) -> None:
        nonlocal cuts
        if proxy._fault is None and cuts < 4:
            cuts += 1
            after = int(random.integers(9_000, 20_000))
            proxy.arm(Fault(of, cut_after_bytes=after))

    cut_soon(None)  # type: ignore[arg-type]
    blocks, stream = job.stream(
        pairs(), ("y", "dx", "dw"), checkpoint_rows=B, on_progress=cut_soon
    )
    assert_blocks(blocks, ("y", "dx"), expected)
    assert oracle.same_bits(stream.dw, expected.dw)
    assert stream.receipt.attempts > 2


def test_a_checkpoint_saves_the_rows_before_it(
    job_of: MakeJob, proxy: Proxy, expected: gradwire.Gradients
) -> None:
    job = job_of("sync")
    for rows, fault in (
        # When all but two blocks and End have passed.
        (None, Fault("requests", cut_after_messages=50)),
        # When Accepted, Checkpoint and its sum have passed, in two chunks.
        (50, Fault("responses", cut_after_messages=5)),
    ):
        proxy.arm(fault)
        result = job.gradients(("dw",), checkpoint_rows=rows)
        assert result.receipt.attempts == 2
        assert (result.receipt.blocks == 26) == (rows is None)
        assert oracle.same_bits(result.dw, expected.dw)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_job_goes_on_in_the_blocks_that_it_asked_for(
    job_of: MakeJob, proxy: Proxy, server: ServerProcess, kind: str
) -> None:
    proxy.arm(None)
    with gradwire.connect(server.address) as client:
        wanted = client.gradients(X, W, DY, block_rows=4)
    job = job_of(kind)
    proxy.arm(Fault("responses", cut_after_messages=45))
    result = job.gradients(("y", "dx", "dw"), checkpoint_rows=B, block_rows=4)
    assert result.receipt.attempts == 2
    assert result.receipt.blocks < wanted.receipt.blocks == -(-405 // 4)
    for name in ("y", "dx", "dw"):
        assert oracle.same_bits(getattr(result, name), getattr(wanted, name)), name
    proxy.arm(Fault("responses", cut_after_messages=45))
    blocks, stream = job_of(kind).stream(
        pairs(), ("y", "dx", "dw"), checkpoint_rows=B, block_rows=4
    )
    assert stream.receipt.attempts == 2
    assert_blocks(blocks, ("y", "dx"), wanted, rows=4)
    assert oracle.same_bits(stream.dw, wanted.dw)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_rows_that_are_held_no_more_are_named_and_what_came_stays(
    job_of: MakeJob, proxy: Proxy, expected: gradwire.Gradients, kind: str
) -> None:
    policy = gradwire.RetryPolicy(initial_backoff_s=0.01, held_bytes=20_000)
    job = job_of(kind, retries=policy)
    came: list[gradwire.RowBlock] = []

    stream = job.client.stream(pairs(), W, checkpoint_rows=0)

    async def consume() -> None:
        async for block in stream:
            came.append(block)  # noqa: PERF401 - what came stays, though it fails

    proxy.arm(Fault("responses", cut_after_messages=45))
    with pytest.raises(gradwire.RowsLostError) as lost:
        job._runner.run(consume()) if kind == "async" else came.extend(stream)
    assert lost.value.rows.start == 0
    assert lost.value.rows.stop > 200
    assert isinstance(lost.value.__cause__, gradwire.ConnectionLostError)
    assert f"rows 0 to {lost.value.rows.stop - 1} are needed again" in str(lost.value)
    assert "give rows as a sequence" in str(lost.value)
    assert isinstance(lost.value, gradwire.UnavailableError)
    for block in came:
        part = slice(block.first_row, block.first_row + len(block))
        assert oracle.same_bits(block.y, expected.y[part])
    # A sequence is read again. (By a new client: the one above may not have noticed
    # yet that its connection is gone, and would count that as an attempt.)
    proxy.arm(Fault("responses", cut_after_messages=45))
    _, again = job_of(kind, retries=policy).stream(lists(), ("y", "dx", "dw"))
    assert again.receipt.attempts == 2
    assert oracle.same_bits(again.dw, expected.dw)


def test_with_checkpoints_a_few_rows_are_enough_to_hold(
    job_of: MakeJob, proxy: Proxy, expected: gradwire.Gradients
) -> None:
    policy = gradwire.RetryPolicy(initial_backoff_s=0.01, held_bytes=50_000)
    job = job_of("sync", retries=policy)
    # One message has a checkpoint's sum: 4800 bytes.
    job.client._engine.jobs.tuning = Tuning(chunk_bytes=6000, unary=False)
    proxy.arm(Fault("responses", cut_after_messages=60))
    blocks, stream = job.stream(pairs(), ("y", "dx", "dw"), checkpoint_rows=B)
    assert stream.receipt.attempts == 2
    assert_blocks(blocks, ("y", "dx"), expected)
    assert oracle.same_bits(stream.dw, expected.dw)


def test_a_generator_is_not_ended_by_the_failure_of_an_attempt(
    job_of: MakeJob, proxy: Proxy, expected: gradwire.Gradients
) -> None:
    job = job_of("async")

    async def slow() -> AsyncIterator[Any]:
        for number, pair in enumerate(pairs()):
            if number == 5:
                # The connection breaks while an item is waited for.
                proxy.cut()
                await asyncio.sleep(0.2)
            yield pair

    blocks, stream = job.stream(slow(), ("y", "dx", "dw"))
    assert stream.receipt.attempts >= 2
    assert_blocks(blocks, ("y", "dx"), expected)
    assert oracle.same_bits(stream.dw, expected.dw)


OTHERS: dict[str, Any] = {
    "row blocks": {"row_block_bytes": 8192},
    # Of products of these sizes, OpenBLAS's two kernels give other bits.
    "BLAS kernel": {
        "row_block_bytes": 4096,
        "env": {"OPENBLAS_CORETYPE": "Sandybridge"},
    },
}
"""Servers that compute other bits than `server`, by the cause."""

if BACKEND == "cupy" or platform.machine() != "x86_64":
    del OTHERS["BLAS kernel"]


@pytest.mark.parametrize("why", OTHERS)
def test_on_a_server_of_other_bits_arrays_begin_anew(
    job_of: MakeJob,
    proxy: Proxy,
    server: ServerProcess,
    expected: gradwire.Gradients,
    why: str,
) -> None:
    job = job_of("sync")
    here = expected
    with running_server(**OTHERS[why]) as other:
        with gradwire.connect(other.address) as client:
            expected = client.gradients(X, W, DY)

        def move(progress: gradwire.Progress) -> None:
            if progress.bytes_received > 20_000 and proxy.target != other.address:
                proxy.target = other.address
                proxy.cut()

        try:
            result = job.gradients(("y", "dx", "dw"), on_progress=move)
        finally:
            proxy.target = server.address
            proxy.cut()
    assert result.receipt.fingerprint != here.receipt.fingerprint
    assert not oracle.same_bits(here.dw, expected.dw)
    for one, another in zip(result, expected, strict=True):
        assert oracle.same_bits(one, another)


@pytest.mark.parametrize("why", OTHERS)
def test_on_a_server_of_other_bits_a_stream_ends_with_what_broke_it(
    job_of: MakeJob, proxy: Proxy, server: ServerProcess, why: str
) -> None:
    job = job_of("sync")
    with running_server(**OTHERS[why]) as other:
        stream = job.client.stream(pairs(), W)
        next(stream)
        proxy.target = other.address
        proxy.cut()
        try:
            with pytest.raises(gradwire.ConnectionLostError) as lost:
                list(stream)
        finally:
            proxy.target = server.address
            proxy.cut()
    assert "cannot resume" in lost.value.__notes__[0]
    assert "RESUME_MISMATCH" in lost.value.__notes__[0]


@pytest.mark.parametrize(
    ("kind", "results"), [("sync", ("y", "dx", "dw")), ("async", ("dw",))]
)
def test_a_server_that_stops_hands_its_jobs_over_to_the_next(
    job_of: MakeJob,
    runner: asyncio.Runner,
    expected: gradwire.Gradients,
    kind: str,
    results: Any,
) -> None:
    """With rows that nobody could send again from their beginning."""
    with ExitStack() as servers, Proxy("127.0.0.1:1") as proxy:
        one = servers.enter_context(running_server(row_block_bytes=4096, grace=0.3))
        two = servers.enter_context(running_server(row_block_bytes=4096))
        proxy.target = one.address
        policy = gradwire.RetryPolicy(initial_backoff_s=0.05, held_bytes=40_000)
        job = job_of(kind, proxy.address, retries=policy)
        stopped = threading.Event()

        def rows() -> Iterator[Any]:
            for number, pair in enumerate(pairs()):
                if number == 7:
                    proxy.target = two.address
                    one.process.send_signal(signal.SIGTERM)
                    one.process.wait(20)
                    proxy.cut()
                    stopped.set()
                yield pair

        blocks, stream = job.stream(rows(), results)
    assert stopped.is_set()
    assert stream.receipt.retried[0] == "DRAINING"
    assert 0 < stream.receipt.blocks < 26
    if "y" in results:
        assert_blocks(blocks, results, expected)
    assert oracle.same_bits(stream.dw, expected.dw)


@pytest.mark.thorough
def test_under_load_a_server_that_is_started_anew_loses_no_job(
    runner: asyncio.Runner, expected: gradwire.Gradients
) -> None:
    with running_server(row_block_bytes=4096, grace=0.2, max_jobs=2) as first:
        address = first.address
        done: list[str] = []
        wrong: list[str] = []

        def work(kind: str) -> None:
            with gradwire.connect(address) as client:
                client._engine.jobs.tuning = Tuning(
                    chunk_bytes=3000, unary=kind == "unary"
                )
                for _ in range(6):
                    if kind == "stream":
                        stream = client.stream(pairs(), W)
                        list(stream)
                        dw = stream.dw
                    else:
                        dw = client.gradients(X, W, DY).dw
                    if not oracle.same_bits(dw, expected.dw):
                        wrong.append(kind)
                    done.append(kind)

        kinds = ("unary", "stream", "arrays")
        threads = [threading.Thread(target=work, args=(kind,)) for kind in kinds]
        for thread in threads:
            thread.start()
        while len(done) < 4:
            time.sleep(0.005)
        first.process.terminate()
        first.process.wait(20)
        with running_server(row_block_bytes=4096, listen=[address]):
            for thread in threads:
                thread.join()
    assert not wrong
    assert len(done) == 6 * len(kinds)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_server_that_knows_of_none_of_it_computes_all_the_same(
    job_of: MakeJob,
    proxy: Proxy,
    expected: gradwire.Gradients,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """One that `connect` has not asked, behind a balancer for example."""
    monkeypatch.setattr("gradwire._core.exchange.RESUME", "of-the-future")
    job = job_of(kind)
    proxy.arm(Fault("responses", cut_after_messages=30))
    result = job.gradients(("y", "dx", "dw"))
    assert result.receipt.attempts == 2
    assert result.receipt.blocks == 26
    for one, other in zip(result, expected, strict=True):
        assert oracle.same_bits(one, other)
    with pytest.raises(gradwire.UnsupportedError, match="of-the-future"):
        job.gradients(("dw",), checkpoint_rows=100)
