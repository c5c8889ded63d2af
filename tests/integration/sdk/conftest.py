"""Clients of a server whose row blocks are so small that jobs have several."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

import gradwire
from tests import oracle
from tests.integration.sdk.callers import AsyncCaller, SyncCaller
from tests.serving import ServerProcess, running_server

BLOCK_BYTES = 4096


@pytest.fixture(scope="session")
def small_blocks() -> Iterator[ServerProcess]:
    """A server that all tests share which leave it unharmed."""
    with running_server(block_bytes=BLOCK_BYTES) as process:
        yield process


@pytest.fixture(scope="session")
def client(small_blocks: ServerProcess) -> Iterator[gradwire.Client]:
    """A client of that server."""
    with gradwire.connect(small_blocks.address, timeout_s=60) as connected:
        yield connected


@pytest.fixture(scope="session")
def sync_caller(small_blocks: ServerProcess) -> Iterator[SyncCaller]:
    caller = SyncCaller(small_blocks.address)
    yield caller
    caller.close()


@pytest.fixture(scope="session")
def async_caller(small_blocks: ServerProcess) -> Iterator[AsyncCaller]:
    caller = AsyncCaller(small_blocks.address)
    yield caller
    caller.close()


@pytest.fixture(params=["sync", "async"])
def caller(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Each client in turn, tuned as it is by default."""
    one = request.getfixturevalue(f"{request.param}_caller")
    one.tune()
    yield one
    one.tune()


@pytest.fixture(scope="session")
def one_job() -> Iterator[ServerProcess]:
    """A server that runs one job at a time, and lets one wait."""
    with running_server(max_jobs=1, max_queue=1) as server:
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

    with gradwire.connect(one_job.address) as client:
        stream = client.stream(rows(), w, on_progress=on_progress)
        consumer = threading.Thread(target=lambda: list(stream))
        consumer.start()
        assert accepted.wait(30)
        yield one_job
        go_on.set()
        consumer.join()
