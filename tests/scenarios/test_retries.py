"""Calls that fail in passing are made again, and their callers need not notice."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeAlias

import pytest

import gradwire
from tests.scenarios.callers import CALLERS, Caller
from tests.scenarios.ways import COMPUTE, COPIED, SHARED, STREAM, Way, serving_all
from tests.support import oracle
from tests.support.proxy import Direction, Fault, Proxy
from tests.support.serving import ServerProcess

X, W, DY = oracle.operands(400, 30, 20)
SOON = gradwire.RetryPolicy(initial_backoff_s=0.02, max_backoff_s=0.2)


@pytest.fixture(scope="module")
def proxy(small_blocks: ServerProcess) -> Iterator[Proxy]:
    with Proxy(small_blocks.address) as between:
        yield between


class Through:
    """What clients connect to in place of a server: a proxy before it."""

    def __init__(self, proxy: Proxy, server: ServerProcess) -> None:
        self.addresses = (proxy.address, server.addresses[1])


Calling: TypeAlias = Callable[[str, Way], Caller]


@pytest.fixture
def calling(
    proxy: Proxy, small_blocks: ServerProcess, runner: asyncio.Runner
) -> Iterator[Calling]:
    """Makes a caller of a kind, whose jobs go a way through the proxy."""
    callers: list[Caller] = []

    def make(kind: str, way: Way) -> Caller:
        way = replace(way, options={**way.options, "retries": SOON})
        through: Any = Through(proxy, small_blocks)
        callers.append(CALLERS[kind](way, through, runner))
        return callers[-1]

    yield make
    proxy.arm(None)
    for caller in callers:
        caller.close()


@pytest.mark.parametrize("kind", CALLERS)
@pytest.mark.parametrize("way", [COMPUTE, STREAM, SHARED, COPIED], ids=str)
@pytest.mark.parametrize("of", ["requests", "responses"])
def test_a_job_whose_connection_breaks_runs_again_with_the_same_bits(
    calling: Calling,
    proxy: Proxy,
    client: gradwire.Client,
    kind: str,
    way: Way,
    of: Direction,
) -> None:
    unlucky = calling(kind, way)
    faults = proxy.faults
    expected = client.gradients(X, W, DY)
    operands = [unlucky.placed(operand) for operand in (X, W, DY)]
    unlucky.gradients(*operands)
    # In shared memory a job has few messages, as small as what HTTP/2 says beside.
    proxy.arm(
        Fault(of, cut_after_messages=1)
        if way.transport == "shm"
        else Fault(of, cut_after_bytes=3000)
    )
    result = unlucky.gradients(*operands, request_id="cut off once")
    assert proxy.faults == faults + 1
    assert result.receipt.attempts >= 2
    assert set(result.receipt.retried) == {"UNAVAILABLE"}
    assert result.receipt.job_id == "cut off once"
    for one, other in zip(result, expected, strict=True):
        assert oracle.same_bits(one, other)


@pytest.mark.parametrize("kind", CALLERS)
@pytest.mark.parametrize("of", ["requests", "responses"])
def test_a_payload_that_is_damaged_on_the_way_is_sent_again(
    calling: Calling,
    proxy: Proxy,
    client: gradwire.Client,
    small_blocks: ServerProcess,
    kind: str,
    of: Direction,
) -> None:
    expected = client.gradients(X, W, DY)
    caller = calling(kind, STREAM)
    proxy.arm(Fault(of, flip_in_message=4))
    job_id = f"damaged-{of}-{kind}"
    result = caller.gradients(X, W, DY, checksum=True, request_id=job_id)
    assert result.receipt.retried == ("CHECKSUM_MISMATCH",)
    # The server hears of what it cannot see itself.
    said = small_blocks.wait_for_log(
        lambda r: r.get("job_id") == job_id and r.get("outcome") != "OK"
    )
    if of == "requests":
        assert said["reason"] == "CHECKSUM_MISMATCH"
    else:
        small_blocks.wait_for_log(
            lambda r: r.get("job_id") == job_id and r.get("report") == "damaged"
        )
    reports = [r for r in small_blocks.records if r.get("report")]
    assert sum(r["job_id"] == job_id for r in reports) == (of == "responses")
    for one, other in zip(result, expected, strict=True):
        assert oracle.same_bits(one, other)


@pytest.mark.parametrize("kind", CALLERS)
def test_results_of_the_callers_own_are_whole_after_a_retry(
    calling: Calling, proxy: Proxy, client: gradwire.Client, kind: str
) -> None:
    expected = client.gradients(X, W, DY)
    caller = calling(kind, STREAM)
    # Rows of a wider array: each is moved there when it is complete.
    y = oracle.operands(400, 40, 1)[0][:, 3:23]
    proxy.arm(Fault("responses", cut_after_bytes=20_000))
    result = caller.gradients(X, W, DY, out={"y": y})
    assert result.receipt.attempts == 2
    assert result.y is y
    for one, other in zip(result, expected, strict=True):
        assert oracle.same_bits(one, other)


@pytest.mark.parametrize("kind", CALLERS)
def test_results_in_shared_memory_that_a_lost_server_may_write_to_are_given_up(
    calling: Calling, proxy: Proxy, kind: str
) -> None:
    caller = calling(kind, SHARED)
    y = caller.empty((400, 20))
    proxy.arm(Fault("requests", cut_after_messages=1))
    with pytest.raises(gradwire.ConnectionLostError) as lost:
        caller.gradients(X, W, DY, out={"y": y})
    assert lost.value.attempts == 1
    assert caller.gradients(X, W, DY, out={"y": y}).y is y


@pytest.mark.parametrize("of", ["requests", "responses"])
def test_a_stream_that_breaks_before_its_job_is_accepted_begins_anew(
    proxy: Proxy,
    small_blocks: ServerProcess,
    client: gradwire.Client,
    of: Direction,
) -> None:
    expected = client.gradients(X, W, DY)
    through: Any = Through(proxy, small_blocks)
    with STREAM.connect(through, retries=SOON) as unlucky:
        proxy.arm(Fault(of, cut_after_bytes=60))
        with unlucky.stream(iter([(X, DY)]), W) as stream:
            rows = sum(len(block) for block in stream)
    assert rows == 400
    assert stream.receipt.attempts >= 2
    assert oracle.same_bits(stream.dw, expected.dw)


@pytest.mark.parametrize("kind", CALLERS)
def test_what_a_server_is_is_asked_again(
    calling: Calling, proxy: Proxy, kind: str
) -> None:
    caller = calling(kind, STREAM)
    proxy.arm(Fault("requests", cut_after_bytes=10))
    assert caller.server_info().contract == "gradwire.v1"
    assert proxy.bytes["requests"] > 10


def test_without_retries_a_connection_that_breaks_is_the_callers_to_handle(
    proxy: Proxy,
) -> None:
    with gradwire.connect(proxy.address, retries=False) as client:
        proxy.arm(Fault("requests", cut_after_bytes=1000))
        with pytest.raises(gradwire.ConnectionLostError) as lost:
            client.gradients(X, W, DY)
        assert lost.value.attempts == 1
        assert client.gradients(X, W, DY).receipt.attempts == 1


@pytest.mark.parametrize("kind", CALLERS)
def test_a_busy_server_is_asked_again_when_it_said(
    kind: str, runner: asyncio.Runner, caplog: pytest.LogCaptureFixture
) -> None:
    go_on, runs = threading.Event(), threading.Event()

    def rows() -> Iterator[Any]:
        yield X, DY
        runs.set()
        go_on.wait(60)

    with serving_all(max_jobs=1, max_queue=0) as server, STREAM.connect(server) as one:
        occupant = threading.Thread(target=lambda: list(one.stream(rows(), W)))
        occupant.start()
        assert runs.wait(30)
        caller = CALLERS[kind](Way("s", {"transport": "grpc"}), server, runner)

        class Leaves(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                go_on.set()

        told = Leaves()
        logging.getLogger("gradwire").addHandler(told)
        begun = time.monotonic()
        try:
            result = caller.gradients(X, W, DY)
        finally:
            logging.getLogger("gradwire").removeHandler(told)
            go_on.set()
            occupant.join()
        assert result.receipt.retried == ("BUSY",)
        assert time.monotonic() - begun > 1
        caller.close()


@pytest.mark.parametrize("kind", CALLERS)
def test_a_job_without_its_server_fails_within_its_deadline(
    kind: str, runner: asyncio.Runner
) -> None:
    with serving_all() as server:
        caller = CALLERS[kind](
            Way("stream", {"transport": "grpc", "retries": SOON}), server, runner
        )
        server.kill()
        begun = time.monotonic()
        with pytest.raises(gradwire.ConnectError) as gone:
            caller.gradients(X, W, DY, timeout_s=0.5)
        assert time.monotonic() - begun < 3
        assert gone.value.attempts > 1
        assert "the earlier ones failed with UNAVAILABLE" in gone.value.__notes__[0]
        caller.close()


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address at which nobody listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{held.getsockname()[1]}"


INTERRUPTED = """
    import logging, sys, numpy as np, gradwire
    client = gradwire.Client(sys.argv[1])
    client._engine.retries.draw = lambda least, most: 60.0

    class Ready(logging.Handler):
        def emit(self, record):
            print("waits", flush=True)

    logging.getLogger("gradwire").addHandler(Ready())
    x = np.ones((10, 10), "f4")
    try:
        if sys.argv[2] == "stream":
            next(client.stream([(x, x)], x))
        else:
            client.gradients(x, x, x)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


@pytest.mark.parametrize("what", ["gradients", "stream"])
def test_ctrl_c_ends_the_wait_for_a_retry_at_once(nobody: str, what: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(INTERRUPTED), nobody, what],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "waits\n"
            time.sleep(0.05)  # it is about to wait
            begun = time.monotonic()
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == "interrupted\n"
            assert time.monotonic() - begun < 3
        finally:
            process.kill()


def wait_for_a_record(caplog: pytest.LogCaptureFixture) -> None:
    """Return when a retry has been logged, so that it is waited for."""
    while not caplog.records:
        time.sleep(0.01)


@pytest.mark.parametrize("what", ["gradients", "stream"])
async def test_cancelling_a_task_ends_the_wait_for_a_retry_at_once(
    nobody: str, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    client = gradwire.AsyncClient(nobody)
    client._engine.retries.draw = lambda least, most: 60.0

    async def call() -> None:
        if what == "stream":
            await anext(client.stream([(X, DY)], W))
        else:
            await client.gradients(X, W, DY)

    task = asyncio.create_task(call())
    await asyncio.to_thread(wait_for_a_record, caplog)
    begun = time.monotonic()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.monotonic() - begun < 3
    await client.close()


def test_closing_a_client_ends_the_wait_for_a_retry_at_once(
    nobody: str, caplog: pytest.LogCaptureFixture
) -> None:
    client = gradwire.Client(nobody)
    client._engine.retries.draw = lambda least, most: 60.0

    def close() -> None:
        wait_for_a_record(caplog)
        client.close()

    closing = threading.Thread(target=close)
    closing.start()
    with pytest.raises(gradwire.ClientStateError, match="is closed"):
        client.gradients(X, W, DY)
    closing.join()
