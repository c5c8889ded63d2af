"""Both sides make sure of each other before anything is computed."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

import gradwire
from gradwire import Tls
from gradwire_server import ListenError, Settings, start_in_thread
from tests.scenarios.test_threads_and_forks import run_script
from tests.support import oracle
from tests.support.behind_proxies import LOST, behind_proxies, moving_threads
from tests.support.certificates import Authority
from tests.support.proxy import Fault
from tests.support.serving import ServerProcess, running_server

HERE = ("localhost", "127.0.0.1")


@dataclass(frozen=True)
class Files:
    """Paths of what an authority has signed, and of what a stranger has."""

    directory: Path
    ca: str
    server: tuple[str, str]
    client: tuple[str, str]
    others_ca: str
    others_client: tuple[str, str]


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="module")
def files(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Files:
    directory = tmp_path_factory.mktemp("certificates")
    stranger = Authority()
    return Files(
        directory=directory,
        ca=authority.write(directory),
        server=authority.issue(*HERE).write(directory, "server"),
        client=authority.issue(name="me").write(directory, "client"),
        others_ca=stranger.write(directory, "others-ca"),
        others_client=stranger.issue(name="me").write(directory, "others-client"),
    )


@pytest.fixture(scope="module")
def tls_server(files: Files) -> Iterator[ServerProcess]:
    """With TLS on a port, and a unix socket in plaintext."""
    cert, key = files.server
    with running_server(
        tls_cert=cert,
        tls_key=key,
        listen=["127.0.0.1:0", f"unix:{files.directory / 'socket'}"],
        allow_shared_memory=True,
        row_block_bytes=4096,
    ) as server:
        yield server


@contextlib.contextmanager
def serving(cert: str, key: str, client_ca: str | None = None) -> Iterator[str]:
    """The address of a server within this process."""
    settings = Settings(
        listen=("127.0.0.1:0",),
        tls_cert=Path(cert),
        tls_key=Path(key),
        tls_client_ca=None if client_ca is None else Path(client_ca),
        backend="numpy",
        cpu_threads=0,
        keep_memory=False,
    )
    with start_in_thread(settings) as server:
        yield server.addresses[0]


@pytest.fixture(scope="module")
def mutual(files: Files) -> Iterator[str]:
    """A server that wants certificates of its clients."""
    with serving(*files.server, files.ca) as address:
        yield address


def connect_sync(address: str, tls: Any, **options: Any) -> Any:
    with gradwire.connect(address, tls=tls, **options) as client:
        return client.gradients(*oracle.operands(50, 30, 20))


def connect_async(address: str, tls: Any, **options: Any) -> Any:
    async def run() -> Any:
        async with gradwire.AsyncClient(address, tls=tls, **options) as client:
            return await client.gradients(*oracle.operands(50, 30, 20))

    return asyncio.run(run())


@pytest.fixture(params=[connect_sync, connect_async], ids=["sync", "async"])
def compute(request: pytest.FixtureRequest) -> Callable[..., Any]:
    chosen: Callable[..., Any] = request.param
    return chosen


@pytest.mark.parametrize("connection", ["compute", "stream", "shm"])
def test_jobs_over_tls_have_the_bits_of_those_in_plaintext(
    tls_server: ServerProcess, files: Files, connection: str
) -> None:
    from gradwire._client.job_factory import Tuning

    operands = oracle.operands(500, 30, 20)
    over_tls, unix = tls_server.addresses
    shared = connection == "shm"
    options: dict[str, Any] = {"transport": "shm" if shared else "grpc"}
    with (
        gradwire.connect(unix, transport="grpc") as plain,
        gradwire.connect(over_tls, tls=Tls(ca=files.ca), **options) as client,
    ):
        client._engine.jobs.tuning = Tuning(
            unary=None if connection == "compute" else False
        )
        expected = plain.gradients(*operands)
        actual = client.gradients(*operands)
    assert actual.receipt.transport == ("shm" if shared else "tcp")
    for one, other in zip(actual[:3], expected[:3], strict=True):
        assert oracle.same_bits(one, other)


def test_the_standard_services_are_behind_tls_too(
    tls_server: ServerProcess, files: Files
) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
        ProtoReflectionDescriptorDatabase,
    )

    credentials = grpc.ssl_channel_credentials(Path(files.ca).read_bytes())
    with grpc.secure_channel(tls_server.address, credentials) as channel:
        request = health_pb2.HealthCheckRequest()
        answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        offered = ProtoReflectionDescriptorDatabase(channel).get_services()
        assert "gradwire.v1.GradientService" in offered


def test_true_trusts_whom_the_system_trusts(
    compute: Callable[..., Any],
    tls_server: ServerProcess,
    files: Files,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(gradwire.TlsError, match="no authority of the system"):
        compute(tls_server.address, True)
    monkeypatch.delenv("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH", raising=False)
    monkeypatch.setenv("SSL_CERT_FILE", files.ca)
    compute(tls_server.address, True)


def refused(
    compute: Callable[..., Any], address: str, tls: Any
) -> gradwire.ConnectError:
    """How a connection is refused, which must not take until it is too late."""
    begun = time.monotonic()
    with pytest.raises(gradwire.ConnectError) as caught:
        compute(address, tls, connect_timeout_s=30)
    assert time.monotonic() - begun < 10
    assert caught.value.status is grpc.StatusCode.UNAVAILABLE
    return caught.value


def test_a_server_that_a_stranger_vouches_for(
    compute: Callable[..., Any], tls_server: ServerProcess, files: Files
) -> None:
    error = refused(compute, tls_server.address, Tls(ca=files.others_ca))
    assert type(error) is gradwire.TlsError
    assert str(error) == (
        f"the certificate of the server at {tls_server.address} is not trusted: no"
        " authority of tls.ca has signed it (unable to get local issuer certificate)"
    )


def test_a_server_of_another_name(
    compute: Callable[..., Any], authority: Authority, files: Files
) -> None:
    other = authority.issue("gpu.example").write(files.directory, "other-name")
    with serving(*other) as address:
        error = refused(compute, address, Tls(ca=files.ca))
        assert type(error) is gradwire.TlsError
        assert "is not for the host of the address" in str(error)
        compute(address, Tls(ca=files.ca, server_name="gpu.example"))
        error = refused(compute, address, Tls(ca=files.ca, server_name="b.example"))
        assert "is not for b.example" in str(error)


def test_a_server_whose_certificate_has_expired(
    compute: Callable[..., Any], authority: Authority, files: Files
) -> None:
    expired = authority.issue(*HERE, expired=True).write(files.directory, "expired")
    with serving(*expired) as address:
        error = refused(compute, address, Tls(ca=files.ca))
    assert type(error) is gradwire.TlsError
    assert str(error) == f"the certificate of the server at {address} has expired"


def test_a_server_whose_certificate_is_not_valid_yet(
    compute: Callable[..., Any], authority: Authority, files: Files
) -> None:
    """Most likely a clock is wrong, so the message says what time it is here."""
    early = authority.issue(*HERE, not_yet=True).write(files.directory, "early")
    with serving(*early) as address:
        error = refused(compute, address, Tls(ca=files.ca))
    assert type(error) is gradwire.TlsError
    assert f"the certificate of the server at {address} cannot be used:" in str(error)
    assert "certificate is not yet valid (by the clock of this" in str(error)
    assert "no authority" not in str(error)


def test_a_server_in_plaintext(
    compute: Callable[..., Any], server_address: str, files: Files
) -> None:
    error = refused(compute, server_address, Tls(ca=files.ca))
    assert type(error) is gradwire.TlsError
    assert f"the server at {server_address} does not use TLS" in str(error)


def test_a_client_in_plaintext(
    compute: Callable[..., Any], tls_server: ServerProcess
) -> None:
    error = refused(compute, tls_server.address, None)
    assert "closed the connection at once: it expects TLS (tls=...)" in str(error)


def test_a_client_that_shows_no_certificate_or_a_strangers(
    compute: Callable[..., Any], mutual: str, files: Files
) -> None:
    error = refused(compute, mutual, Tls(ca=files.ca))
    assert "it requires a client certificate (tls.cert)" in str(error)
    cert, key = files.others_client
    error = refused(compute, mutual, Tls(ca=files.ca, cert=cert, key=key))
    assert "it does not trust tls.cert" in str(error)


def test_a_client_that_shows_its_certificate(
    compute: Callable[..., Any], mutual: str, files: Files
) -> None:
    cert, key = files.client
    compute(mutual, Tls(ca=files.ca, cert=cert, key=key))


FORK = """
    import os, sys
    import numpy as np
    import gradwire
    x = np.ones((3, 3))
    client = gradwire.connect(
        sys.argv[1], tls=gradwire.Tls(ca=sys.argv[2]), transport="grpc"
    )
    client.forward(x, x)
    child = os.fork()
    if child == 0:
        print(client.forward(x, x).sum(), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


def test_a_child_of_a_fork_makes_a_connection_of_its_own(
    tls_server: ServerProcess, files: Files
) -> None:
    assert run_script(FORK, tls_server.address, files.ca) == "27.0\n"


def test_new_certificates_are_shown_from_the_next_connection_on(
    tmp_path: Path, files: Files, authority: Authority
) -> None:
    renewed = Authority()
    new_ca = renewed.write(tmp_path, "new-ca")
    cert, key = authority.issue(*HERE).write(tmp_path, "server")
    x, w, dy = oracle.operands(400, 30, 20)
    with (
        running_server(tls_cert=cert, tls_key=key, row_block_bytes=4096) as server,
        gradwire.connect(server.address, tls=Tls(ca=files.ca)) as client,
    ):
        rows = ((x[i : i + 100], dy[i : i + 100]) for i in range(0, 400, 100))
        with client.stream(rows, w) as stream:
            next(stream)

            # Half of what belongs together, as while somebody writes it.
            half = renewed.issue(*HERE)
            Path(cert).write_bytes(half.cert)
            for _ in range(3):
                connect_sync(server.address, Tls(ca=files.ca))
            errors = [r for r in server.records if r["levelname"] == "ERROR"]
            assert [r["error"] for r in errors] == [
                f"tls_key ({key}) is not the key of the certificate"
            ]

            half.write(tmp_path, "server")
            connect_sync(server.address, Tls(ca=new_ca))
            assert server.wait_for_log("reloaded the TLS certificates")
            with pytest.raises(gradwire.TlsError, match="is not trusted"):
                connect_sync(server.address, Tls(ca=files.ca))

            blocks = [block.first_row for block in stream]
            assert blocks
        assert stream.receipt.m == 400


def test_every_address_shows_certificates_that_a_link_now_leads_to(
    tmp_path: Path, files: Files, authority: Authority
) -> None:
    """As Kubernetes renews a mounted secret: in one step, by a link's target."""
    renewed = Authority()
    new_ca = renewed.write(tmp_path, "new-ca")
    for name, signer in (("old", authority), ("new", renewed)):
        (tmp_path / name).mkdir()
        signer.issue(*HERE).write(tmp_path / name, "server")
    now, later = tmp_path / "now", tmp_path / "later"
    now.symlink_to("old")
    later.symlink_to("new")
    listen = ["127.0.0.1:0", "127.0.0.2:0"]
    cert, key = str(now / "server.pem"), str(now / "server-key.pem")
    with running_server(tls_cert=cert, tls_key=key, listen=listen) as server:
        connect_sync(server.address, Tls(ca=files.ca))
        later.rename(now)
        for address in server.addresses:
            tls = Tls(ca=new_ca, server_name="localhost")
            gradwire.connect(address, tls=tls).close()
        assert not [r for r in server.records if r["levelname"] == "ERROR"]


def test_files_may_begin_with_a_byte_order_mark(tmp_path: Path, files: Files) -> None:
    marked = []
    for number, path in enumerate((*files.server, files.ca)):
        marked.append(tmp_path / f"{number}.pem")
        marked[-1].write_bytes(codecs.BOM_UTF8 + Path(path).read_bytes())
    cert, key, ca = map(str, marked)
    with running_server(tls_cert=cert, tls_key=key) as server:
        connect_sync(server.address, Tls(ca=ca))


@pytest.mark.parametrize("wrong", ["tls_cert", "tls_key", "tls_client_ca"])
def test_a_server_does_not_start_with_files_that_cannot_be_used(
    tmp_path: Path, files: Files, wrong: str
) -> None:
    names = dict(zip(("tls_cert", "tls_key"), files.server, strict=True))
    names["tls_client_ca"] = files.ca
    paths = {name: Path(path) for name, path in names.items()}
    for content, text in (
        (None, "cannot be read: No such file or directory"),
        (b"", "holds no "),
    ):
        path = tmp_path / "file.pem"
        if content is not None:
            path.write_bytes(content)
        settings = Settings(
            listen=("127.0.0.1:0",), backend="numpy", **(paths | {wrong: path})
        )
        with (
            pytest.raises(ListenError) as caught,
            start_in_thread(settings),
        ):
            pass
        assert f"cannot listen with TLS: {wrong} ({path}) {text}" in str(caught.value)


@pytest.mark.thorough
def test_direct_connections_under_tls_break_and_end_as_others_do(files: Files) -> None:
    cert, key = files.server
    x, w, dy = oracle.operands(8000, 30, 20)
    options: Any = {"tls": Tls(ca=files.ca)}
    with behind_proxies(tls_cert=cert, tls_key=key, row_block_bytes=1 << 16) as behind:
        with behind.connect(transport="grpc", **options) as client:
            expected = client.gradients(x, w, dy)
        with behind.connect(**options) as client:
            faults = [
                None,
                None,  # on the connections of the last job
                *(Fault("requests", cut_after_bytes=at) for at in (30_000, 900_000)),
                *(Fault("responses", cut_after_bytes=at) for at in (30_000, 900_000)),
                *(Fault("requests", flip_byte=at) for at in (40_000, 500_000)),
                *(Fault("responses", flip_byte=at) for at in (40_000, 500_000)),
            ]
            for fault in faults:
                behind.data.arm(fault)
                result = client.gradients(x, w, dy)
                assert set(result.receipt.retried) <= LOST, fault
                assert bool(result.receipt.retried) == bool(fault), fault
                assert result.receipt.transport == "direct"
                assert oracle.same_bits(result.y, expected.y), fault
                assert oracle.same_bits(result.dw, expected.dw), fault
            paused = threading.Event()

            def pause(progress: gradwire.Progress) -> None:
                if progress.bytes_received > 10_000 and not paused.is_set():
                    behind.data.pause()
                    paused.set()

            # More than the buffers on the way hold: the server cannot be done by then.
            long = oracle.operands(80_000, 30, 20)
            with pytest.raises(gradwire.DeadlineError):
                client.gradients(*long, on_progress=pause, timeout_s=1)
            assert paused.is_set()
            behind.heal()
            assert not moving_threads()
