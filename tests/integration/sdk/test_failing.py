"""What a caller sees of jobs that fail, and that nothing else is lost."""

from __future__ import annotations

import asyncio
import copy
import pickle
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
from gradwire._base import Tuning
from tests import oracle
from tests.serving import ServerProcess, running_server

X, W, DY = oracle.operands(400, 30, 20)
BOTH_PATHS = pytest.mark.parametrize("unary", [True, False], ids=["compute", "stream"])


@BOTH_PATHS
def test_a_deadline_ends_a_call_that_waits(
    occupied: ServerProcess, unary: bool
) -> None:
    with gradwire.connect(occupied.address) as client:
        client._tuning = Tuning(unary=unary)
        started = time.monotonic()
        with pytest.raises(gradwire.DeadlineError) as late:
            client.gradients(X, W, DY, timeout_s=0.3, request_id="late")
        assert 0.2 < time.monotonic() - started < 5
        assert late.value.job_id == "late"
        assert isinstance(late.value, TimeoutError)


def test_a_clients_own_deadline_is_for_all_its_calls(occupied: ServerProcess) -> None:
    client = gradwire.connect(occupied.address, timeout_s=0.3)
    with client, pytest.raises(gradwire.DeadlineError):
        client.gradients(X, W, DY)


async def test_a_deadline_ends_an_async_call(occupied: ServerProcess) -> None:
    async with gradwire.AsyncClient(occupied.address) as client:
        for unary in (True, False):
            client._tuning = Tuning(unary=unary)
            with pytest.raises(gradwire.DeadlineError):
                await client.gradients(X, W, DY, timeout_s=0.3)


def test_a_job_that_waits_is_told_how_many_are_ahead(occupied: ServerProcess) -> None:
    ahead = []

    def on_progress(progress: gradwire.Progress) -> None:
        ahead.append(progress.jobs_ahead)

    with gradwire.connect(occupied.address) as client:
        client._tuning = Tuning(unary=False)
        with pytest.raises(gradwire.DeadlineError):
            client.gradients(X, W, DY, timeout_s=0.5, on_progress=on_progress)
    assert ahead
    assert None not in ahead


def test_a_server_whose_queue_is_full_says_when_to_come_back(
    occupied: ServerProcess,
) -> None:
    waits = threading.Event()

    def wait_in_the_queue() -> None:
        with gradwire.connect(occupied.address) as client:
            client._tuning = Tuning(unary=False)
            with pytest.raises(gradwire.DeadlineError):
                client.gradients(
                    X, W, DY, timeout_s=3, on_progress=lambda _: waits.set()
                )

    waiting = threading.Thread(target=wait_in_the_queue)
    waiting.start()
    assert waits.wait(30)
    with gradwire.connect(occupied.address) as client:
        for unary in (True, False):
            client._tuning = Tuning(unary=unary)
            with pytest.raises(gradwire.ServerBusyError) as busy:
                client.gradients(X, W, DY, request_id="one too many")
            assert busy.value.retry_after_s is not None
            assert busy.value.retry_after_s > 0
            assert busy.value.job_id == "one too many"
            assert "(BUSY, job one too many)" in str(busy.value)
    waiting.join()


def test_a_job_too_large_for_the_server_is_refused_before_it_is_sent() -> None:
    with running_server(memory_limit=16 << 20) as server:
        w = np.zeros((3000, 3000), np.float32)
        with gradwire.connect(server.address) as client:
            sent = []
            with pytest.raises(gradwire.JobTooLargeError) as large:
                client.forward(
                    np.zeros((1, 3000), np.float32),
                    w,
                    on_progress=lambda p: sent.append(p.bytes_sent),
                )
            assert not any(sent)
            assert large.value.retry_after_s is None
            oracle.assert_right(client.gradients(X, W, DY), X, W, DY, "float32")


def test_a_caller_that_sends_too_slowly_is_told_so() -> None:
    go_on = threading.Event()

    def rows() -> Iterator[Any]:
        yield X, DY
        go_on.wait(30)

    with (
        running_server(idle_timeout=0.3) as server,
        gradwire.connect(server.address) as client,
    ):
        stream = client.stream(rows(), W)
        with pytest.raises(gradwire.ClientIdleError, match="CLIENT_IDLE"):
            list(stream)
        go_on.set()


def test_a_server_that_dies_in_the_middle_is_a_lost_connection() -> None:
    with (
        running_server(block_bytes=4096) as server,
        gradwire.connect(server.address) as client,
    ):

        def rows() -> Iterator[Any]:
            yield X, DY
            yield X, DY
            server.kill()
            yield X, DY

        with pytest.raises(gradwire.ConnectionLostError) as lost:
            list(client.stream(rows(), W, request_id="cut off"))
        assert lost.value.job_id == "cut off"
        # How it is told depends on how far the system has come with it.
        with pytest.raises(ConnectionError):
            client.forward(X, W)


def test_a_client_finds_its_server_again_after_a_restart(tmp_path: Any) -> None:
    address = f"unix:{tmp_path / 'socket'}"
    with running_server(listen=[address]) as server:
        client = gradwire.connect(server.address)
        first = client.gradients(X, W, DY).receipt
    with running_server(listen=[address]), client:
        second = client.gradients(X, W, DY).receipt
    assert first.transport == "unix"
    assert first.server_instance != second.server_instance


def test_a_server_that_is_about_to_stop_takes_no_new_jobs() -> None:
    go_on = threading.Event()

    def rows() -> Iterator[Any]:
        yield X, DY
        server.process.send_signal(signal.SIGTERM)
        go_on.wait(30)

    with (
        running_server(grace=30, block_bytes=4096) as server,
        gradwire.connect(server.address) as client,
    ):
        stream = client.stream(rows(), W)
        next(stream)
        refused = None
        while refused is None:
            try:
                client.forward(X, W)
            except gradwire.DrainingError as error:
                refused = error
        assert refused.reason == "DRAINING"
        go_on.set()
        list(stream)
        assert stream.receipt.m == 400


async def test_cancelling_a_task_cancels_its_job(one_job: ServerProcess) -> None:
    async def rows() -> Any:
        yield X, DY
        accepted.set()
        await asyncio.sleep(60)

    accepted = asyncio.Event()
    async with gradwire.AsyncClient(one_job.address) as client:

        async def consume() -> None:
            async for _ in client.stream(rows(), W, request_id="task"):
                pass

        task = asyncio.create_task(consume())
        await accepted.wait()
        for unary in (True, False):
            client._tuning = Tuning(unary=unary)
            job_id = f"waiting task {unary}"
            waiting = asyncio.create_task(client.gradients(X, W, DY, request_id=job_id))
            await asyncio.sleep(0.1)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            await asyncio.to_thread(one_job.wait_for_log, job_id)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        record = await asyncio.to_thread(
            one_job.wait_for_log, lambda r: r.get("job_id") == "task" and "outcome" in r
        )
        assert record["outcome"] == "CANCELLED"
        assert (await client.gradients(X, W, DY)).receipt.m == 400


INTERRUPTED = """
    import sys, numpy as np, gradwire
    from gradwire._base import Tuning
    address, what = sys.argv[1:]
    client = gradwire.connect(address)
    client._tuning = Tuning(unary=what == "compute")
    x = np.ones((10, 10), "f4")

    def rows():
        yield x, x
        print("ready", flush=True)
        while True:
            yield x, x

    try:
        if what == "iterating":
            for _ in client.stream(rows(), x, request_id=what):
                pass
        else:
            print("ready", flush=True)
            client.gradients(x, x, x, request_id=what)
    except KeyboardInterrupt:
        # The server sees the end although the process goes on.
        print("interrupted", flush=True)
        sys.stdin.read()
"""


@pytest.mark.parametrize("what", ["compute", "waiting", "iterating"])
def test_ctrl_c_ends_the_call_at_once_and_cancels_the_job(
    request: pytest.FixtureRequest, what: str
) -> None:
    fixture = "one_job" if what == "iterating" else "occupied"
    server: ServerProcess = request.getfixturevalue(fixture)
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(INTERRUPTED), server.address, what],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        if what == "iterating":
            # Enough of it that it surely runs.
            time.sleep(0.2)
        else:
            time.sleep(0.5)
        interrupted = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "interrupted\n"
        assert time.monotonic() - interrupted < 3
        record = server.wait_for_log(
            lambda r: r.get("job_id") == what and "outcome" in r
        )
        assert record["outcome"] == "CANCELLED"
        process.communicate()


def test_a_closed_client_says_so(server_address: str) -> None:
    client = gradwire.connect(server_address)
    client.close()
    client.close()
    says = f"this Client of {server_address} was closed: make another"
    for call in (
        lambda: client.gradients(X, W, DY),
        lambda: client.forward(X, W),
        lambda: client.stream([], W),
        client.server_info,
        client.__enter__,
    ):
        with pytest.raises(gradwire.ClientStateError) as refused:
            call()
        assert str(refused.value) == says
    assert repr(client) == f"<gradwire.Client of {server_address} closed>"


def test_closing_a_client_ends_its_streams(server_address: str) -> None:
    def endless() -> Iterator[Any]:
        while True:
            yield X, DY

    with gradwire.connect(server_address) as client:
        stream = client.stream(endless(), W)
        next(stream)
    with pytest.raises(gradwire.JobCancelledError):
        list(stream)


async def test_a_closed_async_client_says_so(server_address: str) -> None:
    async with gradwire.AsyncClient(server_address) as client:
        pass
    with pytest.raises(gradwire.ClientStateError, match="was closed: make another"):
        await client.gradients(X, W, DY)


@pytest.mark.parametrize("cls", [gradwire.Client, gradwire.AsyncClient])
@pytest.mark.parametrize("how", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_client_that_is_pickled_says_what_to_do_instead(cls: Any, how: Any) -> None:
    client = cls("gpu-node:50051")
    with pytest.raises(TypeError) as refused:
        how(client)
    assert str(refused.value) == (
        f"a gradwire.{cls.__name__} holds a connection and cannot be pickled or"
        " copied: hand over its address, 'gpu-node:50051', and make a client of it"
        " there"
    )


def test_nothing_is_sent_when_an_argument_is_refused(
    caller: Any, small_blocks: ServerProcess
) -> None:
    refused: list[tuple[Any, dict[str, Any]]] = [
        ((X, W[:5], DY), {}),
        ((X, W, DY), {"results": ()}),
        ((X, W, DY), {"out": {"y": X}}),
        ((X, W, DY), {"timeout_s": 0}),
        ((X.astype(int), W, DY), {}),
        ((X, W, None), {}),
    ]
    for number, (arguments, options) in enumerate(refused):
        job_id = f"refused {number} by {type(caller).__name__}"
        with pytest.raises(gradwire.InputError):
            caller.gradients(*arguments, request_id=job_id, **options)
        assert job_id not in small_blocks.logs
    assert caller.gradients(X, W, DY).receipt.m == 400
