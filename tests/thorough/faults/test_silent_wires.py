"""Wires that lose every packet in the middle of a job, so that nobody is told."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any, get_args

import numpy as np
import pytest

import gradwire
from gradwire._transport import endpoint
from tests.support import oracle
from tests.support.behind_proxies import LOST, SOON, moving_threads
from tests.support.observing import wait_until
from tests.support.serving import ServerProcess, running_server
from tests.support.wires import Lost, Wire, wire
from tests.thorough.faults.table import FAULTS

pytestmark = pytest.mark.thorough

ROWS, N, K = 60_000, 30, 20
X, W, DY = oracle.operands(ROWS, N, K)
"""More than the buffers on the way hold."""
IDLE_S = 1.0
SETTINGS: dict[str, Any] = {"row_block_bytes": 1 << 16, "idle_timeout": IDLE_S}


@pytest.fixture(scope="module")
def made() -> Iterator[tuple[Wire, ServerProcess]]:
    with (
        wire() as made,
        running_server(
            prefix=made.prefix,
            listen=[f"{made.host}:0"],
            insecure=True,
            max_jobs=1,
            max_queue=0,
            **SETTINGS,
        ) as server,
    ):
        yield made, server


@pytest.fixture
def silent(made: tuple[Wire, ServerProcess]) -> Iterator[tuple[Wire, ServerProcess]]:
    yield made
    made[0].heal()


class Falls:
    """A job's progress, in the middle of which packets are lost."""

    def __init__(self, wire: Wire, *lost: Lost) -> None:
        self._wire, self._lost = wire, lost
        self._lock = threading.Lock()
        self.silent = threading.Event()

    def __call__(self, progress: gradwire.Progress) -> None:
        with self._lock:  # no thread of the job goes on meanwhile
            if progress.bytes_received and not self.silent.is_set():
                self._wire.lose(*self._lost)
                self.silent.set()


def job_of(server: ServerProcess, name: str) -> dict[str, Any]:
    """The log line of a job that has ended, and holds nothing any more."""
    return server.wait_for_log(
        lambda record: record.get("job_id") == name and "total_s" in record
    )


EACH_WAY: list[Lost] = list(get_args(Lost))


@pytest.mark.parametrize("lost", FAULTS["silent-wire"].cases(EACH_WAY, "every"))
def test_the_job_ends_at_its_deadline_and_the_next_one_succeeds(
    silent: tuple[Wire, ServerProcess], lost: Lost
) -> None:
    between, server = silent
    falls, name = Falls(between, lost), lost.replace(" ", "-")
    out = {"y": np.full((ROWS, K), 7, np.float32)}
    with gradwire.connect(server.address, transport="direct", retries=False) as client:
        client.gradients(X[:100], W, DY[:100])  # the next job has connections
        options: Any = {"on_progress": falls, "request_id": name}
        began = time.monotonic()
        with pytest.raises(gradwire.DeadlineError):
            client.gradients(X, W, DY, out=out, timeout_s=1.5, **options)
        assert falls.silent.is_set()
        assert 1.5 <= time.monotonic() - began < 3
        assert not moving_threads()
        job_of(server, name)  # it has given its memory and its turn back
    between.heal()
    with gradwire.connect(server.address, transport="direct", retries=SOON) as client:
        before = out["y"].copy()
        assert client.gradients(X[:100], W, DY[:100]).receipt.transport == "direct"
        assert out["y"].tobytes() == before.tobytes()


def test_the_server_frees_an_idle_job_and_another_attempt_goes_on(
    silent: tuple[Wire, ServerProcess],
) -> None:
    """Once the wire is back. The client has no deadline that is near."""
    between, server = silent
    falls, found = Falls(between, *EACH_WAY), []
    with gradwire.connect(
        server.address, transport="direct", retries=SOON, timeout_s=60
    ) as client:

        def work() -> None:
            options: Any = {"on_progress": falls, "request_id": "idle"}
            found.append(client.gradients(X, W, DY, **options))

        expected = client.gradients(X, W, DY)
        thread = threading.Thread(target=work)
        thread.start()
        assert falls.silent.wait(20)
        ended = job_of(server, "idle")
        assert ended["total_s"] < IDLE_S + 2
        between.heal()
        thread.join(20)
        (result,) = found
        for matrix in ("y", "dx", "dw"):
            one, other = getattr(result, matrix), getattr(expected, matrix)
            assert oracle.same_bits(one, other)
        assert set(result.receipt.retried) <= LOST
        assert result.receipt.attempts > 1


def test_keepalive_ends_the_call_and_another_server_goes_on(
    silent: tuple[Wire, ServerProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a deadline that is near; gRPC's pings come sooner than a client's do."""
    between, server = silent
    falls = Falls(between, *EACH_WAY)
    own = dict(endpoint.channel_options(server.address))
    own |= {"grpc.keepalive_time_ms": 500, "grpc.keepalive_timeout_ms": 500}
    monkeypatch.setattr(endpoint, "channel_options", lambda _: tuple(own.items()))
    with (
        running_server(**SETTINGS) as other,
        gradwire.connect(
            [server.address, other.address],
            transport="direct",
            retries=SOON,
            timeout_s=60,
        ) as client,
    ):
        began = time.monotonic()
        result = client.gradients(X, W, DY, on_progress=falls)
        assert time.monotonic() - began < 10
        assert falls.silent.is_set()
        assert result.receipt.server_address == other.address
        assert result.receipt.transport == "direct"
        assert set(result.receipt.retried) <= LOST
        between.heal()
    wait_until(lambda: not moving_threads(), "the threads of the call have ended")
