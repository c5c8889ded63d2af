"""What a caller sees of jobs that fail, and that nothing else is lost."""

from __future__ import annotations

import asyncio
import copy
import json
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

import gradwire
from tests.scenarios.ways import (
    COMPUTE,
    COPIED,
    IN_STEPS,
    STREAM,
    WAYS,
    Way,
    serving_all,
)
from tests.support import oracle
from tests.support.serving import ServerProcess

X, W, DY = oracle.operands(400, 30, 20)


def test_a_deadline_ends_a_call_that_waits(occupied: ServerProcess, way: Way) -> None:
    with way.connect(occupied) as client:
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


async def test_a_deadline_ends_an_async_call(occupied: ServerProcess, way: Way) -> None:
    async with way.async_client(occupied) as client:
        with pytest.raises(gradwire.DeadlineError):
            await client.gradients(X, W, DY, timeout_s=0.3)


@pytest.mark.parametrize("way", IN_STEPS, ids=str)
def test_a_job_that_waits_is_told_how_many_are_ahead(
    occupied: ServerProcess, way: Way
) -> None:
    ahead = []

    def on_progress(progress: gradwire.Progress) -> None:
        ahead.append(progress.jobs_ahead)

    with way.connect(occupied) as client, pytest.raises(gradwire.DeadlineError):
        client.gradients(X, W, DY, timeout_s=0.5, on_progress=on_progress)
    assert ahead
    assert None not in ahead


def test_a_server_whose_queue_is_full_says_when_to_come_back(
    occupied: ServerProcess,
) -> None:
    waits, refused = threading.Event(), threading.Event()

    class EnoughError(Exception):
        pass

    def on_progress(_: gradwire.Progress) -> None:
        waits.set()
        assert refused.wait(30)
        raise EnoughError

    def wait_in_the_queue() -> None:
        with STREAM.connect(occupied) as client, pytest.raises(EnoughError):
            client.gradients(X, W, DY, on_progress=on_progress)

    waiting = threading.Thread(target=wait_in_the_queue)
    waiting.start()
    assert waits.wait(30)
    for way in WAYS:
        with way.connect(occupied, retries=False) as client:
            with pytest.raises(gradwire.ServerBusyError) as busy:
                client.gradients(X, W, DY, request_id="one too many")
            assert busy.value.retry_after_s is not None
            assert busy.value.retry_after_s > 0
            assert busy.value.job_id == "one too many"
            assert "(BUSY, job one too many)" in str(busy.value)
    refused.set()
    waiting.join()


def test_a_job_too_large_for_the_server_is_refused_before_it_is_sent() -> None:
    w = np.zeros((3000, 3000), np.float32)
    with serving_all(memory_limit=16 << 20) as server:
        for way in WAYS:
            with way.connect(server) as client:
                seen: list[gradwire.Progress] = []
                with pytest.raises(gradwire.JobTooLargeError) as large:
                    client.forward(
                        np.zeros((1, 3000), np.float32), w, on_progress=seen.append
                    )
                assert not any(progress.bytes_sent for progress in seen)
                assert large.value.retry_after_s is None
        with gradwire.connect(server.address, transport="grpc") as client:
            oracle.assert_right(client.gradients(X, W, DY), X, W, DY, "float32")


@pytest.fixture(scope="module")
def impatient() -> Iterator[ServerProcess]:
    with serving_all(idle_timeout=0.3) as server:
        yield server


def test_a_caller_that_sends_too_slowly_is_told_so(
    impatient: ServerProcess, stream_way: Way
) -> None:
    go_on = threading.Event()

    def rows() -> Iterator[Any]:
        yield X, DY
        go_on.wait(30)

    with stream_way.connect(impatient) as client:
        stream = client.stream(rows(), W)
        with pytest.raises(gradwire.ClientIdleError, match="CLIENT_IDLE"):
            list(stream)
        go_on.set()


@pytest.mark.parametrize("way", IN_STEPS, ids=str)
def test_a_server_that_dies_in_the_middle_is_a_lost_connection(way: Way) -> None:
    x, w, dy = oracle.operands(50_000, 30, 20)
    with (
        serving_all(row_block_bytes=4096) as server,
        way.connect(server, retries=False) as client,
    ):

        def on_progress(progress: gradwire.Progress) -> None:
            if progress.bytes_sent and server.process.poll() is None:
                server.kill()

        with pytest.raises(gradwire.ConnectionLostError) as lost:
            client.gradients(x, w, dy, request_id="cut off", on_progress=on_progress)
        assert lost.value.job_id == "cut off"
        # How it is told depends on how far the system has come with it.
        with pytest.raises(ConnectionError):
            client.forward(X, W)


def test_clients_find_their_server_again_after_a_restart() -> None:
    with serving_all() as server, ExitStack() as clients:
        jobs = []
        for way in WAYS:
            client = clients.enter_context(way.connect(server))
            x = client.empty(X.shape, X.dtype) if way.inside else X.copy()
            x[...] = X
            jobs.append((way, client, x, client.gradients(x, W, DY)))
        addresses = list(server.addresses)
        server.process.terminate()
        server.process.wait()
        with serving_all(listen=addresses):
            for way, client, x, first in jobs:
                second = client.gradients(x, W, DY)
                way.arrived(second.receipt)
                assert first.receipt.server_instance != second.receipt.server_instance
                for one, other in zip(first, second, strict=True):
                    assert oracle.same_bits(one, other)


def test_a_server_that_is_about_to_stop_takes_no_new_jobs() -> None:
    go_on = threading.Event()

    def rows() -> Iterator[Any]:
        yield X, DY
        go_on.wait(30)

    with serving_all(grace=30, row_block_bytes=4096) as server, ExitStack() as clients:
        others = [
            clients.enter_context(way.connect(server, retries=False)) for way in WAYS
        ]
        stream = clients.enter_context(STREAM.connect(server)).stream(rows(), W)
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        for client in others:
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


async def test_cancelling_a_task_cancels_its_job(
    one_job: ServerProcess, way: Way
) -> None:
    job_id = f"running task {way}"

    async def rows() -> Any:
        yield X, DY
        accepted.set()
        await asyncio.sleep(60)

    accepted = asyncio.Event()
    async with way.async_client(one_job) as client:

        async def consume() -> None:
            async for _ in client.stream(rows(), W, request_id=job_id):
                pass

        task = asyncio.create_task(consume())
        await accepted.wait()
        waiting_id = f"waiting task {way}"
        waiting = asyncio.create_task(client.gradients(X, W, DY, request_id=waiting_id))
        await asyncio.sleep(0.1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await asyncio.to_thread(one_job.wait_for_log, waiting_id)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        record = await asyncio.to_thread(
            one_job.wait_for_log,
            lambda r: r.get("job_id") == job_id and r["message"] == "job",
        )
        assert record["outcome"] == "CANCELLED"
        way.arrived((await client.gradients(X, W, DY)).receipt)


INTERRUPTED = """
    import json, sys, numpy as np, gradwire
    from gradwire._client.job_factory import Tuning
    address, what, job_id, options, unary = sys.argv[1:]
    client = gradwire.connect(address, **json.loads(options))
    client._engine.jobs.tuning = Tuning(unary=json.loads(unary))
    x = np.ones((10, 10), "f4")

    def rows():
        yield x, x
        print("ready", flush=True)
        while True:
            yield x, x

    try:
        if what == "iterating":
            for _ in client.stream(rows(), x, request_id=job_id):
                pass
        else:
            print("ready", flush=True)
            client.gradients(x, x, x, request_id=job_id)
    except KeyboardInterrupt:
        # The server sees the end although the process goes on.
        print("interrupted", flush=True)
        sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("what", "way"),
    [
        *(("waiting", way) for way in (COMPUTE, STREAM, COPIED)),
        ("iterating", STREAM),
    ],
    ids=str,
)
def test_ctrl_c_ends_the_call_at_once_and_cancels_the_job(
    request: pytest.FixtureRequest, what: str, way: Way
) -> None:
    fixture = "one_job" if what == "iterating" else "occupied"
    server: ServerProcess = request.getfixturevalue(fixture)
    job_id = f"{what} {way}"
    with (
        subprocess.Popen(
            [
                *(sys.executable, "-c", textwrap.dedent(INTERRUPTED)),
                *(way.address(server), what, job_id),
                *(json.dumps(dict(way.options)), json.dumps(way.tuning().unary)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process,
        ExitStack() as leaving,
    ):
        # Lest a child that hangs is waited for without end.
        leaving.callback(process.kill)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        if what == "iterating":
            # EnoughError of it that it surely runs.
            time.sleep(0.2)
        else:
            time.sleep(0.5)
        interrupted = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "interrupted\n"
        assert time.monotonic() - interrupted < 3
        record = server.wait_for_log(
            lambda r: r.get("job_id") == job_id and r["message"] == "job"
        )
        assert record["outcome"] == "CANCELLED"
        process.communicate()


INTERRUPTED_ANYWHERE = """
    import faulthandler
    import itertools
    import random
    import signal
    import sys

    import numpy as np

    import gradwire

    faulthandler.dump_traceback_later(30, exit=True)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    random.seed(0)
    x = np.ones((4, 64), "f4")
    with gradwire.connect(sys.argv[1]) as client, client.session("1MiB") as session:
        w = session.put(np.ones((64, 64), "f4"))
        gradient = session.zeros_like(w)
        calls = itertools.cycle(
            [
                lambda: session.clear(gradient),
                lambda: session.forward(x, w, keep=False),
                lambda: session.get(w),
                lambda: list(client.stream([(x, x)], np.ones((64, 64), "f4"))),
                session.describe,
            ]
        )
        interrupts = 0
        for call, _ in zip(calls, range(int(sys.argv[2]))):
            try:
                signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-4, 5e-3))
                call()
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupts += 1
    print(interrupts)
"""


def test_ctrl_c_at_any_moment_leaves_the_client_usable(server_address: str) -> None:
    """Within gRPC, it would leave a lock behind that nobody releases."""
    program = textwrap.dedent(INTERRUPTED_ANYWHERE)
    done = subprocess.run(
        [sys.executable, "-c", program, server_address, "600"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 50


DELETED_LAST = """
    import sys

    import numpy as np

    import gradwire


    class Last:
        def __init__(self):
            self.client = gradwire.connect(sys.argv[1])
            self.rows = [(np.ones((500, 600), "f4"), np.ones((500, 600), "f4"))] * 20
            self.w = np.ones((600, 600), "f4")
            self.stream = self.client.stream(self.rows, self.w)
            next(self.stream)

        def __del__(self):
            try:
                assert sys.is_finalizing()
                for call in (
                    lambda: next(self.stream),
                    lambda: list(self.client.stream(self.rows, self.w)),
                    lambda: self.client.forward(self.rows[0][0], self.w, timeout_s=60),
                    lambda: self.client.server_info(timeout_s=60),
                ):
                    try:
                        call()
                    except gradwire.ClientStateError as error:
                        print(error, flush=True)
                self.client.close()
                print("closed", flush=True)
            except BaseException as error:
                print(repr(error), flush=True)


    last = Last()
"""


def test_a_call_while_the_interpreter_shuts_down_is_refused(
    server_address: str,
) -> None:
    """Instead of waiting without end for threads that have stopped."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(DELETED_LAST), server_address],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    *refusals, last = done.stdout.splitlines()
    assert len(refusals) == 4
    assert all("make last calls in a function" in each for each in refusals)
    assert last == "closed"


def test_a_closed_client_says_so(server_address: str) -> None:
    client = gradwire.connect(server_address)
    client.close()
    client.close()
    says = f"this Client of {server_address} is closed: create a new one"
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


def test_closing_a_client_ends_its_streams(
    small_blocks: ServerProcess, stream_way: Way
) -> None:
    def endless() -> Iterator[Any]:
        while True:
            yield X, DY

    with stream_way.connect(small_blocks) as client:
        stream = client.stream(endless(), W)
        next(stream)
    with pytest.raises(gradwire.JobCancelledError):
        list(stream)


async def test_a_closed_async_client_says_so(server_address: str) -> None:
    async with gradwire.AsyncClient(server_address) as client:
        pass
    with pytest.raises(gradwire.ClientStateError, match="is closed: create a new one"):
        await client.gradients(X, W, DY)


@pytest.mark.parametrize("cls", [gradwire.Client, gradwire.AsyncClient])
@pytest.mark.parametrize("how", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_client_that_is_pickled_says_what_to_do_instead(cls: Any, how: Any) -> None:
    client = cls("gpu-node:50051")
    with pytest.raises(TypeError) as refused:
        how(client)
    assert str(refused.value) == (
        f"a gradwire.{cls.__name__} holds a connection and cannot be pickled or"
        " copied: pass its address, 'gpu-node:50051', and create a client there"
    )


def test_nothing_is_sent_when_an_argument_is_refused(caller: Any) -> None:
    refused: list[tuple[Any, dict[str, Any]]] = [
        ((X, W[:5], DY), {}),
        ((X, W, DY), {"results": ()}),
        ((X, W, DY), {"out": {"y": X}}),
        ((X, W, DY), {"timeout_s": 0}),
        ((X.astype(int), W, DY), {}),
        ((X, W, None), {}),
    ]
    for number, (arguments, options) in enumerate(refused):
        job_id = f"refused {number} by {type(caller).__name__} {caller.way}"
        with pytest.raises(gradwire.InputError):
            caller.gradients(*arguments, request_id=job_id, **options)
        assert job_id not in caller.server.logs
    assert caller.gradients(X, W, DY).receipt.m == 400
