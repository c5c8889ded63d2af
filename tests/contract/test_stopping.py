"""SIGTERM: running jobs finish, new ones are refused, and the process ends."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator

import grpc
import pytest
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gradwire.v1 import gradient_service_pb2 as service_pb2
from gradwire.v1 import gradient_service_pb2_grpc
from tests.support.raw import (
    SERVICE,
    CallError,
    Stream,
    assert_exact,
    compute_job,
    stream_job,
    whole_numbers,
)
from tests.support.serving import ServerProcess, running_server

PROBLEM = whole_numbers(100, 5, 4)
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@contextlib.contextmanager
def stopping(
    **settings,
) -> Iterator[tuple[ServerProcess, grpc.Channel, Stream]]:
    """A server that was asked to stop while a job runs: all but its rows came."""
    settings = {"row_block_bytes": 1024, "grace": 15.0} | settings
    with (
        running_server(**settings) as server,
        grpc.insecure_channel(server.address) as channel,
        Stream(channel) as stream,
    ):
        stream.send(PROBLEM.job(job_id="running"))
        stream.receive_accepted()
        stream.send_all(PROBLEM.chunks("w", 0, 5))
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service=SERVICE), timeout=20
        )
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        server.process.send_signal(signal.SIGTERM)
        assert next(watch).status == NOT_SERVING
        watch.cancel()
        yield server, channel, stream


def finish(stream: Stream) -> None:
    without_w = list(PROBLEM.body(16))[1:]
    stream.send(*without_w)
    stream.half_close()
    assert_exact(stream.receive_results(stream.outcome), PROBLEM)


def test_a_running_job_finishes_and_then_the_process_ends():
    with stopping() as (server, _, stream):
        finish(stream)
        started = time.monotonic()
        assert server.process.wait(10) == 0
        assert time.monotonic() - started < 5


@pytest.mark.parametrize("call", [stream_job, compute_job])
def test_new_jobs_are_refused_and_told_why(call):
    with stopping() as (server, channel, stream):
        with pytest.raises(CallError) as raised:
            call(channel, PROBLEM)
        assert raised.value.status is StatusCode.UNAVAILABLE
        assert raised.value.reason == "DRAINING"
        assert "about to stop" in raised.value.text
        finish(stream)
        assert server.process.wait(10) == 0


def test_health_and_server_info_say_so_on_new_connections_too():
    with stopping() as (server, _, stream):
        options = [("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(server.address, options) as fresh:
            check = health_pb2_grpc.HealthStub(fresh).Check
            for service in ("", SERVICE):
                request = health_pb2.HealthCheckRequest(service=service)
                assert check(request, timeout=10).status == NOT_SERVING
            stub = gradient_service_pb2_grpc.GradientServiceStub(fresh)
            request = service_pb2.GetServerInfoRequest()
            assert stub.GetServerInfo(request, timeout=10).draining
        finish(stream)
        assert server.process.wait(10) == 0


def test_jobs_that_wait_are_refused_and_the_running_one_is_not():
    with (
        running_server(row_block_bytes=1024, max_jobs=1, grace=15.0) as server,
        grpc.insecure_channel(server.address) as channel,
        Stream(channel) as running,
        Stream(channel) as waiting,
    ):
        running.send(PROBLEM.job())
        running.receive_accepted()
        waiting.send(PROBLEM.job(job_id="waiting"))
        assert waiting.receive().WhichOneof("message") == "queued"
        server.process.send_signal(signal.SIGTERM)
        error = waiting.failure()
        assert error.status is StatusCode.UNAVAILABLE
        assert error.reason == "DRAINING"
        assert error.metadata["job_id"] == "waiting"
        running.send_all(PROBLEM.chunks("w", 0, 5))
        finish(running)
        assert server.process.wait(10) == 0


def test_a_job_that_outlasts_the_grace_period_is_ended():
    with stopping(grace=0.3) as (server, _, stream):
        error = stream.failure()
        assert error.status is StatusCode.UNAVAILABLE
        assert error.reason == "DRAINING"
        assert error.metadata["job_id"] == "running"
        assert "grace" in error.text
        assert server.process.wait(10) == 0


def test_idle_calls_do_not_keep_a_server_from_stopping():
    with (
        running_server(grace=0.3) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        streams = [Stream(channel) for _ in range(5)]
        stub = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=20)
        next(watch)
        server.process.send_signal(signal.SIGTERM)
        for stream in streams:
            assert stream.failure().status in {
                StatusCode.UNAVAILABLE,
                StatusCode.CANCELLED,
            }
        assert server.process.wait(10) == 0


def test_a_server_without_jobs_stops_at_once():
    with running_server(grace=15.0) as server:
        with grpc.insecure_channel(server.address) as channel:
            assert_exact(stream_job(channel, PROBLEM), PROBLEM)
            started = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(10) == 0
        assert time.monotonic() - started < 3


def test_a_server_that_is_killed_is_an_error_and_no_hang():
    with (
        running_server(row_block_bytes=1024) as server,
        grpc.insecure_channel(server.address) as channel,
        Stream(channel) as stream,
    ):
        stream.send(PROBLEM.job())
        stream.receive_accepted()
        started = time.monotonic()
        server.kill()
        assert stream.failure().status is StatusCode.UNAVAILABLE
        assert time.monotonic() - started < 5
