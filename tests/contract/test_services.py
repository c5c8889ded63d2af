"""What a server says about itself, and the standard services beside it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from gradwire.v1 import gradient_service_pb2 as service_pb2
from gradwire.v1 import gradient_service_pb2_grpc, job_pb2
from gradwire_protocol.row_blocks import rows_of_a_block
from gradwire_server.api.standard import guard
from tests.support import http2
from tests.support.raw import (
    SERVICE,
    Stream,
    assert_exact,
    compute_job,
    server_info,
    stream_job,
    whole_numbers,
)
from tests.support.serving import BACKEND, running_server


@pytest.fixture(scope="module")
def info(channel) -> service_pb2.GetServerInfoResponse:
    return server_info(channel)


def test_server_info_names_contract_version_and_libraries(info):

    assert info.contract == "gradwire.v1"
    assert info.version == version("gradwire")
    assert info.libraries["numpy"] == np.__version__
    assert info.libraries["grpcio"] == grpc.__version__
    assert "python" in info.libraries
    assert info.server_instance


def test_server_info_lists_what_jobs_may_ask_for(info):
    assert list(info.dtypes) == [1, 2, 3, 4]
    assert "checksum-crc32c" in info.features
    assert "direct" in info.features
    limits = info.limits
    assert limits.max_jobs == 64
    assert limits.max_queue == 256
    assert limits.max_columns >= 2**31 - 1
    assert limits.max_message_bytes == 4 << 20
    assert limits.memory_bytes > 1 << 28
    assert limits.idle_timeout_seconds == 60
    assert not info.draining


def test_server_info_describes_the_device_on_which_jobs_run(info, channel):
    outcome = stream_job(channel, whole_numbers(3, 2, 2))
    assert outcome.accepted.device in info.devices
    assert len(info.devices) == 1 or info.devices[0].memory_limit_bytes
    assert info.devices[0].backend == BACKEND
    assert info.devices[0].name
    assert info.devices[0].memory_bytes > 1 << 28
    assert info.backend_reason
    assert info.server_instance == outcome.accepted.server_instance


def test_server_info_says_beforehand_what_decides_the_bits_of_a_job(info, channel):
    problem = whole_numbers(3, 20, 4)
    accepted = stream_job(channel, problem).accepted
    at = list(info.devices).index(accepted.device)
    expected = job_pb2.NumericsFingerprint()
    expected.CopyFrom(accepted.fingerprint)
    for name in ("block_rows", "segment_rows"):
        assert getattr(accepted.fingerprint, name) == accepted.block_rows
        expected.ClearField(name)
    assert list(info.fingerprints)[at] == expected
    assert len(info.fingerprints) == len(info.devices)
    rows = rows_of_a_block(20, 4, 4, info.limits.row_block_bytes)
    assert accepted.block_rows == rows


def test_server_info_counts_the_jobs_that_run_and_that_wait():
    with (
        running_server(max_jobs=1) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = gradient_service_pb2_grpc.GradientServiceStub(channel)

        def jobs() -> tuple[int, int]:
            answer = stub.GetServerInfo(service_pb2.GetServerInfoRequest(), timeout=10)
            return answer.running_jobs, answer.queued_jobs

        assert jobs() == (0, 0)
        problem = whole_numbers(3, 2, 2)
        with Stream(channel) as first, Stream(channel) as second:
            first.send(problem.job())
            first.receive_accepted()
            second.send(problem.job())
            second.receive()
            assert jobs() == (1, 1)


def test_limits_are_the_operators():
    with (
        running_server(
            max_jobs=3,
            max_queue=2,
            memory_limit=1 << 28,
            idle_timeout=7.5,
            row_block_bytes=1 << 16,
        ) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = gradient_service_pb2_grpc.GradientServiceStub(channel)
        limits = stub.GetServerInfo(service_pb2.GetServerInfoRequest()).limits
    assert (limits.max_jobs, limits.max_queue) == (3, 2)
    assert limits.memory_bytes == 1 << 28
    assert limits.idle_timeout_seconds == 7.5
    assert limits.row_block_bytes == 1 << 16


@pytest.mark.parametrize("service", ["", SERVICE])
def test_health_is_serving(channel, service):
    stub = health_pb2_grpc.HealthStub(channel)
    answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_health_of_an_unknown_service_is_not_found(channel):
    stub = health_pb2_grpc.HealthStub(channel)
    with pytest.raises(grpc.RpcError) as raised:
        stub.Check(health_pb2.HealthCheckRequest(service="other"), timeout=10)
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND


def ask(channel, version, **question) -> reflection_pb2.ServerReflectionResponse:
    method = channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )
    requests = iter([reflection_pb2.ServerReflectionRequest(**question)])
    (answer,) = method(requests, timeout=10)
    return answer


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_lists_the_services(channel, version):
    listed = ask(channel, version, list_services="").list_services_response.service
    assert {service.name for service in listed} >= {
        SERVICE,
        "grpc.health.v1.Health",
        "grpc.channelz.v1.Channelz",
        "grpc.reflection.v1alpha.ServerReflection",
    }


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
@pytest.mark.parametrize("symbol", [SERVICE, "gradwire.v1.Job", "gradwire.v1.Chunk"])
def test_reflection_describes_the_contract(channel, version, symbol):
    answer = ask(channel, version, file_containing_symbol=symbol)
    assert answer.file_descriptor_response.file_descriptor_proto


def test_channelz_counts_calls(channel):
    stub = channelz_pb2_grpc.ChannelzStub(channel)

    def started() -> int:
        servers = stub.GetServers(channelz_pb2.GetServersRequest(), timeout=10).server
        return sum(server.data.calls_started for server in servers)

    before = started()
    compute_job(channel, whole_numbers(2, 2, 2))
    assert started() >= before + 2  # that one, and the count's own


def test_a_unix_socket_serves_the_same_contract(tmp_path):
    problem = whole_numbers(50, 6, 5)
    with running_server(listen=[f"unix:{tmp_path / 'socket'}"]) as server:
        assert server.address == f"unix:{tmp_path / 'socket'}"
        with grpc.insecure_channel(server.address) as channel:
            for call in (stream_job, compute_job):
                outcome = call(channel, problem)
                assert_exact(outcome, problem)
                assert outcome.receipt.transport == "unix"


WATCH = "/grpc.health.v1.Health/Watch"
CHECK = "/grpc.health.v1.Health/Check"
SERVING = health_pb2.HealthCheckResponse.SERVING


def watch_health(channel: grpc.Channel) -> Any:
    stub = health_pb2_grpc.HealthStub(channel)
    return stub.Watch(health_pb2.HealthCheckRequest(), timeout=20)


def keep_coming(begin: Callable[[], int]) -> None:
    """Begins calls until those that came before are no longer young."""
    for _ in range(20):
        begin()
        time.sleep(guard.YOUNG_S / 10)


def test_who_watches_health_and_does_not_read_keeps_nobody_from_it_and_no_end():
    with (
        running_server() as server,
        http2.Connection(server.address, window_bytes=0) as deaf,
        grpc.insecure_channel(server.address) as channel,
    ):
        deaf.ask(WATCH, b"")
        watch = watch_health(channel)
        assert next(watch).status == SERVING
        server.process.send_signal(signal.SIGTERM)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert server.process.wait(10) == 0


def test_a_thousand_watches_of_health_cost_who_holds_them_and_no_other():
    with (
        running_server() as server,
        http2.Connection(server.address) as crowd,
        grpc.insecure_channel(server.address) as channel,
    ):
        watch = watch_health(channel)
        assert next(watch).status == SERVING
        first = crowd.ask(WATCH, b"")
        for _ in range(guard.MOST_OPEN - 2):
            crowd.ask(WATCH, b"")
        keep_coming(lambda: crowd.ask(WATCH, b""))
        assert crowd.wait_for_end() == first
        server.process.send_signal(signal.SIGTERM)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING


def test_requests_of_health_that_never_come_whole_keep_no_probe_from_its_answer():
    with (
        running_server() as server,
        http2.Connection(server.address) as stalled,
        grpc.insecure_channel(server.address) as channel,
    ):
        for _ in range(guard.MOST_COMING):
            stalled.send(stalled.begin(CHECK), b"\0\0\x10\0\0half of it")
        keep_coming(lambda: stalled.begin(CHECK))
        assert stalled.wait_for_end() == 1
        check = health_pb2_grpc.HealthStub(channel).Check
        assert check(health_pb2.HealthCheckRequest(), timeout=10).status == SERVING


def test_a_thousand_probes_at_once_are_all_answered(channel):
    check = health_pb2_grpc.HealthStub(channel).Check
    calls = [
        check.future(health_pb2.HealthCheckRequest(), timeout=20) for _ in range(1000)
    ]
    assert {call.result().status for call in calls} == {SERVING}


def test_a_name_of_megabytes_is_kept_by_no_service(channel):
    name = "a" * (1 << 20)
    health = health_pb2_grpc.HealthStub(channel)
    for call in (
        lambda: health.Check(health_pb2.HealthCheckRequest(service=name), timeout=10),
        lambda: list(
            health.Watch(health_pb2.HealthCheckRequest(service=name), timeout=10)
        ),
        lambda: ask(channel, "v1", file_containing_symbol=name),
        lambda: ask(channel, "v1alpha", file_containing_symbol=name),
    ):
        with pytest.raises(grpc.RpcError) as raised:
            call()
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "expected at most 4096" in raised.value.details()


def test_health_lists_all_that_it_knows(channel):
    stub = health_pb2_grpc.HealthStub(channel)
    answer = stub.List(health_pb2.HealthListRequest(), timeout=10)
    assert {name: each.status for name, each in answer.statuses.items()} == {
        "": SERVING,
        SERVICE: SERVING,
        "gradwire.v1.SessionService": SERVING,
    }
