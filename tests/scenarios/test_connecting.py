"""What a caller is told when there is no gradwire server to be had."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest

import gradwire
from gradwire.v1 import gradient_service_pb2_grpc
from gradwire.v1.gradient_service_pb2 import GetServerInfoResponse
from gradwire_protocol import error_details
from gradwire_protocol.error_details import ErrorDetails
from gradwire_protocol.error_reasons import Reason
from tests.support import oracle
from tests.support.serving import ServerProcess, running_server


def connect_sync(address: str, **options: Any) -> None:
    gradwire.connect(address, **options).close()


def connect_async(address: str, **options: Any) -> None:
    async def enter() -> None:
        async with gradwire.AsyncClient(address, **options):
            pass

    asyncio.run(enter())


@pytest.fixture(params=[connect_sync, connect_async])
def connect(request: pytest.FixtureRequest) -> Callable[..., None]:
    chosen: Callable[..., None] = request.param
    return chosen


@contextlib.contextmanager
def listening(answer: Callable[[socket.socket], None] | None) -> Iterator[str]:
    """A listener that does one thing to each who connects, or nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        if answer is not None:

            def accept() -> None:
                with contextlib.suppress(OSError):
                    while True:
                        connection, _ = listener.accept()
                        with connection:
                            answer(connection)

            threading.Thread(target=accept, daemon=True).start()
        yield address
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def grpc_server(
    servicer: gradient_service_pb2_grpc.GradientServiceServicer | None,
) -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    if servicer is not None:
        gradient_service_pb2_grpc.add_GradientServiceServicer_to_server(
            servicer, server
        )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0).wait()


class OfTheNextContract(gradient_service_pb2_grpc.GradientServiceServicer):
    def GetServerInfo(self, request: Any, context: Any) -> Any:  # noqa: N802
        return GetServerInfoResponse(contract="gradwire.v2", version="9.0")


class Remembers(gradient_service_pb2_grpc.GradientServiceServicer):
    def __init__(self) -> None:
        self.metadata: dict[str, Any] = {}

    def GetServerInfo(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.metadata |= dict(context.invocation_metadata())
        return GetServerInfoResponse(contract="gradwire.v1")

    def Compute(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.metadata |= dict(context.invocation_metadata())
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, "seen")


class RefusesThisContract(gradient_service_pb2_grpc.GradientServiceServicer):
    def GetServerInfo(self, request: Any, context: Any) -> Any:  # noqa: N802
        details = ErrorDetails(reason=Reason.CONTRACT_UNKNOWN)
        text = "this server speaks gradwire.v2"
        trailers = error_details.encode(grpc.StatusCode.UNIMPLEMENTED, text, details)
        context.set_trailing_metadata(trailers)
        context.abort(grpc.StatusCode.UNIMPLEMENTED, text)


def test_nobody_listens(connect: Callable[..., None]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(gradwire.ConnectError) as refused:
        connect(f"127.0.0.1:{port}")
    assert str(refused.value) == (
        f"nothing listens at 127.0.0.1:{port} (Connection refused)"
    )
    assert refused.value.status is grpc.StatusCode.UNAVAILABLE


def test_a_client_may_start_before_its_server(
    connect: Callable[..., None], tmp_path: Path
) -> None:
    path = tmp_path / "s"
    address = f"unix:{path}"
    with futures.ThreadPoolExecutor(1) as pool:
        connected = pool.submit(connect, address, wait_for_ready_s=60)
        time.sleep(0.3)  # attempts are made, and fail
        assert not connected.done()
        with running_server(listen=[address]):
            connected.result(30)


def test_one_of_several_servers_may_start_late(tmp_path: Path) -> None:
    addresses = [f"unix:{tmp_path / name}" for name in "ab"]
    with futures.ThreadPoolExecutor(1) as pool:
        connected = pool.submit(gradwire.connect, addresses, wait_for_ready_s=60)
        with running_server(listen=[addresses[1]]), connected.result(30) as client:
            assert client.forward([[2.0]], [[3.0]]).item() == 6


def test_waiting_for_a_server_has_an_end(connect: Callable[..., None]) -> None:
    began = time.monotonic()
    with pytest.raises(gradwire.ConnectError, match="nothing listens"):
        connect("127.0.0.1:1", wait_for_ready_s=0.4)
    assert 0.4 <= time.monotonic() - began < 20


def test_what_never_becomes_a_server_is_not_waited_for(
    connect: Callable[..., None],
) -> None:
    with (
        grpc_server(RefusesThisContract()) as address,
        pytest.raises(gradwire.ContractError),
    ):
        connect(address, wait_for_ready_s=600)
    with pytest.raises(gradwire.InputError, match="wait_for_ready_s is -1"):
        connect("127.0.0.1:1", wait_for_ready_s=-1)


def test_a_socket_may_have_any_name_but_one_with_a_comma(
    connect: Callable[..., None], tmp_path: Path
) -> None:
    """gRPC would read these names as parts of a URI, and use another socket."""
    names = ["a#1", "a?1", "a%41", "100%", "a b", "%2C", "ä"]
    addresses = [f"unix:{tmp_path / name}" for name in names]
    with running_server(listen=addresses) as server:
        assert server.addresses == tuple(addresses)
        assert {path.name for path in tmp_path.iterdir()} == set(names)
        for address in addresses:
            connect(address)
    assert not list(tmp_path.iterdir())


WITHOUT_DESCRIPTORS = """
    import os, resource, sys

    import gradwire

    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    held = []
    first = gradwire.connect(sys.argv[1])  # gRPC needs descriptors to begin with
    client = gradwire.Client(sys.argv[1])
    try:
        while True:
            held.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        pass
    try:
        client.handshake()
    except gradwire.ConnectError as error:
        print(ascii(str(error)), ascii(error.details))
    for each in held:
        os.close(each)
    with first, gradwire.connect(sys.argv[1], wait_for_ready_s=20):
        print("connected")
"""


@pytest.mark.parametrize("over", ["tcp", "unix"])
def test_a_process_with_too_many_open_files_is_told(
    small_blocks: ServerProcess, over: str
) -> None:
    address = small_blocks.addresses[over == "unix"]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WITHOUT_DESCRIPTORS), address],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    told, last = done.stdout.splitlines()
    says = f"too many open files to connect to {address}: raise its limit (ulimit -n)"
    assert says in told
    assert "\\x" not in told  # gRPC appends the bytes of the socket's address
    assert last == "connected"


MOVED = """
    import subprocess, sys

    import gradwire
    from tests.support.serving import running_server

    hosts, port = sys.argv[1:]


    def place(address):
        with open(hosts, "w") as file:
            file.write(address + " moving-node\\n")
        return running_server(listen=[f"{address}:{port}"])


    with place("127.0.0.2"):
        subprocess.run(["mount", "--bind", hosts, "/etc/hosts"], check=True)
        client = gradwire.connect(f"moving-node:{port}")
        client.forward([[2.0]], [[3.0]])
    with place("127.0.0.3"), client:
        print(client.forward([[2.0]], [[3.0]], timeout_s=60).item())
"""


def test_a_server_that_moved_to_another_address_is_found(tmp_path: Path) -> None:
    """As a container does that is started anew, with the same name."""
    own_mounts = ["unshare", "--map-root-user", "--mount"]
    if (
        shutil.which("unshare") is None
        or subprocess.run(
            [*own_mounts, "mount", "--bind", tmp_path, tmp_path], check=False
        ).returncode
    ):
        pytest.skip("this user may not change what a name means")
    with socket.create_server(("127.0.0.2", 0)) as taken:
        port = taken.getsockname()[1]
    done = subprocess.run(
        [
            *own_mounts,
            *(sys.executable, "-c", textwrap.dedent(MOVED)),
            *(str(tmp_path / "hosts"), str(port)),
        ],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.stdout == "6.0\n", done.stderr


def test_a_proxy_that_does_not_answer_is_named(
    connect: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://me:secret@127.0.0.1:1")
    with pytest.raises(gradwire.ConnectError) as refused:
        connect("gpu-node.invalid:50051")
    assert str(refused.value) == (
        "nothing listens at gpu-node.invalid:50051, or at the proxy on the way to it"
        " (http_proxy=http://127.0.0.1:1; Connection refused)"
    )
    monkeypatch.setenv("no_proxy", "example.com, .invalid")
    with pytest.raises(gradwire.ConnectError, match="has no known address"):
        connect("gpu-node.invalid:50051")


def test_no_such_socket(connect: Callable[..., None], tmp_path: Path) -> None:
    address = f"unix:{tmp_path / 'none'}"
    with pytest.raises(gradwire.ConnectError) as refused:
        connect(address)
    assert str(refused.value) == (
        f"nothing listens at {address} (No such file or directory)"
    )


def test_no_such_name(connect: Callable[..., None]) -> None:
    with pytest.raises(gradwire.ConnectError) as refused:
        connect("no-such-host.invalid:50051")
    assert str(refused.value) == (
        "the name in no-such-host.invalid:50051 has no known address"
    )


def test_nobody_answers_within_the_timeout(connect: Callable[..., None]) -> None:
    started = time.monotonic()
    with listening(None) as address, pytest.raises(gradwire.ConnectError) as refused:
        connect(address, connect_timeout_s=0.5)
    assert time.monotonic() - started < 5
    assert str(refused.value) == (
        f"no gradwire server answered at {address} within 0.5 s"
    )


def test_a_web_server(connect: Callable[..., None]) -> None:
    class Quiet(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{web.server_port}"
        with pytest.raises(gradwire.ConnectError) as refused:
            connect(address)
        web.shutdown()
    assert str(refused.value) == (
        f"the server at {address} does not support HTTP/2, so it is not a gradwire"
        " server"
    )


def test_something_that_hangs_up(connect: Callable[..., None]) -> None:
    def hang_up(connection: socket.socket) -> None:
        connection.recv(1)

    with (
        listening(hang_up) as address,
        pytest.raises(
            gradwire.ConnectError, match="is not a gradwire server, or is stopping"
        ),
    ):
        connect(address)


def test_another_grpc_server(connect: Callable[..., None]) -> None:
    with grpc_server(None) as address, pytest.raises(gradwire.ContractError) as refused:
        connect(address)
    assert str(refused.value) == (
        f"the gRPC server at {address} does not offer gradwire.v1.GradientService"
        " (Method not found!)"
    )


def test_a_server_of_another_contract(connect: Callable[..., None]) -> None:
    with (
        grpc_server(OfTheNextContract()) as address,
        pytest.raises(gradwire.ContractError) as refused,
    ):
        connect(address)
    assert str(refused.value) == (
        f"the server at {address} (gradwire 9.0) has contract gradwire.v2, but this"
        " client has gradwire.v1: update one of them"
    )


def test_a_server_that_refuses_this_contract(connect: Callable[..., None]) -> None:
    with (
        grpc_server(RefusesThisContract()) as address,
        pytest.raises(gradwire.ContractError) as refused,
    ):
        connect(address)
    assert str(refused.value) == (
        f"the server at {address} does not support gradwire.v1: this server speaks"
        " gradwire.v2"
    )
    assert refused.value.reason is Reason.CONTRACT_UNKNOWN


@pytest.mark.parametrize("unary", [True, False], ids=["compute", "stream"])
def test_a_client_that_shook_no_hands_is_told_the_same(unary: bool) -> None:
    from gradwire._client.job_factory import Tuning

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    client = gradwire.Client(f"127.0.0.1:{port}", retries=False)
    client._engine.jobs.tuning = Tuning(unary=unary)
    with pytest.raises(gradwire.ConnectError, match="nothing listens at") as refused:
        client.gradients(*oracle.operands(3, 4, 5), request_id="never")
    assert refused.value.job_id == "never"
    client.close()


def test_the_callers_metadata_goes_with_every_call() -> None:
    servicer = Remembers()
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    with (
        grpc_server(servicer) as address,
        gradwire.connect(address, metadata={"tenant": "blue"}) as client,
    ):
        assert servicer.metadata["tenant"] == "blue"
        assert servicer.metadata["user-agent"].startswith("gradwire/")
        servicer.metadata.clear()
        with pytest.raises(gradwire.RequestError, match="seen"):
            client.gradients(
                *oracle.operands(2, 2, 2),
                metadata={"traceparent": trace},
                request_id="the job",
            )
        assert servicer.metadata["tenant"] == "blue"
        assert servicer.metadata["traceparent"] == trace
        # For proxies, unless the caller knows better.
        assert servicer.metadata["gradwire-affinity"] == "the job"
        with pytest.raises(gradwire.RequestError, match="seen"):
            client.forward([[1.0]], [[1.0]], metadata={"gradwire-affinity": "red"})
        assert servicer.metadata["gradwire-affinity"] == "red"


def test_a_proxy_is_not_asked_for_this_host(
    connect: Callable[..., None],
    server_address: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    connect(server_address)


@pytest.mark.thorough
def test_a_server_that_was_away_for_seconds_is_found_again_at_once() -> None:
    # Half a second, a fifth of it as jitter, and one for a busy machine, which may
    # take longer once in a while.
    assert any(found_again_after_s() < 0.5 * 1.2 + 1 for _ in range(5))


def found_again_after_s() -> float:
    x, w, _ = oracle.operands(3, 4, 5)
    with running_server() as server:
        address = server.address
        client = gradwire.connect(address)
        client.forward(x, w)
    gone = time.monotonic()
    # The more often it is not found, the longer gRPC waits to look again.
    while time.monotonic() - gone < 2:
        with pytest.raises(gradwire.GradwireError):
            client.forward(x, w)
        time.sleep(0.02)
    with running_server(listen=[address]), client:
        back = time.monotonic()
        while True:
            with contextlib.suppress(gradwire.ConnectError):
                client.forward(x, w)
                break
            time.sleep(0.02)
        return time.monotonic() - back
