"""Direct connections that break, are silent or cannot be opened, and their clients.

The call and the port for direct connections each have a proxy of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import gradwire
from gradwire._client.job_factory import Tuning
from gradwire._transport.direct import policy
from tests.cli.conftest import environment
from tests.support import oracle
from tests.support.behind_proxies import (
    ALL,
    DY,
    LOST,
    Behind,
    K,
    M,
    N,
    W,
    X,
    behind_proxies,
    moving_threads,
)
from tests.support.direct_listener import silent_port
from tests.support.observing import descriptors, memory_of, wait_until
from tests.support.proxy import Direction, Fault
from tests.support.serving import running_server


def assert_same(result: gradwire.Gradients, expected: gradwire.Gradients) -> None:
    for name in ALL:
        one = getattr(result, name)
        if one is not None:
            assert oracle.same_bits(one, getattr(expected, name)), name


# Connections that break: see also tests/thorough/faults/test_direct_cuts.py.


def test_without_retries_nothing_is_written_after_the_error(behind: Behind) -> None:
    """And the job's memory is the caller's again."""
    with behind.connect(retries=False) as client:
        places: list[tuple[Direction, int]] = [
            *(("requests", at) for at in (300, 5000, 40_000)),
            *(("responses", at) for at in (300, 5000, 40_000)),
        ]
        for of, at in places:
            out = {"y": np.full((M, K), 7, np.float32)}
            behind.data.arm(Fault(of, cut_after_bytes=at))
            with pytest.raises(gradwire.ConnectionLostError):
                client.gradients(X, W, DY, results=ALL, out=out)
            before = out["y"].copy()
            assert not moving_threads()
            assert out["y"].tobytes() == before.tobytes()
        behind.data.arm(None)
        for of in ("requests", "responses"):
            out = {"y": np.full((M, K), 7, np.float32)}
            behind.call.arm(Fault(of, cut_after_messages=2))  # the call, rather
            with pytest.raises(gradwire.ConnectionLostError):
                client.gradients(X, W, DY, results=ALL, out=out)
            assert not moving_threads()


def test_a_flipped_bit_is_found_by_its_checksum(
    behind: Behind, expected: gradwire.Gradients
) -> None:
    with behind.connect() as client:
        client.gradients(X, W, DY, results=ALL, checksum=True)
        for of, at in [("requests", 5000), ("requests", 40_000), ("responses", 9_000)]:
            behind.data.arm(Fault(of, flip_byte=at))
            result = client.gradients(X, W, DY, results=ALL, checksum=True)
            assert_same(result, expected)
            assert result.receipt.attempts == 2, (of, at)


# Silence.


@pytest.mark.thorough
def test_a_port_that_is_silent_ends_the_job_and_harms_no_other(
    behind: Behind, expected: gradwire.Gradients
) -> None:
    with (
        behind.connect(retries=False) as client,
        behind.connect(transport="grpc") as other,
    ):
        client.gradients(X, W, DY)  # the next call has connections already
        behind.data.pause()
        began = time.monotonic()
        with pytest.raises(gradwire.GradwireError):
            client.gradients(X, W, DY)
        assert time.monotonic() - began < 10
        assert_same(other.gradients(X, W, DY), expected)


def test_a_network_that_is_silent_ends_at_the_deadline(behind: Behind) -> None:
    with behind.connect() as client:
        client.gradients(X, W, DY)
        began, stop = time.monotonic(), threading.Timer(0.0, behind.call.pause)
        behind.data.pause()
        stop.start()
        with pytest.raises(gradwire.GradwireError):
            client.gradients(X, W, DY, timeout_s=1.5)
        assert time.monotonic() - began < 10
        assert not moving_threads()
        behind.heal()


LATE_S = 0.5
"""What calls have, whose results do not come."""


@contextlib.contextmanager
def late_results(behind: Behind) -> Iterator[None]:
    """Let the first results of a call pass, and then nothing.

    The server can send the rest, as it fits the buffers on the way: for it, the call
    has ended well.
    """
    began = time.monotonic()
    behind.data.arm(Fault("responses", pause_after_bytes=3000))
    with pytest.raises(gradwire.DeadlineError):
        yield
    assert LATE_S <= time.monotonic() - began < LATE_S + 1
    assert behind.data.bytes["responses"] > 3000
    wait_until(lambda: not moving_threads(), "the threads of the call have ended")
    behind.heal()


def test_results_that_are_late_end_the_call_at_its_deadline(behind: Behind) -> None:
    """Also if the server has sent them in time."""
    out = {"y": np.full((M, K), 7, np.float32)}
    with behind.connect(timeout_s=LATE_S) as client:
        with late_results(behind):
            client.gradients(X, W, DY, results=ALL, out=out)
        before = out["y"].copy()
        with late_results(behind):
            list(client.stream(iter([(X, DY)]), W))
        with client.session("1MiB") as session:
            weight = session.put(X)
            with late_results(behind):
                session.get(weight)
        assert out["y"].tobytes() == before.tobytes()


async def test_results_that_are_late_end_the_call_of_a_task_too(behind: Behind) -> None:
    out = {"y": np.full((M, K), 7, np.float32)}
    async with gradwire.AsyncClient(
        behind.call.address, transport="direct", timeout_s=LATE_S
    ) as client:
        with late_results(behind):
            await client.gradients(X, W, DY, results=ALL, out=out)
        before = out["y"].copy()
        with late_results(behind):
            async for _ in client.stream(iter([(X, DY)]), W):
                pass
        async with client.session("1MiB") as session:
            weight = await session.put(X)
            with late_results(behind):
                await session.get(weight)
        assert out["y"].tobytes() == before.tobytes()


def test_opening_connections_ends_at_the_deadline_of_a_job_that_waited(
    behind: Behind,
) -> None:
    with behind.connect(timeout_s=0.9) as client:
        behind.data.pause()
        behind.call.arm(Fault("responses", pause_after_bytes=1))
        resume = threading.Timer(0.7, behind.call.resume)
        began = time.monotonic()
        resume.start()
        with pytest.raises(gradwire.DeadlineError):
            client.gradients(X, W, DY)
        assert time.monotonic() - began < 1.4
        resume.join()


@pytest.mark.parametrize("where", ["refused", "filtered", "off"])
def test_connections_that_cannot_be_opened_cost_a_second_once(
    where: str, expected: gradwire.Gradients, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy, "_MIN_BYTES", 1000)
    settings: Any = {"data_listen": "off"}
    with silent_port() as silent:
        if where != "off":
            port = silent if where == "filtered" else 1
            settings = {"data_advertise": f"127.0.0.1:{port}"}
        with (
            running_server(row_block_bytes=4096, **settings) as server,
            gradwire.connect(server.address) as client,
        ):
            client._engine.jobs.tuning = Tuning(unary=False)
            times = []
            for _ in range(3):
                began = time.monotonic()
                result = client.gradients(X, W, DY, results=ALL)
                times.append(time.monotonic() - began)
                assert_same(result, expected)
                assert result.receipt.transport == "tcp"
                assert result.receipt.attempts == 1
            # No second attempt, and then none, which each take a second.
            assert times[0] < 2
            assert max(times[1:]) < 1


# Clients that stop.


class Held:
    """A job whose results do not come, while the proxy is paused."""

    def __init__(self, behind: Behind) -> None:
        self.behind = behind
        self.operands = oracle.operands(8000, N, K)  # more than the proxy lets through
        self.out = {"y": np.full((8000, K), 7, np.float32)}
        self.begun = threading.Event()
        self.options: Any = {"out": self.out, "on_progress": self._progress}

    def _progress(self, progress: gradwire.Progress) -> None:
        if progress.bytes_received > 3000 and not self.begun.is_set():
            self.behind.data.pause()
            self.begun.set()

    def assert_left_alone(self) -> None:
        """Nothing of the job goes on, also when the network does."""
        assert not moving_threads()
        before = self.out["y"].copy()
        self.behind.heal()
        time.sleep(0.1)
        assert self.out["y"].tobytes() == before.tobytes()


def test_jobs_that_end_at_their_deadline_break_no_connection(
    behind: Behind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such jobs, and jobs that fail, do not have later ones travel in messages."""
    monkeypatch.setattr(policy, "_MIN_BYTES", 1000)
    with behind.connect(transport="auto") as client:
        client._engine.jobs.tuning = Tuning(unary=False)
        for _ in range(3):
            held = Held(behind)
            with pytest.raises(gradwire.DeadlineError):
                client.gradients(*held.operands, timeout_s=0.4, **held.options)
            assert held.begun.is_set()
            held.assert_left_alone()
        assert client.gradients(X, W, DY).receipt.transport == "direct"


def test_a_client_that_is_closed_ends_its_job(behind: Behind) -> None:
    client, held = behind.connect(), Held(behind)
    closer = threading.Thread(target=lambda: (held.begun.wait(20), client.close()))
    closer.start()
    with pytest.raises(gradwire.GradwireError):
        client.gradients(*held.operands, **held.options)
    closer.join()
    held.assert_left_alone()


def test_ctrl_c_ends_the_job(behind: Behind) -> None:
    held = Held(behind)

    def interrupt() -> None:
        held.begun.wait(20)
        os.kill(os.getpid(), signal.SIGINT)

    with behind.connect() as client:
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            client.gradients(*held.operands, **held.options)
        thread.join()
        held.assert_left_alone()
        assert client.gradients(X, W, DY).receipt.transport == "direct"


@pytest.mark.parametrize(
    "after_error", [False, pytest.param(True, marks=pytest.mark.thorough)]
)
async def test_a_task_that_is_cancelled_ends_its_job(
    behind: Behind, monkeypatch: pytest.MonkeyPatch, after_error: bool
) -> None:
    """Also while it waits for what comes behind the server's error."""
    held = Held(behind)
    async with gradwire.AsyncClient(
        behind.call.address, transport="direct", retries=False
    ) as client:
        task = asyncio.create_task(client.gradients(*held.operands, **held.options))
        await asyncio.to_thread(held.begun.wait, 20)
        if after_error:  # which comes in two seconds; then results may come for two
            await asyncio.sleep(2.6)
        task.cancel()
        with (
            contextlib.suppress(gradwire.GradwireError),
            pytest.raises(asyncio.CancelledError),
        ):
            await task
        held.assert_left_alone()


PROGRAM = """
    import sys
    import numpy as np, gradwire
    from tests.support import oracle
    address = sys.argv[1]
    x, w, dy = oracle.operands(40_000, 30, 20)
    client = gradwire.connect(address, transport="direct")
    client.gradients(x[:100], w, dy[:100])
    def on_progress(progress):
        if progress.bytes_received:
            print("going", flush=True)
            sys.stdin.readline()
    client.gradients(x, w, dy, on_progress=on_progress, timeout_s=60)
"""


@pytest.mark.thorough
def test_a_client_that_is_killed_in_a_frame_leaves_nothing_on_the_server(
    shared_behind: Behind,
) -> None:
    server = shared_behind.server
    before = descriptors(server.pid)
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), server.address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "going\n"
        process.kill()
    wait_until(lambda: descriptors(server.pid) <= before + 8, "descriptors are closed")


def test_a_server_that_is_killed_in_a_frame_is_replaced() -> None:
    with (
        behind_proxies() as behind,
        running_server(row_block_bytes=4096) as other,
        behind.connect() as client,
    ):
        held = Held(behind)
        with gradwire.connect(other.address, transport="grpc") as direct:
            expected = direct.gradients(*held.operands, results=ALL)

        def replace() -> None:
            held.begun.wait(20)
            behind.server.kill()
            behind.call.target = other.address
            behind.heal()

        thread = threading.Thread(target=replace)
        thread.start()
        result = client.gradients(*held.operands, results=ALL, **held.options)
        thread.join()
        assert_same(result, expected)
        assert set(result.receipt.retried) <= LOST
        assert result.receipt.retried
        assert result.receipt.transport == "direct"


@pytest.mark.thorough
@pytest.mark.parametrize("lasts_s", [0.3, 1.5])
def test_a_server_that_stops_hands_the_job_over(lasts_s: float) -> None:
    """What it has computed is kept, and the rest comes from another one."""
    x, w, dy = oracle.operands(60_000, N, 60)  # more than the network holds
    settings = {"row_block_bytes": 1 << 18, "grace": 0.05}
    with behind_proxies(**settings) as behind, running_server(**settings) as other:
        behind.call.target = other.address
        with behind.connect(transport="grpc") as client:
            expected = client.gradients(x, w, dy, results=ALL)
        behind.call.cut()
        behind.call.target = behind.server.address
        progress: list[gradwire.Progress] = []

        def stop(each: gradwire.Progress) -> None:
            if each.bytes_received > 1 << 20 and not progress:
                progress.append(each)
                behind.data.pause()
                behind.call.target = other.address
                behind.server.process.terminate()
                threading.Timer(lasts_s, behind.data.resume).start()

        with behind.connect() as client:
            result = client.gradients(x, w, dy, results=ALL, on_progress=stop)
        assert_same(result, expected)
        assert result.receipt.retried[0] == "DRAINING"
        assert result.receipt.m == len(x)
        assert 0 < result.receipt.bytes_received < x.nbytes + w.nbytes + dy.nbytes


@pytest.mark.thorough
def test_a_job_that_is_handed_over_ends_at_its_deadline() -> None:
    """What the server has sent before may be on its way for longer than that."""
    x, w, dy = oracle.operands(60_000, N, K)
    paused = threading.Event()
    with behind_proxies(grace=0.05) as behind, behind.connect() as client:

        def stop(each: gradwire.Progress) -> None:
            if each.bytes_received and not paused.is_set():
                paused.set()
                behind.data.pause()
                behind.server.process.terminate()

        began = time.monotonic()
        with pytest.raises(gradwire.GradwireError):
            client.gradients(x, w, dy, timeout_s=1.0, on_progress=stop)
        assert paused.is_set()
        assert time.monotonic() - began < 1.8
        assert not moving_threads()


# What is left over.


@pytest.mark.big
def test_two_hundred_jobs_leave_nothing_over(shared_behind: Behind) -> None:
    """On either side: neither memory, nor threads, nor descriptors."""
    server = shared_behind.server
    x, w, dy = oracle.operands(800, N, K)

    def left() -> tuple[int, int, int, int]:
        gc.collect()
        return (
            len(threading.enumerate()),
            descriptors(os.getpid()),
            descriptors(server.pid),
            memory_of(os.getpid(), "VmRSS") + memory_of(server.pid, "VmRSS"),
        )

    with gradwire.connect(server.address, transport="direct", retries=False) as client:
        for number in range(240):
            if number == 40:
                threads, own, others, memory = left()
            rows = 200 + 20 * (number % 30)
            if number % 8 == 7:
                with pytest.raises(gradwire.GradwireError):
                    client.gradients(x, w, dy, timeout_s=0.004 + number / 50_000)
                continue
            client.gradients(x[:rows], w, dy[:rows])

        def is_flat() -> bool:
            now = left()
            return now[0] <= threads and now[1] <= own + 8 and now[2] <= others + 8

        wait_until(is_flat, "threads and descriptors are gone")
        assert left()[3] < memory + (24 << 20)
