"""A server that stops while clients are connected: they are told, its log is clean.

Clients that end without closing: they print nothing, and their memory is given back.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.cli.conftest import environment, started
from tests.scenarios import ways
from tests.scenarios.ways import Way
from tests.support.observing import wait_until
from tests.support.serving import ServerProcess
from tests.support.shared_memory import descriptors

WAYS = pytest.mark.parametrize("way", [ways.STREAM, ways.COPIED], ids=str)

ENDS_WITHIN_S = 15.0
"""Seconds beyond the grace period, on a machine that is busy with other things."""

PROGRAM = """
    import asyncio, inspect, signal, sys
    import numpy as np
    import gradwire

    address, transport, kind, rows, columns, then = sys.argv[1:]
    x = np.ones((int(rows), int(columns)))
    w = np.ones((x.shape[1], x.shape[1]))

    async def done(value):
        return await value if inspect.isawaitable(value) else value

    async def run():
        retries = gradwire.RetryPolicy(attempts=3)
        client = getattr(gradwire, kind)(address, transport=transport, retries=retries)
        await done(client.gradients(x[:1], w, x[:1]))
        print("connected", flush=True)
        if then == "exit":
            return client
        if then == "wait":
            sys.stdin.read()
        try:
            while True:
                await done(client.gradients(x, w, x, timeout_s=20))
        except gradwire.GradwireError as error:
            print(type(error).__name__)
        await done(client.close())

    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    kept = asyncio.run(run())
"""


@contextlib.contextmanager
def client_process(
    address: str, way: Way, kind: str, then: str, m: int = 64, n: int = 64
) -> Iterator[subprocess.Popen[str]]:
    """A program with a client that has computed a job.

    Args:
        address: The server's.
        way: How its jobs travel.
        kind: The client's class.
        then: "work": jobs of m rows, one after the other, until one fails; "wait": a
            job once the standard input ends; "exit": the program ends, and closes
            nothing.
        m: Rows of its jobs.
        n: Columns of its operands.
    """
    arguments = (address, str(way.options["transport"]), kind, str(m), str(n), then)
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "connected\n"
            yield process
        finally:
            process.kill()


@dataclass(frozen=True)
class Command:
    """A running `gradwire serve`."""

    process: subprocess.Popen[str]
    address: str
    log: Path


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """Starts `gradwire serve` with shared memory and more settings."""
    with contextlib.ExitStack() as stack:

        def start(*settings: str) -> Command:
            own = ("--listen=127.0.0.1:0", "--allow-shared-memory", "--backend=numpy")
            log = tmp_path / "log"
            # No pipe: a server drops entries that nobody reads.
            stderr = stack.enter_context(log.open("w"))
            process = stack.enter_context(
                started("serve", *own, *settings, stderr=stderr)
            )
            assert process.stdout is not None
            ready = process.stdout.readline()
            return Command(process, ready.split(" serves on ")[1].split(" ")[0], log)

        yield start


def computing(server: Command) -> Callable[[], bool]:
    """Whether a server has computed for a moment, from now on."""
    process = psutil.Process(server.process.pid)
    before = process.cpu_times().user
    return lambda: process.cpu_times().user - before > 0.1


def stop(server: Command, signals: Sequence[signal.Signals], grace_s: float) -> None:
    """Send signals to a server, and wait for its orderly end."""
    begun = time.monotonic()
    for number, signum in enumerate(signals):
        if number:
            # Not both at once: the first one has begun to stop the server by now.
            time.sleep(0.05)
        server.process.send_signal(signum)
    assert server.process.wait(grace_s + ENDS_WITHIN_S) == 0
    assert time.monotonic() - begun < grace_s + ENDS_WITHIN_S
    assert_orderly(server.log.read_text())


def assert_orderly(log: str) -> None:
    """That a log has no fault, and that nothing happened to calls after the end."""
    assert all(line.startswith("{") for line in log.splitlines()), log[-2000:]
    entries = [json.loads(line) for line in log.splitlines()]
    assert not [each for each in entries if each["level"] == "error"]
    events = [each["event"] for each in entries]
    assert events.index("draining") < events.index("stopped") == len(events) - 1


SIGNALS = pytest.mark.parametrize(
    ("signals", "grace_s", "within_s"),
    [
        pytest.param((signal.SIGTERM,), 20, 20, id="drained", marks=pytest.mark.big),
        pytest.param(
            (signal.SIGTERM,), 0.1, 0.1, id="grace-over", marks=pytest.mark.big
        ),
        pytest.param((signal.SIGTERM, signal.SIGINT), 600, 0, id="second-signal"),
    ],
)


@WAYS
@SIGNALS
def test_the_log_is_clean_of_a_client_that_is_killed_while_its_server_stops(
    serve: Callable[..., Command],
    way: Way,
    signals: Sequence[signal.Signals],
    grace_s: float,
    within_s: float,
) -> None:
    server = serve(f"--grace={grace_s}", "--row-block-bytes=1GiB")
    # One block, which the device computes for a while, and which nobody can interrupt.
    with client_process(server.address, way, "Client", "work", 2048, 1024) as killed:
        wait_until(computing(server), "the block is being computed")
        killed.kill()
        killed.wait()
    stop(server, signals, within_s)


@SIGNALS
def test_clients_with_shared_memory_of_a_server_that_stops_are_told(
    serve: Callable[..., Command],
    signals: Sequence[signal.Signals],
    grace_s: float,
    within_s: float,
) -> None:
    server = serve(f"--grace={grace_s}")
    with contextlib.ExitStack() as clients:
        processes = [
            clients.enter_context(
                client_process(server.address, ways.COPIED, kind, then)
            )
            for kind in ("Client", "AsyncClient")
            for then in ("work", "wait")
        ]
        stop(server, signals, within_s)
        for process in processes:
            assert process.communicate(timeout=60) == ("ConnectError\n", "")
            assert process.returncode == 0


@pytest.mark.parametrize("kind", ["Client", "AsyncClient"])
@pytest.mark.parametrize(
    "then", ["exit", "work", pytest.param("wait", marks=pytest.mark.big)]
)
def test_a_client_that_ends_without_closing_prints_nothing_and_leaves_no_memory(
    small_blocks: ServerProcess, kind: str, then: str
) -> None:
    before = descriptors(small_blocks.pid)
    address, way = small_blocks.address, ways.COPIED
    with client_process(address, way, kind, then) as process:
        if then != "exit":
            process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=60) == ("", "")
        assert process.returncode == 0
    wait_until(lambda: descriptors(small_blocks.pid) == before, "its memory is freed")
