"""Servers and clients that die, or that stand still for longer than is waited for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import StatusCode

import gradwire
from tests.support.proxy import Proxy
from tests.support.raw import Stream, make_job
from tests.thorough.faults.conftest import EXTENTS, Watched, connected, watched_server
from tests.thorough.faults.jobs import bits, compute
from tests.thorough.faults.table import FAULTS

JOB = "all results"
EVENTS = 80
"""Least reports of progress of the job: one for each message, but for its header."""
ROOT = Path(__file__).parents[3]
IDLE_S = 0.5
STOPPED_S = 2 * IDLE_S


def at_event(number: int, act: Callable[[], None]) -> Callable[[Any], None]:
    """What, as `on_progress`, acts once: at a job's so many-th message."""
    return told_at_event(number, lambda _: act())


def told_at_event(
    number: int, act: Callable[[gradwire.Progress], None]
) -> Callable[[gradwire.Progress], None]:
    """The same, and is told how far the job has come."""
    events = 0
    lock = threading.Lock()

    def on_progress(progress: gradwire.Progress) -> None:
        nonlocal events
        with lock:
            events += 1
            here = events == number
        if here:
            act(progress)

    return on_progress


@pytest.fixture(scope="module")
def expected(watched: Watched) -> tuple[bytes, ...]:
    """The bits of the job when nothing happens to it."""
    with connected(watched.process.address) as client:
        return bits(compute(client, JOB), JOB)


def test_the_job_has_as_many_messages_as_the_suite_takes_it_for(watched):
    seen: list[Any] = []
    with connected(watched.process.address) as client:
        compute(client, JOB, on_progress=seen.append)
    # There is one more if the job is accepted before its first rows have been sent.
    assert len(seen) in {EVENTS, EVENTS + 1}


@pytest.mark.parametrize("extent", EXTENTS)
def test_a_job_whose_server_is_killed_goes_on_at_the_next_one(
    watched, expected, extent
):
    for event in FAULTS["server-killed"].cases(range(1, EVENTS), extent):
        with (
            watched_server() as doomed,
            Proxy(doomed.process.address) as proxy,
            connected(proxy.address, timeout_s=20) as client,
        ):
            killed_at: list[gradwire.Progress] = []

            def kill(
                progress: gradwire.Progress,
                doomed: Watched = doomed,
                proxy: Proxy = proxy,
                killed_at: list[gradwire.Progress] = killed_at,
            ) -> None:
                killed_at.append(progress)
                proxy.target = watched.process.address
                doomed.process.kill()

            result = compute(client, JOB, on_progress=told_at_event(event, kill))
            assert doomed.process.process.poll() == -signal.SIGKILL
        # Once all rows were sent, all results may have left the server before its end.
        (progress,) = killed_at
        if result.receipt.retried or progress.rows_sent != progress.m:
            assert set(result.receipt.retried) == {"UNAVAILABLE"}, event
        assert bits(result, JOB) == expected, event
    watched.assert_clean()


def test_a_job_whose_server_is_killed_while_it_waits_goes_on_at_the_next_one(
    watched, expected
):
    with (
        watched_server(max_jobs=1) as doomed,
        grpc.insecure_channel(doomed.process.address) as channel,
        Stream(channel) as occupant,
        Proxy(doomed.process.address) as proxy,
        connected(proxy.address, timeout_s=20) as client,
    ):
        occupant.send(make_job(m=None))
        occupant.receive_accepted()

        def kill(progress: gradwire.Progress) -> None:
            if progress.jobs_ahead is not None:
                proxy.target = watched.process.address
                doomed.process.kill()

        result = compute(client, JOB, on_progress=kill)
        assert set(result.receipt.retried) == {"UNAVAILABLE"}
        assert bits(result, JOB) == expected
        assert occupant.failure().status is StatusCode.UNAVAILABLE
    watched.assert_clean()


@pytest.mark.parametrize("extent", EXTENTS)
def test_a_job_whose_server_is_asked_to_stop_goes_on_at_the_next_one(
    watched, expected, extent
):
    # The server that stops listens until its connections have ended.
    patient = gradwire.RetryPolicy(initial_backoff_s=0.05, max_backoff_s=1.0)
    for event in FAULTS["server-drained"].cases(range(1, EVENTS), extent):
        with (
            watched_server(grace=0) as doomed,
            Proxy(doomed.process.address) as proxy,
            connected(proxy.address, timeout_s=20, retries=patient) as client,
        ):

            def stop(doomed: Watched = doomed, proxy: Proxy = proxy) -> None:
                proxy.target = watched.process.address
                doomed.process.process.terminate()
                doomed.process.wait_for_log("draining")

            acts = at_event(event, stop)
            name = f"drained-{event}"
            result = compute(client, JOB, on_progress=acts, request_id=name)
            assert doomed.process.process.wait(20) == 0
            record = doomed.process.wait_for_log(name)
        if result.receipt.retried:
            assert record["reason"] == "DRAINING", event
            # Its connection may end before its answer is there.
            assert result.receipt.retried[0] in {"DRAINING", "UNAVAILABLE"}, event
        else:
            assert record["outcome"] == "OK"
        assert bits(result, JOB) == expected, event
    watched.assert_clean()


@contextmanager
def victim(address: str, event: int) -> Iterator[subprocess.Popen[str]]:
    """A client that has come to a stage of its job, and waits there."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.thorough.faults.victim", address, str(event)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def reached(process: subprocess.Popen[str]) -> bool:
    assert process.stdout is not None
    return process.stdout.readline() == "reached\n"


def ending(process: subprocess.Popen[str]) -> dict[str, Any]:
    """How the job ended of a client that may go on."""
    output, _ = process.communicate("go on\n", timeout=30)
    ended: dict[str, Any] = json.loads(output)
    return ended


def outcome(watched: Watched, event: int) -> str:
    """What the server's log says of a victim's job."""
    record = watched.process.wait_for_log(
        lambda r: r.get("job_id") == f"victim-{event}" and "outcome" in r
    )
    return str(record["outcome"])


@pytest.mark.parametrize("extent", EXTENTS)
def test_a_client_that_is_killed_leaves_nothing_behind(extent):
    with watched_server() as watched:
        # The last messages of a job that is sent whole are all the client's to read.
        for event in FAULTS["client-killed"].cases(range(1, EVENTS), extent):
            with victim(watched.process.address, event) as process:
                assert reached(process)
            # It may have sent everything, and the server all results.
            assert outcome(watched, event) in {"CANCELLED", "OK"}
        watched.assert_clean()


@pytest.mark.parametrize("extent", EXTENTS)
def test_a_client_that_stands_still_too_long_is_told_so(expected, extent):
    with watched_server(idle_timeout=IDLE_S) as watched:
        for event in FAULTS["client-stopped"].cases(range(1, EVENTS), extent):
            with ExitStack() as stack:
                process = stack.enter_context(victim(watched.process.address, event))
                assert reached(process)
                process.send_signal(signal.SIGSTOP)
                told = outcome(watched, event)
                process.send_signal(signal.SIGCONT)
                ended = ending(process)
            if told == "OK":  # it had sent everything, and gRPC had taken the rest
                assert ended["bits"] == [each.hex() for each in expected]
            else:
                assert told == "ABORTED"
                assert ended["error"] == "ClientIdleError"
        watched.assert_clean()


@pytest.mark.parametrize("extent", EXTENTS)
def test_a_server_that_stands_still_longer_than_the_deadline_is_a_deadline(
    expected, extent
):
    with (
        watched_server() as watched,
        connected(watched.process.address) as client,
    ):
        compute(client, JOB)
        for event in FAULTS["server-stopped"].cases(range(1, EVENTS), extent):
            stop = at_event(event, lambda: os.kill(watched.process.pid, signal.SIGSTOP))
            try:
                result = compute(client, JOB, on_progress=stop, timeout_s=0.5)
            except gradwire.DeadlineError:
                pass
            else:  # everything had left the server
                assert bits(result, JOB) == expected
            os.kill(watched.process.pid, signal.SIGCONT)
            assert bits(compute(client, JOB, timeout_s=20), JOB) == expected
        watched.assert_clean()


@pytest.mark.parametrize("extent", EXTENTS)
def test_a_server_that_stood_still_does_not_take_its_clients_for_idle(expected, extent):
    """Longer than the idle time: what they sent meanwhile is still to be read."""
    with (
        watched_server(idle_timeout=IDLE_S) as watched,
        connected(watched.process.address, timeout_s=30) as client,
    ):
        compute(client, JOB)
        for event in FAULTS["server-resumed"].cases(range(1, EVENTS), extent):

            def stop() -> None:
                os.kill(watched.process.pid, signal.SIGSTOP)
                threading.Timer(
                    STOPPED_S, os.kill, (watched.process.pid, signal.SIGCONT)
                ).start()

            result = compute(client, JOB, on_progress=at_event(event, stop))
            assert bits(result, JOB) == expected, event
        watched.assert_clean()
