"""Calls that a proxy resets, with any code of HTTP/2, are made again and go on.

A proxy whose server dies keeps its connection to the client, and resets the stream of
the call: nginx and Envoy with code 2, HAProxy with 8.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeAlias, cast

import grpc
import numpy as np
import pytest

import gradwire
from tests.scenarios.callers import CALLERS, Caller
from tests.scenarios.ways import COMPUTE, STREAM, Way, serving_all
from tests.support import oracle
from tests.support.frame_proxy import CODES, FrameProxy, Reset
from tests.support.http2 import WebServer
from tests.support.serving import ServerProcess

X, W, DY = oracle.operands(400, 30, 20)
SOON = gradwire.RetryPolicy(initial_backoff_s=0.01, max_backoff_s=0.05)
LOST = ("UNAVAILABLE",)
CANCEL = 8
SOME = (2, CANCEL)


@pytest.fixture(scope="module")
def proxy(small_blocks: ServerProcess) -> Iterator[FrameProxy]:
    with FrameProxy(small_blocks.address) as between:
        yield between


@pytest.fixture(scope="module")
def busy() -> Iterator[ServerProcess]:
    """A server that runs one job at a time, and lets none wait."""
    with serving_all(max_jobs=1, max_queue=0, memory_limit=64 << 20) as server:
        yield server


class Through:
    """What clients connect to in place of a server: a proxy before it."""

    def __init__(self, proxy: FrameProxy) -> None:
        self.addresses = (proxy.address, "")


Calling: TypeAlias = Callable[..., Caller]


@pytest.fixture
def calling(proxy: FrameProxy, runner: asyncio.Runner) -> Iterator[Calling]:
    """Makes a caller of a kind, whose jobs go a way through a proxy."""
    callers: list[Caller] = []

    def make(kind: str, way: Way, through: FrameProxy = proxy) -> Caller:
        way = replace(way, options={**way.options, "retries": SOON})
        server: Any = Through(through)
        callers.append(CALLERS[kind](way, server, runner))
        return callers[-1]

    yield make
    proxy.arm(None)
    for caller in callers:
        caller.close()


@pytest.mark.parametrize("kind", CALLERS)
@pytest.mark.parametrize(
    ("way", "reset", "codes"),
    [
        (COMPUTE, Reset(0), CODES),
        (COMPUTE, Reset(0, "requests", 0), SOME),
        (STREAM, Reset(0, "requests", 0), SOME),
        (STREAM, Reset(0, "requests", 9), SOME),
        (STREAM, Reset(0, "responses", 5), CODES),
    ],
    ids=["compute", "compute-early", "stream-early", "stream-sends", "stream-reads"],
)
def test_a_job_that_is_reset_with_any_code_has_the_same_bits(
    calling: Calling,
    proxy: FrameProxy,
    client: gradwire.Client,
    kind: str,
    way: Way,
    reset: Reset,
    codes: Sequence[int],
) -> None:
    expected = client.gradients(X, W, DY)
    caller, before = calling(kind, way), proxy.resets
    retried, right = {}, {}
    for code in codes:
        proxy.arm(replace(reset, code=code))
        result = caller.gradients(X, W, DY, request_id=f"reset by {code}")
        retried[code] = result.receipt.retried
        right[code] = all(map(oracle.same_bits, result, expected))
    assert retried == dict.fromkeys(codes, LOST)
    assert right == dict.fromkeys(codes, True)
    assert proxy.resets == before + len(codes)


@pytest.mark.parametrize("kind", CALLERS)
def test_a_stream_that_is_reset_with_any_code_goes_on_where_it_was(
    calling: Calling, proxy: FrameProxy, client: gradwire.Client, kind: str
) -> None:
    expected = client.forward(X, W)
    caller = calling(kind, STREAM)
    for code in CODES:
        proxy.arm(Reset(code, "responses", 5))
        rows = (X[first : first + 50] for first in range(0, 400, 50))
        blocks, _, receipt = caller.stream(rows, W, results=("y",))
        assert receipt.retried == LOST, code
        firsts = [block.first_row for block in blocks]
        assert firsts == sorted(set(firsts)), code
        assert oracle.same_bits(np.concatenate([b.y for b in blocks]), expected), code
        # Rows whose results had arrived were not sent again.
        assert receipt.bytes_received < X.nbytes + W.nbytes, code


@pytest.mark.parametrize("kind", CALLERS)
def test_what_a_session_does_counts_once_though_each_call_is_reset(
    proxy: FrameProxy, client: gradwire.Client, kind: str, runner: asyncio.Runner
) -> None:
    def train(session: Any, before: Callable[[], None]) -> Any:
        """One step, with `before` called before each call."""

        def call(method: Any, *arguments: Any, **options: Any) -> Any:
            before()
            return (yield method(*arguments, **options))

        weight = yield from call(session.put, W)
        gradient = yield from call(session.zeros_like, weight)
        for _ in range(2):
            y, context = yield from call(session.forward, X, weight)
            dx = yield from call(session.backward, context, DY, into=gradient)
        yield from call(session.step, gradwire.SGD(lr=0.5), {weight: gradient})
        step = (yield from call(session.describe)).step
        return y, dx, (yield from call(session.get, weight)), np.float32(step)

    async def run(session: Any, before: Callable[[], None]) -> Any:
        work, result = train(session, before), None
        try:
            while True:
                step = work.send(result)
                result = await step if kind == "async" else step
        except StopIteration as done:
            return done.value

    async def undisturbed() -> Any:
        with client.session("16MiB") as session:
            work, result = train(session, lambda: None), None
            try:
                while True:
                    result = work.send(result)
            except StopIteration as done:
                return done.value

    async def disturbed(reset: Reset) -> Any:
        options: Any = {"transport": "grpc", "retries": SOON, "timeout_s": 60}
        codes = iter(CODES)

        def arm() -> None:
            proxy.arm(replace(reset, code=next(codes)))

        if kind == "async":
            async with (
                gradwire.AsyncClient(proxy.address, **options) as one,
                one.session("16MiB") as session,
            ):
                return await run(session, arm)
        with (
            gradwire.connect(proxy.address, **options) as one,
            one.session("16MiB") as session,
        ):
            return await run(session, arm)

    expected = runner.run(undisturbed())
    # What came before the answer, and the answer.
    for reset in (Reset(0, "requests", 1), Reset(0, "responses", 1)):
        before = proxy.resets
        result = runner.run(disturbed(reset))
        assert proxy.resets == before + 9
        assert all(map(oracle.same_bits, result, expected))
    proxy.arm(None)


@pytest.mark.parametrize("kind", CALLERS)
def test_an_early_answer_counts_as_the_server_gave_it(
    busy: ServerProcess, runner: asyncio.Runner, kind: str
) -> None:
    """HAProxy resets a call whose answer came before its request had ended."""
    with FrameProxy(busy.address) as proxy:
        way = Way("s", {"transport": "grpc", "retries": False})
        through: Any = Through(proxy)
        caller = CALLERS[kind](way, through, runner)
        proxy.arm(Reset(CANCEL, with_end=True))
        big = np.empty((1, 1 << 22), np.float32)
        with pytest.raises(gradwire.JobTooLargeError) as refused:
            caller.forward(big, big.T)
        assert proxy.resets == 1
        assert refused.value.status is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "job would hold" in refused.value.details
        caller.close()


def test_a_busy_server_is_asked_again_though_its_answer_is_reset(
    busy: ServerProcess,
) -> None:
    occupied, go_on = threading.Event(), threading.Event()

    def rows() -> Iterator[Any]:
        yield X, DY
        occupied.set()
        go_on.wait(60)

    with (
        FrameProxy(busy.address) as proxy,
        STREAM.connect(busy) as one,
        STREAM.connect(cast("Any", Through(proxy))) as client,
    ):
        occupant = threading.Thread(target=lambda: list(one.stream(rows(), W)))
        occupant.start()
        assert occupied.wait(30)
        proxy.arm(Reset(CANCEL, with_end=True))
        threading.Timer(0.1, go_on.set).start()
        result = client.gradients(X, W, DY)
        occupant.join()
    assert proxy.resets == 1
    assert set(result.receipt.retried) == {"BUSY"}


def test_without_retries_a_reset_is_a_lost_connection(proxy: FrameProxy) -> None:
    with gradwire.connect(proxy.address, retries=False, transport="grpc") as client:
        for code in CODES:
            proxy.arm(Reset(code))
            with pytest.raises(
                gradwire.ConnectionLostError, match="by a proxy"
            ) as lost:
                client.gradients(X, W, DY)
            noted = "client_max_body_size" in str(getattr(lost.value, "__notes__", ""))
            assert noted is (lost.value.status is not grpc.StatusCode.UNAVAILABLE)


@pytest.mark.parametrize(
    ("status", "kind", "sentence"),
    [
        (413, gradwire.ConnectError, "client_max_body_size 0"),
        (404, gradwire.ContractError, "without a route for the path"),
        (502, gradwire.UnavailableError, "grpc_pass"),
        (503, gradwire.UnavailableError, "has no server available"),
        (504, gradwire.UnavailableError, "grpc_read_timeout"),
        (403, gradwire.NotAllowedError, "a proxy before 127.0.0.1"),
        (405, gradwire.ConnectError, "a web server or a proxy answers at 127.0.0.1"),
    ],
)
def test_an_error_page_names_its_cause(
    status: int, kind: type[Exception], sentence: str
) -> None:
    with WebServer(status) as web, pytest.raises(kind, match=sentence) as told:
        gradwire.connect(web.address)
    assert f"status: {status}" in str(told.value)
    assert web.calls == 1


def test_a_web_page_is_not_taken_for_a_slow_server() -> None:
    with WebServer() as web, pytest.raises(gradwire.ConnectError) as told:
        gradwire.connect(web.address, connect_timeout_s=0.2)
    assert "for example a web page" in str(told.value)


def test_a_server_whose_proxy_is_first_is_waited_for(
    small_blocks: ServerProcess,
) -> None:
    with FrameProxy(small_blocks.address) as proxy:
        proxy.arm(Reset(2))
        with gradwire.connect(proxy.address, wait_for_ready_s=30) as client:
            assert client.forward([[2.0]], [[3.0]]).item() == 6
        assert proxy.resets == 1


@pytest.mark.parametrize("kind", CALLERS)
def test_a_lease_is_renewed_again_after_a_proxy_was_away(
    small_blocks: ServerProcess, calling: Calling, runner: asyncio.Runner, kind: str
) -> None:
    with FrameProxy(small_blocks.address) as proxy:
        caller = calling(kind, STREAM, proxy)
        here, gone = (caller.client.session("1MiB") for _ in range(2))
        for session in (here, gone):
            caller.run(session.open())
        proxy.arm(Reset(2))
        assert caller.run(here._lease.renew()) is True
        assert proxy.resets == 1
        caller.run(gone.close())
        assert caller.run(gone._lease.renew()) is False
    assert caller.run(here._lease.renew()) is True  # though nothing listens
    caller.run(here.close())
