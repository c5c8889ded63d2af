"""Clients of a server whose row blocks are so small that jobs have several."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import pytest

import gradwire
from tests.scenarios import ways
from tests.scenarios.callers import CALLERS, Caller
from tests.scenarios.ways import Way
from tests.support import oracle
from tests.support.serving import ServerProcess

ROW_BLOCK_BYTES = 4096


@pytest.fixture(scope="session")
def small_blocks() -> Iterator[ServerProcess]:
    """A server that all tests share which leave it unharmed."""
    with ways.serving_all(row_block_bytes=ROW_BLOCK_BYTES) as process:
        yield process


@pytest.fixture(scope="session")
def client(small_blocks: ServerProcess) -> Iterator[gradwire.Client]:
    """A client of that server over TCP: what others are compared with."""
    with gradwire.connect(
        small_blocks.address, timeout_s=60, transport="grpc"
    ) as connected:
        yield connected


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """An event loop for a module's asynchronous callers."""
    with asyncio.Runner() as one:
        yield one


CallerOf: TypeAlias = Callable[[str, Way], Caller]


@pytest.fixture(scope="session")
def caller_of(small_blocks: ServerProcess) -> Iterator[CallerOf]:
    """The caller of a kind that goes a way: one for all tests."""
    callers: dict[tuple[str, str], Caller] = {}
    with asyncio.Runner() as runner:

        def find(kind: str, way: Way) -> Caller:
            if (kind, way.name) not in callers:
                callers[kind, way.name] = CALLERS[kind](way, small_blocks, runner)
            return callers[kind, way.name]

        yield find
        for each in callers.values():
            each.close()


def each_caller(*of: Way) -> Any:
    """Parameters of a fixture: each client on each of these ways."""
    return [
        pytest.param((kind, way), id=f"{kind}-{way}")
        for kind, way in itertools.product(CALLERS, of)
    ]


@pytest.fixture(params=each_caller(*ways.WAYS))
def caller(request: pytest.FixtureRequest, caller_of: CallerOf) -> Iterator[Caller]:
    """Each client on each way in turn, tuned as it is by default."""
    one = caller_of(*request.param)
    one.tune()
    yield one
    one.tune()


@pytest.fixture(params=each_caller(*ways.IN_MESSAGES))
def streamer(request: pytest.FixtureRequest, caller_of: CallerOf) -> Iterator[Caller]:
    """Each client on each way that takes many messages."""
    one = caller_of(*request.param)
    one.tune()
    yield one
    one.tune()


@pytest.fixture(params=ways.WAYS, ids=str)
def way(request: pytest.FixtureRequest) -> Way:
    """Each way in turn."""
    chosen: Way = request.param
    return chosen


@pytest.fixture(params=ways.IN_MESSAGES, ids=str)
def stream_way(request: pytest.FixtureRequest) -> Way:
    """Each way of a stream of rows in turn."""
    chosen: Way = request.param
    return chosen


@pytest.fixture
def stream_client(stream_way: Way, caller_of: CallerOf) -> gradwire.Client:
    """A client on each way of a stream of rows in turn."""
    one: gradwire.Client = caller_of("sync", stream_way).client
    return one


@pytest.fixture(scope="session")
def one_job() -> Iterator[ServerProcess]:
    """A server that runs one job at a time, and lets one wait."""
    with ways.serving_all(max_jobs=1, max_queue=1) as server:
        yield server


@pytest.fixture
def occupied(one_job: ServerProcess) -> Iterator[ServerProcess]:
    """That server, while a job keeps it."""
    x, w, dy = oracle.operands(400, 30, 20)
    go_on = threading.Event()

    def rows() -> Iterator[Any]:
        yield x, dy
        go_on.wait(60)

    accepted = threading.Event()

    def on_progress(progress: gradwire.Progress) -> None:
        if progress.bytes_sent:
            accepted.set()

    with gradwire.connect(one_job.address, transport="grpc") as client:
        stream = client.stream(rows(), w, on_progress=on_progress)
        consumer = threading.Thread(target=lambda: list(stream))
        consumer.start()
        assert accepted.wait(30)
        yield one_job
        go_on.set()
        consumer.join()
