"""What a server says about itself, and the standard services beside it."""

from __future__ import annotations

from importlib.metadata import version

import grpc
import numpy as np
import pytest
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from gradwire.v1 import gradient_service_pb2 as service_pb2
from gradwire.v1 import gradient_service_pb2_grpc
from tests.raw import SERVICE, assert_exact, compute_job, stream_job, whole_numbers
from tests.serving import BACKEND, running_server


@pytest.fixture(scope="module")
def info(channel) -> service_pb2.GetServerInfoResponse:
    stub = gradient_service_pb2_grpc.GradientServiceStub(channel)
    return stub.GetServerInfo(service_pb2.GetServerInfoRequest(), timeout=10)


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
    assert len(info.devices) == 1 or BACKEND == "cupy"
    assert info.devices[0].backend == BACKEND
    assert info.devices[0].name
    assert info.devices[0].memory_bytes > 1 << 28
    assert info.backend_reason
    assert info.server_instance == outcome.accepted.server_instance


def test_limits_are_the_operators():
    with (
        running_server(
            max_jobs=3, max_queue=2, memory_limit=1 << 28, idle_timeout=7.5
        ) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = gradient_service_pb2_grpc.GradientServiceStub(channel)
        limits = stub.GetServerInfo(service_pb2.GetServerInfoRequest()).limits
    assert (limits.max_jobs, limits.max_queue) == (3, 2)
    assert limits.memory_bytes == 1 << 28
    assert limits.idle_timeout_seconds == 7.5


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


def ask(channel, **question) -> reflection_pb2.ServerReflectionResponse:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    requests = iter([reflection_pb2.ServerReflectionRequest(**question)])
    (answer,) = stub.ServerReflectionInfo(requests, timeout=10)
    return answer


def test_reflection_lists_the_services(channel):
    listed = ask(channel, list_services="").list_services_response.service
    assert {service.name for service in listed} >= {
        SERVICE,
        "grpc.health.v1.Health",
        "grpc.channelz.v1.Channelz",
        "grpc.reflection.v1alpha.ServerReflection",
    }


@pytest.mark.parametrize("symbol", [SERVICE, "gradwire.v1.Job", "gradwire.v1.Block"])
def test_reflection_describes_the_contract(channel, symbol):
    answer = ask(channel, file_containing_symbol=symbol)
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
