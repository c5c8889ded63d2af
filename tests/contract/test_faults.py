"""What callers see when a computation fails, and how soon one that is not
wanted any more stops: with a backend whose steps the test holds in its hands.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import threading
from collections.abc import Callable, Iterator

import grpc
import pytest
from grpc import StatusCode

from gradwire.v1 import job_pb2
from gradwire_server import Server, Settings
from gradwire_server.backends.numpy.backend import NumpyBackend
from gradwire_server.scheduling.fair_queue import FairQueue
from tests.support.direct_client import DirectCall, direct_job
from tests.support.raw import (
    CallError,
    Stream,
    assert_exact,
    compute_job,
    stream_job,
    whole_numbers,
)

PROBLEM = whole_numbers(160, 5, 4)
BLOCKS = 10
SEGMENTS = job_pb2.Numerics(dw_segment_rows=64)
SECRET = "/home/somebody/private"


class HeldBackend(NumpyBackend):
    """NumPy, with what the test wants done before each step of a job."""

    def __init__(self) -> None:
        super().__init__()
        self.before: dict[str, Callable[[], None]] = {}
        self.steps: list[str] = []
        self.rows: list[int] = []
        """Rows of the blocks in the order in which they were computed."""

    def open_job(self, *args, **kwargs):
        self.step("open_job")
        return _HeldJob(self, super().open_job(*args, **kwargs))

    def step(self, name: str) -> None:
        self.steps.append(name)
        self.before.get(name, lambda: None)()


class _HeldJob:
    def __init__(self, backend, job) -> None:
        self._backend = backend
        self._job = job

    def __getattr__(self, name):
        method = getattr(self._job, name)

        def held(*args, **kwargs):
            self._backend.step(name)
            if name == "compute_block":
                self._backend.rows += [block.rows for block in args]
            return method(*args, **kwargs)

        return held


@contextlib.contextmanager
def serving(**settings) -> Iterator[tuple[HeldBackend, grpc.Channel]]:
    backend = HeldBackend()
    settings = {
        "listen": ("127.0.0.1:0",),
        "row_block_bytes": 600,
        "grace": 5,
    } | settings
    server = Server(Settings(**settings), backend)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(server.start(), loop).result(10)
        try:
            with grpc.insecure_channel(server.addresses[0]) as channel:
                yield backend, channel
        finally:
            asyncio.run_coroutine_threadsafe(server.drain(), loop).result(10)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def fail(error: Exception) -> Callable[[], None]:
    def step() -> None:
        raise error

    return step


@pytest.mark.parametrize("call", [stream_job, compute_job])
@pytest.mark.parametrize("step", ["open_job", "take_w", "compute_block", "finish"])
def test_what_nobody_foresaw_is_told_by_an_id_that_the_log_has(call, step, caplog):
    with serving() as (backend, channel):
        backend.before[step] = fail(RuntimeError(f"cannot open {SECRET}"))
        with (
            caplog.at_level(logging.INFO, "gradwire_server"),
            pytest.raises(CallError) as raised,
        ):
            call(channel, PROBLEM, job_id="unlucky")
        error = raised.value
        assert (error.status, error.reason) == (StatusCode.INTERNAL, "UNFORESEEN")
        assert error.metadata["job_id"] == "unlucky"
        assert error.metadata["error_id"] in error.text
        assert SECRET not in error.text
        assert SECRET not in str(error.metadata)
        (record,) = [r for r in caplog.records if r.exc_info]
        assert record.error_id == error.metadata["error_id"]
        assert SECRET in str(record.exc_info[1])
        gc.collect()  # asyncio logs failures that nobody asked for when they go
        assert not [r for r in caplog.records if r.name == "asyncio"]
        backend.before.clear()
        assert_exact(call(channel, PROBLEM), PROBLEM)


@pytest.mark.parametrize("step", ["copy_sums", "restart_sums", "take_sums"])
def test_what_fails_between_segments_is_told_and_the_server_goes_on(step):
    with serving() as (backend, channel):
        for call in (stream_job, compute_job, direct_job):
            for by_segment in (False, True):
                if by_segment and (call is compute_job or step == "take_sums"):
                    continue
                backend.before[step] = fail(MemoryError())
                options = {"numerics": SEGMENTS, "segment_sums": by_segment}
                with pytest.raises(CallError) as raised:
                    failing(call, channel, options)
                assert raised.value.reason == "DEVICE_OUT_OF_MEMORY"
                backend.before.clear()
                outcome = stream_job(channel, PROBLEM, numerics=SEGMENTS)
                assert_exact(outcome, PROBLEM)


def failing(call, channel, options):
    """Run a job that the server ends, and raise the call's error."""
    if call is not direct_job:
        call(channel, PROBLEM, **options)
    with DirectCall(channel, PROBLEM, **options) as direct:
        assert direct.access.connections
        direct.attach().send_all()
        raise direct.stream.failure()


@pytest.mark.parametrize("call", [stream_job, compute_job])
@pytest.mark.parametrize("step", ["open_job", "take_w", "compute_block", "finish"])
def test_memory_that_is_not_there_is_told_and_the_server_goes_on(call, step):
    with serving() as (backend, channel):
        backend.before[step] = fail(MemoryError())
        with pytest.raises(CallError) as raised:
            call(channel, PROBLEM, job_id="hungry")
        error = raised.value
        assert error.status is StatusCode.RESOURCE_EXHAUSTED
        assert error.reason == "DEVICE_OUT_OF_MEMORY"
        assert error.metadata["job_id"] == "hungry"
        assert "memory" in error.text
        backend.before.clear()
        assert_exact(call(channel, PROBLEM), PROBLEM)


def test_a_job_that_fails_leaves_the_one_beside_it_alone():
    with serving() as (backend, channel), Stream(channel) as good:
        good.send(PROBLEM.job())
        outcome = good.receive_accepted()
        good.send_all(PROBLEM.chunks("w", 0, 5))
        backend.before["compute_block"] = fail(RuntimeError())
        with pytest.raises(CallError, match="UNFORESEEN"):
            stream_job(channel, PROBLEM)
        backend.before.clear()
        good.send_all(list(PROBLEM.body(16))[1:])
        good.half_close()
        assert_exact(good.receive_results(outcome), PROBLEM)


@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_work_stops_within_one_block(how, monkeypatch):
    begun, released, dropped = (threading.Event() for _ in range(3))
    drop = FairQueue.drop

    def dropping(*job):
        dropped.set()
        return drop(*job)

    monkeypatch.setattr(FairQueue, "drop", dropping)

    def hold() -> None:
        begun.set()
        assert released.wait(20)

    with serving() as (backend, channel):
        backend.before["compute_block"] = hold
        timeout_s = 20.0 if how == "cancel" else 0.5
        with Stream(channel, timeout_s=timeout_s) as stream:
            stream.send(PROBLEM.job())
            outcome = stream.receive_accepted()
            assert PROBLEM.shape[0] == BLOCKS * outcome.accepted.block_rows
            stream.send_all(PROBLEM.body(outcome.accepted.block_rows))
            stream.half_close()
            assert begun.wait(20)  # one block is being computed, others wait
            if how == "cancel":
                stream.call.cancel()
            status = stream.failure().status
            assert status is StatusCode.CANCELLED or how == "deadline"
            assert status is StatusCode.DEADLINE_EXCEEDED or how == "cancel"
        assert dropped.wait(20)  # it is not wanted any more
        released.set()
        assert_exact(stream_job(channel, PROBLEM), PROBLEM)
        assert backend.steps.count("compute_block") - BLOCKS <= 1
        assert backend.steps.count("finish") == 1


def test_a_client_is_not_called_idle_while_the_server_is_what_it_waits_for():
    released = threading.Event()
    with serving(idle_timeout=0.3) as (backend, channel), Stream(channel) as stream:
        backend.before["compute_block"] = lambda: released.wait(20)
        stream.send(PROBLEM.job())
        outcome = stream.receive_accepted()
        rows = outcome.accepted.block_rows
        stream.send_all(PROBLEM.chunks("w", 0, 5))
        stream.send_all(PROBLEM.chunks("x", 0, rows))
        stream.send_all(PROBLEM.chunks("dy", 0, rows))
        # This client sends a block when it has seen the last one's results.
        threading.Timer(1.0, released.set).start()
        expected = PROBLEM.expected()["y"][:rows].tobytes()
        assert stream.receive().chunk.data == expected


def test_a_small_job_takes_its_turn_between_the_blocks_of_a_large_one(monkeypatch):
    begun, both_wait, go = (threading.Event() for _ in range(3))
    waiting = set()
    put = FairQueue.put

    def putting(queue, tenant, job, piece):
        put(queue, tenant, job, piece)
        waiting.add(job)
        if len(waiting) == 2:
            both_wait.set()

    def hold() -> None:
        begun.set()
        assert go.wait(20)

    small = whole_numbers(7, 5, 4)
    with (
        serving() as (backend, channel),
        Stream(channel) as first,
        Stream(channel) as second,
    ):
        backend.before["compute_block"] = hold
        both = ((first, PROBLEM), (second, small))
        for stream, problem in both:  # while the device is free to open them
            stream.send(problem.job())
            stream.receive_accepted()
        monkeypatch.setattr(FairQueue, "put", putting)
        for stream, problem in both:
            stream.send_all(problem.body(stream.outcome.accepted.block_rows))
            stream.half_close()
            assert begun.wait(20)
        assert both_wait.wait(20)
        go.set()
        assert_exact(second.receive_results(second.outcome), small)
        assert_exact(first.receive_results(first.outcome), PROBLEM)
        # One block of the large job was under way, and one more may be next.
        assert backend.rows.index(7) <= 2
