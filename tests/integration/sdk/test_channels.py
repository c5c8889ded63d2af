"""Jobs over several connections, and what becomes of those that do not get them."""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import gradwire
from tests import oracle
from tests.integration.sdk.callers import CALLERS, Caller
from tests.integration.sdk.ways import Way, over
from tests.serving import ServerProcess, running_server


def operands(m: int, n: int, k: int) -> tuple[Any, Any, Any]:
    return oracle.operands(m, n, k)


def pieces(x: Any, dy: Any, rows: int) -> Iterator[Any]:
    for first in range(0, len(x), rows):
        yield x[first : first + rows], dy[first : first + rows]


def caller_over(kind: str, channels: int, address: str, **options: Any) -> Caller:
    """A client of so many connections, which may have to do with one."""
    way = replace(over(channels), left_with_one=True)
    way = replace(way, options={**way.options, **options})
    return CALLERS[kind](way, SimpleNamespace(addresses=(address, "")))


def test_small_jobs_take_one_connection(small_blocks: ServerProcess) -> None:
    x, w, dy = operands(50, 30, 20)
    with gradwire.connect(small_blocks.address, channels=4, transport="tcp") as client:
        assert client.gradients(x, w, dy).receipt.connections == 1


@pytest.mark.parametrize("kind", CALLERS)
def test_a_job_in_shared_memory_takes_one_connection_and_a_stream_many(
    small_blocks: ServerProcess, kind: str
) -> None:
    way = Way("shm", {"transport": "shm", "channels": 3})
    x, w, dy = operands(300, 30, 20)
    caller = CALLERS[kind](way, small_blocks)
    shared = caller.run(caller.client.gradients(x, w, dy))
    blocks, dw, receipt = caller.stream(pieces(x, dy, 100), w)
    caller.close()
    assert (shared.receipt.transport, shared.receipt.connections) == ("shm", 1)
    assert (receipt.transport, receipt.connections) == ("tcp", 3)
    assert dw.tobytes() == shared.dw.tobytes()
    assert np.concatenate([b.y for b in blocks]).tobytes() == shared.y.tobytes()


@pytest.mark.parametrize("channels", [True, 0, 17, -1, 1.5, "2"])
def test_channels_that_cannot_be_are_refused(channels: Any) -> None:
    with pytest.raises(gradwire.InputError, match="channels is"):
        gradwire.Client("localhost:1", channels=channels)


def endless() -> Iterator[Any]:
    x, _, dy = operands(100, 30, 20)
    while True:
        yield x, dy


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
    caller = caller_over(kind, 3, small_blocks.address)
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
    caller = caller_over(kind, 3, small_blocks.address)
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
        caller = caller_over(kind, 2, balancer.address)
        x, w, dy = operands(300, 30, 20)
        actual = caller.gradients(x, w, dy)
        blocks, dw, receipt = caller.stream(pieces(x, dy, 100), w)
        caller.close()
        assert actual.receipt.connections == receipt.connections == 1
        assert np.concatenate([b.y for b in blocks]).tobytes() == actual.y.tobytes()
        assert dw.tobytes() == actual.dw.tobytes()
        other.wait_for_log("JOIN_UNKNOWN")
        # What the first found out, the second did not try again.
        assert other.logs.count("JOIN_UNKNOWN") == 1


@pytest.mark.parametrize("kind", CALLERS)
def test_connections_that_reach_nobody_leave_the_job_on_one(kind: str) -> None:
    with (
        running_server(block_bytes=4096, idle_timeout=0.5) as server,
        Balancer(server.address, None) as balancer,
    ):
        caller = caller_over(kind, 2, balancer.address)
        actual = caller.gradients(*operands(300, 30, 20))
        assert actual.receipt.connections == 1
        caller.close()


@pytest.mark.parametrize("kind", CALLERS)
def test_a_deadline_passes_while_connections_are_waited_for(
    small_blocks: ServerProcess, kind: str
) -> None:
    with Balancer(small_blocks.address, None) as balancer:
        caller = caller_over(kind, 2, balancer.address)
        with pytest.raises(gradwire.DeadlineError):
            caller.gradients(*operands(300, 30, 20), timeout_s=0.5)
        caller.close()


@pytest.mark.parametrize("kind", CALLERS)
@pytest.mark.parametrize("broken", [0, 1])
def test_a_connection_that_breaks_fails_the_job_and_says_so(
    small_blocks: ServerProcess, kind: str, broken: int
) -> None:
    with Balancer(small_blocks.address) as balancer:
        caller = caller_over(kind, 2, balancer.address, retries=False)

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
