"""How long a job's memory lives in the client."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import gradwire
from tests.scenarios.ways import COMPUTE, DIRECT, SHARED, STREAM, Way, serving_all
from tests.support import oracle
from tests.support.frame_proxy import FrameProxy, Reset
from tests.support.observing import wait_until
from tests.support.serving import ServerProcess

X, W, DY = oracle.operands(400, 30, 20)


@pytest.fixture
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("without_collector")
@pytest.mark.parametrize("transport", ["grpc", "direct"])
def test_operands_and_results_go_with_their_last_reference(
    transport: str, small_blocks: ServerProcess
) -> None:
    """A reference cycle would keep them until the garbage collector runs.

    It counts objects, not their bytes, and so may be gigabytes late.
    """
    with gradwire.connect(small_blocks.address, transport=transport) as client:
        x = X.copy()
        out = np.empty_like(x)
        seen = [weakref.ref(x), weakref.ref(out)]
        client.gradients(x, W, DY, out={"dx": out})
        del x, out
        assert [each() for each in seen] == [None, None]
        x = X.copy()
        seen = [weakref.ref(x)]
        with client.stream([(x, DY)], W) as stream:
            seen += [weakref.ref(block.dx) for block in stream]
        del x, stream
        assert not any(each() is not None for each in seen)


WIDE = np.empty((30, 1 << 19), np.float32)
"""W of a job that is too large for `server`."""
ONCE: Any = {"retries": False, "timeout_s": 60}


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with serving_all(memory_limit=64 << 20, row_block_bytes=4096) as server:
        yield server


class BrokenOffError(Exception):
    """The caller's own error."""


def break_off(_: object) -> None:
    raise BrokenOffError


def parts(x: Any, *, fail: bool = False) -> Iterator[tuple[Any, Any]]:
    for first in range(0, len(x), 50):
        if fail and first == 200:
            raise BrokenOffError
        yield x[first : first + 50], DY[first : first + 50]


def keep(client: gradwire.Client, x: Any, size: str, **options: Any) -> None:
    with client.session(size) as session:
        session.forward(session.put(x), session.put(W), **options)


JOBS: dict[str, Callable[[Any, Any], Any]] = {
    "too large": lambda client, x: client.forward(x, WIDE),
    "too late": lambda client, x: client.gradients(x, W, DY, timeout_s=1e-6),
    "broken off": lambda c, x: c.gradients(x, W, DY, on_progress=break_off),
}
STREAMS: dict[str, Callable[[Any, Any], Any]] = {
    "stream broken off": lambda client, x: list(client.stream(parts(x, fail=True), W)),
    "stream too late": lambda c, x: list(c.stream(parts(x), W, timeout_s=1e-6)),
    "session full": lambda client, x: keep(client, x, "8KiB"),
    "session too late": lambda c, x: keep(c, x, "1MiB", timeout_s=1e-6),
}


def outcome(call: Callable[[Any], Any]) -> str:
    """How a call ends, of which nothing may hold X then."""
    x = X.copy()
    held = weakref.ref(x)
    try:
        call(x)
    except (gradwire.GradwireError, BrokenOffError) as error:
        ended = type(error).__name__
    else:
        ended = "ok"
    del x
    # A thread may be about to end.
    wait_until(lambda: held() is None, "the release of X", 5)
    return ended


@pytest.mark.usefixtures("without_collector")
@pytest.mark.parametrize(
    ("way", "how"),
    [
        *((way, how) for way in (COMPUTE, STREAM, DIRECT, SHARED) for how in JOBS),
        *((way, how) for way in (STREAM, DIRECT) for how in STREAMS),
    ],
    ids=str,
)
def test_a_failed_call_holds_no_operands(
    server: ServerProcess, way: Way, how: str
) -> None:
    """Its error's traceback refers to them; the error must not refer to itself."""
    with way.connect(server, **ONCE) as client:
        assert outcome(lambda x: (JOBS | STREAMS)[how](client, x)) != "ok"


@pytest.mark.usefixtures("without_collector")
@pytest.mark.parametrize("way", [COMPUTE, STREAM, DIRECT, SHARED], ids=str)
@pytest.mark.parametrize("how", JOBS)
def test_a_failed_asynchronous_call_holds_no_operands(
    server: ServerProcess, runner: asyncio.Runner, way: Way, how: str
) -> None:
    async def call(x: Any) -> None:
        async with way.async_client(server, **ONCE) as client:
            await JOBS[how](client, x)

    async def outcome_of(x: Any) -> str:
        try:
            await call(x)
        except (gradwire.GradwireError, BrokenOffError) as error:
            return type(error).__name__
        return "ok"

    def run(x: Any) -> None:
        # A task that fails refers to its error, and the error to it.
        assert runner.run(outcome_of(x)) != "ok"

    assert outcome(run) == "ok"


@pytest.mark.usefixtures("without_collector")
@pytest.mark.parametrize("of", ["requests", "responses"])
@pytest.mark.parametrize("again", [False, True])
def test_an_attempt_that_was_cut_off_holds_no_operands(
    server: ServerProcess, of: Any, again: bool
) -> None:
    retries = gradwire.RetryPolicy(initial_backoff_s=0.01) if again else False
    with FrameProxy(server.addresses[0]) as proxy:
        options: Any = {"transport": "grpc", "retries": retries}
        with gradwire.connect(proxy.address, **options) as client:
            client._engine.jobs.tuning = STREAM.tuning()
            ended = "ok" if again else "ConnectionLostError"
            proxy.arm(Reset(2, of))
            assert outcome(lambda x: client.gradients(x, W, DY)) == ended
            proxy.arm(Reset(2, of))
            assert outcome(lambda x: list(client.stream(parts(x), W))) == ended
            assert proxy.resets == 2
