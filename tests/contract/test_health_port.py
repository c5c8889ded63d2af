"""A plaintext port for probes, beside a server that wants certificates and tokens."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gradwire.v1 import gradient_service_pb2 as service_pb2
from gradwire.v1 import gradient_service_pb2_grpc
from gradwire_cli.app import run
from gradwire_server import ListenError, Settings, start_in_thread
from tests.contract.conftest import assert_untroubled
from tests.support.certificates import Authority
from tests.support.credentials import make_tokens
from tests.support.raw import SERVICE, Stream, whole_numbers
from tests.support.serving import ServerProcess, running_server

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with mutual TLS, which asks for tokens, of health checks too."""
    directory = tmp_path_factory.mktemp("guarded")
    authority = Authority()
    cert, key = authority.issue("127.0.0.1").write(directory, "server")
    (directory / "tokens.toml").write_text(make_tokens("alice")[1])
    with running_server(
        tls_cert=cert,
        tls_key=key,
        tls_client_ca=authority.write(directory),
        auth_tokens=str(directory / "tokens.toml"),
        auth_health=True,
        health_listen="0",
    ) as server:
        yield server
        assert_untroubled(server)


@pytest.fixture
def channel(guarded: ServerProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(guarded.health_address) as opened:
        yield opened


def test_probes_without_tls_and_token_are_answered(
    guarded: ServerProcess, channel: grpc.Channel, capsys: pytest.CaptureFixture[str]
) -> None:
    assert guarded.health_address.startswith("127.0.0.1:")
    stub = health_pb2_grpc.HealthStub(channel)
    for service in ("", SERVICE):
        request = health_pb2.HealthCheckRequest(service=service)
        assert stub.Check(request, timeout=10).status == SERVING
    assert run(["health", "--address", guarded.health_address]) == 0
    assert "it is SERVING" in capsys.readouterr().out


def test_the_port_serves_nothing_but_health(channel: grpc.Channel) -> None:
    stub = gradient_service_pb2_grpc.GradientServiceStub(channel)
    with pytest.raises(grpc.RpcError) as raised:
        stub.GetServerInfo(service_pb2.GetServerInfoRequest(), timeout=10)
    assert raised.value.code() is StatusCode.UNIMPLEMENTED
    reflection = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    with pytest.raises(grpc.RpcError) as raised:
        list(channel.stream_stream(reflection)(iter([b""]), timeout=10))
    assert raised.value.code() is StatusCode.UNIMPLEMENTED
    check = channel.unary_unary("/grpc.health.v1.Health/Check")
    with pytest.raises(grpc.RpcError) as raised:
        check(b"\n\x80\x40" + b"x" * 8192, timeout=10)
    assert raised.value.code() is StatusCode.RESOURCE_EXHAUSTED


def test_it_says_that_the_server_drains_until_the_process_ends() -> None:
    with (
        running_server(health_listen="127.0.0.1:0", grace=15.0) as server,
        grpc.insecure_channel(server.address) as channel,
        grpc.insecure_channel(server.health_address) as probes,
        Stream(channel) as stream,
    ):
        stub = health_pb2_grpc.HealthStub(probes)
        watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=20)
        assert next(watch).status == SERVING
        problem = whole_numbers(6, 5, 4)
        stream.send(problem.job())
        outcome = stream.receive_accepted()
        server.process.send_signal(signal.SIGTERM)
        assert next(watch).status == NOT_SERVING
        check = stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert check.status == NOT_SERVING
        stream.send_all(problem.body(outcome.accepted.block_rows))
        stream.half_close()
        stream.receive_results(outcome)
        with pytest.raises(grpc.RpcError):
            next(watch)
        assert server.process.wait(10) == 0
        assert_untroubled(server)


def refusal(path: Path, health_listen: str) -> str:
    settings = Settings(
        listen=(f"unix:{path}",), backend="numpy", health_listen=health_listen
    )
    with pytest.raises(ListenError) as raised, start_in_thread(settings):
        pass
    assert not path.exists()
    return str(raised.value)


def test_an_address_that_cannot_be_had_is_a_sentence_and_nothing_is_left(
    tmp_path: Path,
) -> None:
    path = tmp_path / "socket"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"cannot listen on {port}: address already in use" in refusal(path, port)
    for wrong in ("", ":9465", "unix:/tmp/health", "127.0.0.1:http", "70000"):
        text = f"cannot listen on {wrong!r}: expected HOST:PORT or PORT"
        assert refusal(path, wrong) == text
