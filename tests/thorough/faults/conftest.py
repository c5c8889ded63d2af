"""A server whose books are looked into after every fault."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import grpc
import pytest

import gradwire
from gradwire._client.job_factory import Tuning
from tests.support.observing import MIB, descriptors, wait_until
from tests.support.proxy import Proxy
from tests.support.raw import CallError, Stream, make_job
from tests.support.serving import ServerProcess, running_server

SOON = gradwire.RetryPolicy(initial_backoff_s=0.02, max_backoff_s=0.1, budget=1e6)
LIMIT = 64 * MIB
ROW_BLOCK_BYTES = 640
MESSAGE_BYTES = 96
"""With these, a row block has 8 rows and 7 messages, 4 of X and 3 of dY.

The server takes 2 rows before it has accepted the job. If they are sent then, and not
with the others, the number of messages is the same, and so that of the cases.
"""
MAY_STAY_OPEN = 8
"""Descriptors: those of connections that are about to close."""


EXTENTS = ["sampled", pytest.param("every", marks=pytest.mark.big)]
"""Whether some of a fault's cases are tried, or all: see `table`."""


class Watched:
    """A server, and what it must come back to.

    Attributes:
        process: The server.
        settings: With which one like it is started.
    """

    def __init__(self, process: ServerProcess, settings: dict[str, Any]) -> None:
        self.process = process
        self.settings = settings
        self._largest = _largest_job(process)
        self._descriptors = descriptors(process.pid)

    def assert_clean(self) -> None:
        """No job runs, no byte is held, no descriptor stays, nothing went wrong.

        A job that takes all memory that the server has is admitted at once only
        where nothing at all is held.
        """
        wait_until(
            lambda: _is_admitted_at_once(self.process, self._largest),
            "everything that was reserved is given back",
        )
        wait_until(
            lambda: descriptors(self.process.pid) <= self._descriptors + MAY_STAY_OPEN,
            "descriptors are closed",
        )
        troubles = [
            record
            for record in self.process.records
            if record["name"] == "asyncio"
            # gRPC complains with a traceback of text that was damaged on its way.
            or ("traceback" in record and not record["name"].startswith("grpc."))
        ]
        assert not troubles


_NUMBERS = itertools.count()


def _largest_job(process: ServerProcess) -> int:
    """Rows of dW of the largest job that the server takes."""
    too_large = 1 << 20
    fits = 1
    while too_large - fits > 16:
        rows = (fits + too_large) // 2
        if _is_admitted_at_once(process, rows):
            fits = rows
        else:
            too_large = rows
    return fits


def _is_admitted_at_once(process: ServerProcess, n: int) -> bool:
    name = f"probe-{next(_NUMBERS)}"
    admitted = False
    with (
        grpc.insecure_channel(process.address) as channel,
        Stream(channel) as stream,
    ):
        stream.send(make_job(m=None, n=n, k=64, results=("dw",), job_id=name))
        try:
            message = stream.receive()
        except CallError as error:
            assert error.reason in {"BUSY", "JOB_TOO_LARGE"}  # noqa: PT017
        else:
            assert message is not None
            admitted = message.WhichOneof("message") == "accepted"
    process.wait_for_log(name)  # it holds nothing any more
    return admitted


@contextmanager
def watched_server(**settings: Any) -> Iterator[Watched]:
    """A server that has to be clean in the end."""
    settings = {"row_block_bytes": ROW_BLOCK_BYTES, "memory_limit": LIMIT} | settings
    with running_server(**settings) as process:
        watched = Watched(process, settings)
        yield watched
        if process.process.poll() is None:
            watched.assert_clean()


@pytest.fixture(scope="session")
def watched() -> Iterator[Watched]:
    """One for all faults that leave it running."""
    with watched_server(idle_timeout=2.0) as one:
        yield one


@pytest.fixture
def proxy(watched: Watched) -> Iterator[Proxy]:
    """What breaks connections to it."""
    with Proxy(watched.process.address) as between:
        yield between


@contextmanager
def both_clients(address: str, **options: Any) -> Iterator[dict[str, Client]]:
    """A `Client` and an `AsyncClient`, with the same face."""
    options = {"transport": "grpc", "retries": SOON} | options
    with asyncio.Runner() as runner, connected(address, **options) as client:
        async_client = gradwire.AsyncClient(address, **options)
        async_client._engine.jobs.tuning = client._engine.jobs.tuning
        runner.run(async_client.__aenter__())
        try:
            yield {"Client": client, "AsyncClient": _Waiting(async_client, runner)}
        finally:
            runner.run(async_client.close())


class _Waiting:
    """An `AsyncClient` whose caller waits."""

    def __init__(self, client: gradwire.AsyncClient, runner: asyncio.Runner) -> None:
        self._client = client
        self._runner = runner

    def gradients(self, *operands: Any, **options: Any) -> gradwire.Gradients:
        return self._runner.run(self._client.gradients(*operands, **options))

    def stream(self, *arguments: Any, **options: Any) -> _WaitingStream:
        return _WaitingStream(self._client.stream(*arguments, **options), self._runner)


class _WaitingStream:
    """The stream of an `AsyncClient` whose caller waits."""

    def __init__(self, stream: Any, runner: asyncio.Runner) -> None:
        self._stream = stream
        self._runner = runner

    def __enter__(self) -> _WaitingStream:
        self._runner.run(self._stream.__aenter__())
        return self

    def __exit__(self, *error: Any) -> None:
        self._runner.run(self._stream.__aexit__(*error))

    def __iter__(self) -> Iterator[gradwire.RowBlock]:
        async def next_block() -> gradwire.RowBlock | None:
            return await anext(self._stream, None)

        while (block := self._runner.run(next_block())) is not None:
            yield block

    @property
    def dw(self) -> Any:
        return self._stream.dw


Client: TypeAlias = gradwire.Client | _Waiting


def connected(address: str, **options: Any) -> gradwire.Client:
    """A client that streams even small jobs, in small messages."""
    options = {"transport": "grpc", "retries": SOON} | options
    client = gradwire.connect(address, **options)
    client._engine.jobs.tuning = Tuning(unary=False, chunk_bytes=MESSAGE_BYTES)
    return client
