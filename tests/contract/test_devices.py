"""Several devices: where jobs run, what waits for whose memory, and what is
left when one is lost. Each device here is NumPy that says it is another one.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import threading
from collections.abc import Callable, Iterator

import grpc
import pytest
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gradwire_server import BackendError, Server, Settings
from gradwire_server.backends.base import DeviceLostError
from gradwire_server.backends.numpy.backend import NumpyBackend
from tests.support.metrics import scrape
from tests.support.raw import (
    SERVICE,
    CallError,
    Stream,
    assert_exact,
    compute_job,
    server_info,
    stream_job,
    whole_numbers,
)

MIB = 1 << 20
PROBLEM = whole_numbers(160, 5, 4)
SMALL = whole_numbers(7, 5, 4)


class ManyDevices(NumpyBackend):
    """NumPy on devices of its own making, with what a test wants done before
    each step of a job on each of them.

    Args:
        memory: Bytes of each device's memory.
        needs: Bytes that a job takes there for each of its rows.
    """

    inline_below_ops = 0

    def __init__(self, memory: tuple[int, ...], needs: int = 0) -> None:
        super().__init__()
        (cpu,) = self.devices
        self.devices = tuple(
            dataclasses.replace(
                cpu,
                index=2 * position,
                name=f"device of {size} bytes",
                memory_bytes=size,
                compute_capability=f"9.{position}",
                in_host_memory=False,
            )
            for position, size in enumerate(memory)
        )
        self._needs = needs
        self.before: dict[tuple[int, str], Callable[[], None]] = {}
        self.cannot_enter: int | None = None

    def init_thread(self, device):
        if device == self.cannot_enter:
            raise DeviceLostError("it does not answer")
        super().init_thread(device)

    def device_bytes(self, spec, block_rows):
        return self._needs * (spec.m or 0)

    def open_job(self, spec, block_rows, device, **options):
        self.step(device, "open_job")
        return _Job(self, device, super().open_job(spec, block_rows, 0, **options))

    def step(self, device, name):
        self.before.get((device, name), lambda: None)()


class _Job:
    def __init__(self, backend, device, job) -> None:
        self._backend = backend
        self._device = device
        self._job = job

    def __getattr__(self, name):
        method = getattr(self._job, name)

        def held(*args, **kwargs):
            self._backend.step(self._device, name)
            return method(*args, **kwargs)

        return held


def settings_of(**settings) -> Settings:
    settings = {
        "listen": ("127.0.0.1:0",),
        "row_block_bytes": 600,
        "grace": 5,
    } | settings
    return Settings(**settings)


@contextlib.contextmanager
def serving(
    backend: ManyDevices, **settings
) -> Iterator[tuple[Server, grpc.Channel, asyncio.AbstractEventLoop]]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def made() -> Server:
        server = Server(settings_of(**settings), backend)
        await server.start()
        return server

    try:
        server = asyncio.run_coroutine_threadsafe(made(), loop).result(10)
        try:
            with grpc.insecure_channel(server.addresses[0]) as channel:
                yield server, channel, loop
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


def started(stream: Stream, problem, **job) -> int:
    """Announces a job that runs; where."""
    stream.send(problem.job(**job))
    return stream.receive_accepted().accepted.device.index


def send_the_rest(stream: Stream, problem) -> None:
    stream.send_all(problem.body(stream.outcome.accepted.block_rows))
    stream.half_close()


def test_server_info_lists_each_device_with_what_jobs_may_hold_of_it():
    backend = ManyDevices((100 * MIB, 50 * MIB))
    with serving(backend, device_memory_limit=64 * MIB) as (_, channel, _):
        info = server_info(channel)
        assert [
            (d.index, d.memory_bytes, d.memory_limit_bytes, d.compute_capability)
            for d in info.devices
        ] == [
            (0, 100 * MIB, 64 * MIB, "9.0"),
            (2, 50 * MIB, 50 * MIB, "9.1"),
        ]
    with serving(ManyDevices((100 * MIB,))) as (_, channel, _):
        info = server_info(channel)
        assert info.devices[0].memory_limit_bytes == 90 * MIB


def test_jobs_run_beside_each_other_on_the_devices_and_are_told_which():
    with (
        serving(ManyDevices((MIB, MIB, MIB))) as (_, channel, _),
        contextlib.ExitStack() as stack,
    ):
        streams = [stack.enter_context(Stream(channel)) for _ in range(4)]
        assert [started(stream, PROBLEM) for stream in streams] == [0, 2, 4, 0]
        for stream in streams:
            send_the_rest(stream, PROBLEM)
            outcome = stream.receive_results(stream.outcome)
            assert_exact(outcome, PROBLEM)
            assert outcome.receipt.device == outcome.accepted.device
            assert outcome.accepted.fingerprint.device == outcome.receipt.device.name


@pytest.mark.parametrize("call", [stream_job, compute_job])
def test_every_device_gives_the_same_bits(call):
    with serving(ManyDevices((MIB, MIB))) as (_, channel, _), Stream(channel) as busy:
        first = call(channel, PROBLEM)
        assert started(busy, PROBLEM) == 0
        second = call(channel, PROBLEM)
        assert (first.receipt.device.index, second.receipt.device.index) == (0, 2)
        assert first.bits == second.bits
        assert_exact(second, PROBLEM)


def test_two_devices_compute_at_once():
    backend = ManyDevices((MIB, MIB))
    meet = threading.Barrier(2)
    for device in (0, 2):
        backend.before[device, "finish"] = lambda: meet.wait(20)
    with (
        serving(backend) as (_, channel, _),
        Stream(channel) as one,
        Stream(channel) as other,
    ):
        assert [started(stream, PROBLEM) for stream in (one, other)] == [0, 2]
        for stream in (one, other):
            send_the_rest(stream, PROBLEM)
        for stream in (one, other):
            assert_exact(stream.receive_results(stream.outcome), PROBLEM)


def test_a_job_waits_until_a_device_has_the_memory_for_it():
    backend = ManyDevices((MIB, MIB), needs=4096)
    with (
        serving(backend) as (_, channel, _),
        Stream(channel) as one,
        Stream(channel) as other,
        Stream(channel) as waits,
    ):
        assert [started(stream, PROBLEM) for stream in (one, other)] == [0, 2]
        assert one.outcome.accepted.device_bytes == 160 * 4096
        waits.send(PROBLEM.job())
        assert waits.receive().queued.jobs_ahead == 2
        send_the_rest(other, PROBLEM)
        assert_exact(other.receive_results(other.outcome), PROBLEM)
        outcome = waits.receive_accepted()
        assert outcome.accepted.device.index == 2
        send_the_rest(waits, PROBLEM)
        assert_exact(waits.receive_results(outcome), PROBLEM)


@pytest.mark.parametrize("call", [stream_job, compute_job])
def test_a_job_that_no_device_can_hold_is_refused_from_its_header(call):
    backend = ManyDevices((16 * MIB, 32 * MIB), needs=MIB)
    with serving(backend, device_memory_limit=24 * MIB) as (_, channel, _):
        with pytest.raises(CallError) as raised:
            call(channel, PROBLEM)
        assert raised.value.status is StatusCode.RESOURCE_EXHAUSTED
        assert raised.value.reason == "JOB_TOO_LARGE"
        assert str(24 * MIB) in raised.value.text
        outcome = call(channel, whole_numbers(20, 5, 4))
        assert outcome.receipt.device.index == 2


@pytest.mark.parametrize("busy", [0, 1])
def test_a_cancelled_job_lets_go_of_its_device_alone(busy):
    begun, released = threading.Event(), threading.Event()
    backend = ManyDevices((MIB, MIB), needs=4096)

    def hold() -> None:
        begun.set()
        assert released.wait(20)

    backend.before[2 * busy, "compute_block"] = hold
    with (
        serving(backend) as (_, channel, _),
        Stream(channel) as one,
        Stream(channel) as other,
    ):
        streams = (one, other)
        assert [started(stream, PROBLEM) for stream in streams] == [0, 2]
        send_the_rest(streams[busy], PROBLEM)
        assert begun.wait(20)
        streams[busy].call.cancel()
        assert streams[busy].failure().status is StatusCode.CANCELLED
        send_the_rest(streams[1 - busy], PROBLEM)
        left = streams[1 - busy].receive_results(streams[1 - busy].outcome)
        assert_exact(left, PROBLEM)
        released.set()
        with Stream(channel) as again, Stream(channel) as beside:
            found = {started(stream, PROBLEM) for stream in (again, beside)}
            assert found == {0, 2}  # both devices' memory is there again


@pytest.mark.parametrize("call", [stream_job, compute_job])
def test_a_device_without_memory_is_named_and_goes_on(call):
    backend = ManyDevices((MIB, MIB))
    backend.before[0, "compute_block"] = fail(MemoryError())
    with serving(backend) as (_, channel, _):
        with pytest.raises(CallError) as raised:
            call(channel, PROBLEM)
        assert raised.value.reason == "DEVICE_OUT_OF_MEMORY"
        assert "device 0 (device of 1048576 bytes)" in raised.value.text
        backend.before.clear()
        outcome = call(channel, PROBLEM)
        assert outcome.receipt.device.index == 0
        assert_exact(outcome, PROBLEM)


@pytest.mark.parametrize("call", [stream_job, compute_job])
@pytest.mark.parametrize("step", ["open_job", "take_w", "compute_block", "finish"])
def test_a_lost_device_ends_all_jobs_and_the_server_says_so(call, step, caplog):
    backend = ManyDevices((MIB, MIB))
    caplog.set_level(logging.INFO, "gradwire_server")
    with (
        serving(backend, max_jobs=2) as (server, channel, loop),
        Stream(channel) as beside,
        Stream(channel) as waits,
    ):
        lost = asyncio.run_coroutine_threadsafe(server.wait_lost(), loop)
        assert started(beside, PROBLEM) == 0
        go = threading.Event()

        def lose() -> None:
            assert go.wait(20)
            raise DeviceLostError("illegal memory access")

        backend.before[2, step] = lose

        def send_a_third() -> None:
            waits.send(SMALL.job())
            assert waits.receive().WhichOneof("message") == "queued"
            go.set()

        third = threading.Timer(0.0, send_a_third)
        backend.before[2, "open_job"] = (
            third.start if step != "open_job" else both(third.start, lose)
        )
        with pytest.raises(CallError) as raised:
            call(channel, PROBLEM)
        error = raised.value
        assert (error.status, error.reason) == (StatusCode.UNAVAILABLE, "DEVICE_LOST")
        check = health_pb2_grpc.HealthStub(channel).Check
        answer = check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert beside.failure().reason == "DEVICE_LOST"
        assert waits.failure().reason == "DRAINING"
        third.join()
        with pytest.raises(CallError, match="DRAINING"):
            call(channel, SMALL)
        lost.result(10)
        assert "device 2 (device of 1048576 bytes)" in (server.lost or "")
        assert "illegal memory access" in (server.lost or "")
        (record,) = [r for r in caplog.records if r.levelno == logging.CRITICAL]
        assert "device 2" in record.device
        assert record.error == "illegal memory access"


def both(one: Callable[[], None], other: Callable[[], None]) -> Callable[[], None]:
    def step() -> None:
        one()
        other()

    return step


def test_a_device_that_cannot_be_used_is_an_error_at_the_start():
    backend = ManyDevices((MIB, MIB))
    backend.cannot_enter = 2
    with (
        pytest.raises(BackendError, match=r"device 2 .*: it does not answer"),
        serving(backend),
    ):
        pass


def test_numpy_has_one_device():
    Server(settings_of(backend="numpy", devices=(0,)))
    with pytest.raises(BackendError, match="devices names 2, but the backend numpy"):
        Server(settings_of(backend="numpy", devices=(0, 2)))


def test_metrics_tell_devices_apart_and_what_jobs_hold_of_each() -> None:
    backend = ManyDevices((64 * MIB, 128 * MIB), needs=1000)
    reached, goes_on = threading.Event(), threading.Event()

    def wait() -> None:
        reached.set()
        goes_on.wait(10)

    for device in (0, 2):
        backend.before[device, "compute_block"] = wait
    with (
        serving(backend, metrics_listen="0", device_memory_limit=100 * MIB) as running,
        Stream(running[1]) as stream,
    ):
        url = running[0].metrics_url
        assert url is not None
        mine = str(started(stream, PROBLEM))
        (other,) = {"0", "2"} - {mine}
        send_the_rest(stream, PROBLEM)
        assert reached.wait(10)
        now = scrape(url)
        assert now.by("device_info", "device", "name", "compute_capability") == {
            ("0", f"device of {64 * MIB} bytes", "9.0"): 1,
            ("2", f"device of {128 * MIB} bytes", "9.1"): 1,
        }
        assert now.by("device_memory_limit_bytes", "device") == {
            ("0",): 64 * MIB,
            ("2",): 100 * MIB,
        }
        held = 1000 * PROBLEM.shape[0]
        assert now.by("device_memory_held_bytes", "device") == {(mine,): held}
        assert now.by("device_running_jobs", "device") == {(mine,): 1}
        assert now.by("device_busy", "device") == {(mine,): 1}
        goes_on.set()
        assert_exact(stream.receive_results(stream.outcome), PROBLEM)
        now = scrape(url)
        assert not now.by("device_memory_held_bytes", "device")
        assert not now.by("device_busy", "device")
        done = 3 * 2 * PROBLEM.x.size * PROBLEM.shape[2]
        assert now.by("floating_point_operations_total", "device") == {(mine,): done}
        assert now.sum("device_busy_seconds_total", device=mine) > 0
        assert now.sum("device_busy_seconds_total", device=other) == 0
