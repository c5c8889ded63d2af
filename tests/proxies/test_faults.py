"""What happens behind each proxy when a server dies, stops, or the proxy is in the way.

`docs/faults.md` has the counts; see `tests/thorough/faults/table.py`.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import gradwire
from tests.proxies.conftest import ROW_BLOCK_BYTES, caller, ready
from tests.proxies.running import (
    ENVOY,
    HAPROXY_HTTP,
    HAPROXY_TCP,
    KINDS,
    NGINX,
    Kind,
    running_proxy,
)
from tests.proxies.test_jobs import same
from tests.scenarios.callers import CALLERS
from tests.scenarios.ways import COMPUTE, STREAM, Way
from tests.support import oracle
from tests.support.serving import ServerProcess, running_server

X, W, DY = oracle.operands(6000, 120, 80)
PARTS = 12
SOON = gradwire.RetryPolicy(initial_backoff_s=0.05, max_backoff_s=1)
IDLE = "timeout client 3s\n    timeout server 3s"
PATIENT = Way("stream", {"transport": "grpc", "retries": SOON})


@contextlib.contextmanager
def pair(**settings: Any) -> Iterator[tuple[ServerProcess, ServerProcess]]:
    """Two servers that a test may end."""
    given = {"row_block_bytes": ROW_BLOCK_BYTES} | settings
    with running_server(**given) as one, running_server(**given) as other:
        yield one, other


def parts_until(meet: Callable[[], None], at: int) -> Iterator[tuple[Any, Any]]:
    """The rows in parts; `meet` is called after so many of them were taken."""
    size = len(X) // PARTS
    for part in range(PARTS):
        if part == at:
            meet()
        yield X[part * size : (part + 1) * size], DY[part * size : (part + 1) * size]


KILL = ServerProcess.kill


def drain(server: ServerProcess) -> None:
    """Ask a server to stop, as a service manager does."""
    server.process.send_signal(signal.SIGTERM)


def instance(server: ServerProcess) -> str:
    """What receipts call a server."""
    with gradwire.connect(server.address, transport="grpc") as client:
        return client.server_info().server_instance


class Streams:
    """One stream, with either client, whose server can be asked for."""

    def __init__(self, of: str, address: str) -> None:
        self._caller = caller(of, address, PATIENT)
        self._stream: Any = None

    def close(self) -> None:
        self._caller.close()

    def run(self, rows: Any) -> tuple[Any, gradwire.Receipt]:
        """Y, dX and dW, and the receipt."""
        client = self._caller.client
        self._stream = client.stream(rows, W, timeout_s=60)

        async def collect() -> Any:
            async with self._stream as stream:
                return [block async for block in stream]

        if isinstance(client, gradwire.AsyncClient):
            blocks = self._caller.run(collect())
        else:
            with self._stream as stream:
                blocks = list(stream)
        firsts = [block.first_row for block in blocks]
        assert firsts == sorted(set(firsts))
        y = np.concatenate([block.y for block in blocks])
        dx = np.concatenate([block.dx for block in blocks])
        return (y, dx, self._stream.dw), self._stream.receipt

    def instance(self) -> str:
        """The server that has accepted the stream."""
        deadline = time.monotonic() + 20
        while (job := self._stream._job) is None or job.exchange.accepted is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return str(job.exchange.accepted.server_instance)


@pytest.mark.parametrize("of", CALLERS)
@pytest.mark.parametrize(
    ("end", "retried"),
    [(KILL, {"UNAVAILABLE"}), (drain, {"DRAINING", "UNAVAILABLE"})],
    ids=["killed", "drained"],
)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_stream_goes_on_at_the_other_server(
    kind: Kind, of: str, end: Callable[[ServerProcess], None], retried: set[str]
) -> None:
    with (
        pair(grace=0.0) as servers,
        running_proxy(kind, [each.address for each in servers]) as address,
        contextlib.closing(Streams(of, address)) as streams,
    ):
        ready(address)
        instances = {instance(each): each for each in servers}
        with gradwire.connect(servers[0].address, transport="grpc") as client:
            expected = client.gradients(X, W, DY)
        ended: list[str] = []

        def meet() -> None:
            ended.append(streams.instance())
            end(instances[ended[0]])

        results, receipt = streams.run(parts_until(meet, PARTS // 2))
        assert same(results, expected)
        assert receipt.server_instance not in ended
        assert receipt.retried
        assert set(receipt.retried) <= retried


@pytest.mark.parametrize("of", CALLERS)
@pytest.mark.parametrize("way", [COMPUTE, STREAM], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_jobs_go_on_while_a_server_drains(kind: Kind, of: str, way: Way) -> None:
    """As in a rolling update: no caller notices."""
    x, dy = X[:500], DY[:500]
    with (
        running_server(row_block_bytes=ROW_BLOCK_BYTES) as third,
        pair(grace=5.0) as servers,
        running_proxy(kind, [each.address for each in servers]) as address,
    ):
        ready(address)
        patient = Way(
            way.name,
            {"transport": "grpc", "retries": SOON},
            in_one_message=way.in_one_message,
        )
        with gradwire.connect(third.address, transport="grpc") as client:
            expected = client.gradients(x, W, dy)
        with contextlib.closing(caller(of, address, patient)) as one:
            for number in range(30):
                if number == 10:
                    drain(servers[0])
                result = one.gradients(x, W, dy, timeout_s=60)
                assert same(result, expected), number
            assert servers[0].process.wait(20) == 0
            # The proxy's health checks have noticed by now, or its next call does.
            for _ in range(10):
                assert same(one.gradients(x, W, dy, timeout_s=60), expected)


@pytest.mark.parametrize("kind", [ENVOY, HAPROXY_HTTP, HAPROXY_TCP], ids=str)
def test_health_checks_take_a_dead_server_out(kind: Kind) -> None:
    with (
        pair() as servers,
        running_proxy(kind, [each.address for each in servers]) as address,
    ):
        ready(address)
        servers[0].kill()
        time.sleep(4)  # two failed checks, a second apart
        for _ in range(8):
            with gradwire.connect(address, transport="grpc", retries=False) as client:
                assert client.forward([[2.0]], [[3.0]]).item() == 6


@pytest.mark.parametrize("kind", [ENVOY, HAPROXY_HTTP], ids=str)
def test_a_server_that_drains_gets_no_new_calls_and_ends_its_own(kind: Kind) -> None:
    with (
        pair(grace=30.0) as servers,
        running_proxy(kind, [each.address for each in servers]) as address,
        contextlib.closing(Streams("sync", address)) as streams,
    ):
        ready(address)
        instances = {instance(each): each for each in servers}

        ran: list[str] = []

        def meet() -> None:
            drain(instances[streams.instance()])
            time.sleep(4)  # two failed checks, a second apart
            with gradwire.connect(address, transport="grpc", retries=False) as client:
                for _ in range(8):
                    try:
                        job = client.gradients(X[:9], W, DY[:9])
                    except gradwire.GradwireError as error:
                        ran.append(str(error))
                    else:
                        ran.append(job.receipt.server_instance)

        _, receipt = streams.run(parts_until(meet, PARTS // 2))
        assert receipt.attempts == 1
        (other,) = instances.keys() - {receipt.server_instance}
        assert ran == [other] * 8


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (ENVOY, ("stream_idle_timeout: 300s", "stream_idle_timeout: 3s")),
        (HAPROXY_HTTP, ("timeout client 1h\n    timeout server 1h", IDLE)),
        (HAPROXY_TCP, ("timeout client 1h\n    timeout server 1h", IDLE)),
        (NGINX, ("grpc_read_timeout 1h", "grpc_read_timeout 3s")),
    ],
    ids=str,
)
def test_a_job_that_waits_is_not_idle(kind: Kind, change: tuple[str, str]) -> None:
    with (
        pair(max_jobs=1, queued_every_s=1.5) as servers,
        running_proxy(
            kind, [each.address for each in servers], dict([change])
        ) as address,
        contextlib.ExitStack() as occupied,
    ):
        ready(address)
        go_on = threading.Event()

        def rows() -> Iterator[Any]:
            yield X[:10], DY[:10]
            go_on.wait(60)

        for each in servers:
            client = occupied.enter_context(
                gradwire.connect(each.address, transport="grpc")
            )
            runs = threading.Event()
            stream = client.stream(
                rows(), W, on_progress=lambda progress, runs=runs: runs.set()
            )
            reader = threading.Thread(target=list, args=[stream])
            reader.start()
            occupied.callback(reader.join)
            assert runs.wait(20)
        occupied.callback(go_on.set)
        threading.Timer(8, go_on.set).start()
        with gradwire.connect(address, transport="grpc", retries=False) as waits:
            result = waits.gradients(X, W, DY, timeout_s=60)
        assert result.receipt.queued_s > 6
