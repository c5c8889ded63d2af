"""Opening direct connections: where, how fast, and what happens if it is impossible."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

import gradwire
from gradwire import Tls
from gradwire._api.options import parse_options
from gradwire._core.frame import Frame, complete_frame
from gradwire._core.job_plan import Plan
from gradwire._transport.direct import connections as connections_module
from gradwire._transport.direct import policy as policy_module
from gradwire._transport.direct.connections import DirectConnection
from gradwire._transport.direct.policy import DirectPolicy
from gradwire._transport.direct.transfer import DirectTransfer
from gradwire._transport.endpoint import Endpoint
from gradwire_protocol.data_plane.frames import ATTACHED, HEADER_BYTES, Direction
from gradwire_protocol.data_plane.sockets import DirectSocket
from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.limits import DIRECT, SHARED_MEMORY
from gradwire_protocol.v1.job_pb2 import DirectAccess
from tests.support.certificates import Authority, Identity
from tests.support.direct_listener import TOKEN, Listener, listening, silent_port

UP, DOWN = Direction.UP, Direction.DOWN
WITH, WITHOUT = SimpleNamespace(features=(DIRECT,)), SimpleNamespace(features=())
CALLED = "127.0.0.1:50051"
LOST = gradwire.ConnectionLostError("cut")
MOST_S = 1.6
"""A second for opening, and some for a busy machine."""


@pytest.fixture
def listener() -> Iterator[Listener]:
    with listening() as made:
        yield made


def policy_of(
    transport: str = "auto", called: str = CALLED, tls: Any = None
) -> DirectPolicy:
    policy = DirectPolicy(transport, Endpoint(called, tls))
    policy.learn(WITH)
    return policy


def access_to(*addresses: str | int, **fields: Any) -> DirectAccess:
    """What a server answers; a number is a port of the host that was called."""
    usual = {"token": TOKEN, "connections": 1, "tls": False}
    where = [f":{each}" if isinstance(each, int) else each for each in addresses]
    return DirectAccess(addresses=where, **(usual | fields))


def opened(
    policy: DirectPolicy, access: DirectAccess, instance: str = "a"
) -> list[DirectConnection]:
    made = policy.open(access, instance, None)
    assert made is not None
    return made


def close(connections: list[DirectConnection]) -> None:
    for each in connections:
        each.close()


def confirm(connections: list[DirectConnection]) -> None:
    """Receive the answers that a transfer would."""
    for each in connections:
        for sock in each.down, each.up:
            answer = bytearray(len(ATTACHED))
            sock.receive(memoryview(answer))
            assert answer == ATTACHED


def large_plan(m: int | None = 10_000, **fields: Any) -> Plan:
    options = parse_options(results=fields.pop("results", ("dx", "dw")))
    return Plan(m, 1024, 1024, Dtype.FLOAT32, options, **fields)


def small_plan(m: int) -> Plan:
    """4 KiB of results a row, and next to no operands."""
    options = parse_options(results=("y",))
    return Plan(m, 1, 1024, Dtype.FLOAT32, options)


def cause_of(access: DirectAccess, called: str = CALLED, tls: Any = None) -> str:
    """Why connections cannot be opened."""
    policy = policy_of("direct", called, tls)
    with pytest.raises(gradwire.ConnectError) as failed:
        policy.open(access, "a", None)
    assert called in str(failed.value)
    assert 'transport="auto"' in str(failed.value)
    return str(failed.value)


def test_each_connection_has_a_socket_for_each_direction(listener: Listener) -> None:
    made = opened(policy_of(), access_to(listener.port, connections=3))
    seats = [(seat.direction, seat.connection) for seat, _ in listener.attached]
    assert sorted(seats) == [(way, number) for way in (UP, DOWN) for number in range(3)]
    for number, each in enumerate(made):
        assert each.confirmed
        sent = bytes([number]) * 5
        listener.socket_of((DOWN, number)).sendall(sent)
        received = bytearray(5)
        each.down.receive(memoryview(received))
        assert received == sent
        here = each.up.raw.getsockname()
        assert here == listener.socket_of((UP, number)).getpeername()
    close(made)
    listener.wait_for_end(6)


def test_an_address_is_used_as_it_is_given_or_with_the_host_of_the_call(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    for address in f":{listener.port}", f"127.0.0.1:{listener.port}":
        close(opened(policy_of(), access_to(address)))
    with contextlib.suppress(OSError), listening(host="::1") as other:
        close(opened(policy_of(called="[::1]:50051"), access_to(other.port)))
        close(opened(policy_of(), access_to(f"[::1]:{other.port}")))
    look_up = socket.getaddrinfo

    def both(host: str, *given: Any, **more: Any) -> Any:
        if host != "localhost":
            return look_up(host, *given, **more)
        return look_up("::1", *given, **more) + look_up("127.0.0.1", *given, **more)

    monkeypatch.setattr(socket, "getaddrinfo", both)
    close(opened(policy_of(called="localhost:50051"), access_to(listener.port)))


def test_the_first_address_that_works_is_used(listener: Listener) -> None:
    with silent_port() as silent:
        began = time.monotonic()
        access = access_to("nowhere", 1, silent, listener.port, connections=2)
        close(opened(policy_of(), access))
        assert time.monotonic() - began < MOST_S


def test_a_port_that_nobody_listens_at_costs_nothing_and_is_remembered(
    caplog: pytest.LogCaptureFixture,
    listener: Listener,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy, plan = policy_of(), large_plan()
    assert policy.connections(plan, several=True) == 2
    began = time.monotonic()
    with caplog.at_level(logging.INFO, "gradwire"):
        assert policy.open(access_to(1), "a", None) is None
        assert time.monotonic() - began < 0.5
        assert policy.connections(plan, several=True) == 0
        # Another job was offered some before.
        assert policy.open(access_to(listener.port), "a", None) is None
    (line,) = caplog.messages
    assert CALLED in line
    assert "127.0.0.1:1: Connection refused" in line
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + policy_module.RETRY_S + 1)
    assert policy.connections(plan, several=True) == 2


def test_a_port_that_does_not_answer_costs_a_second() -> None:
    with silent_port() as port:
        began = time.monotonic()
        assert "no answer" in cause_of(access_to(port, connections=4))
        assert time.monotonic() - began < MOST_S
        # Of a call with less time left nothing is learned.
        policy = policy_of()
        with pytest.raises(TimeoutError):
            policy.open(access_to(port), "a", time.monotonic() + 0.05)
        assert policy.connections(large_plan(), several=True) == 2


def test_a_listener_that_says_nothing_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(policy_module, "OPEN_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        began = time.monotonic()
        assert "no answer" in cause_of(access_to(mute.getsockname()[1]))
        assert time.monotonic() - began < 0.8


def test_a_name_that_cannot_be_looked_up_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    over, look_up = threading.Event(), socket.getaddrinfo

    def slow(*given: Any, flags: int = 0, **more: Any) -> Any:
        if not flags & socket.AI_NUMERICHOST:
            over.wait(20)
        return look_up(*given, flags=socket.AI_NUMERICHOST, **more)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    monkeypatch.setattr(policy_module, "OPEN_S", 0.2)
    began = time.monotonic()
    assert "not looked up" in cause_of(access_to(1), called="gpu-node:50051")
    assert time.monotonic() - began < 0.8
    over.set()


def test_connections_are_refused_whole(listener: Listener) -> None:
    wrong = access_to(listener.port, token=bytes(32), connections=2)
    assert "refuses" in cause_of(wrong)
    listener.wait_for_end(4)


@pytest.mark.parametrize(
    "fields",
    [{"token": b"short"}, {"connections": 0}, {"connections": 10_000}, {"tls": True}],
    ids=str,
)
def test_an_answer_that_cannot_be_is_not_followed(
    listener: Listener, fields: dict[str, Any]
) -> None:
    assert policy_of().open(access_to(listener.port, **fields), "a", None) is None
    assert not listener.accepted


def test_elements_of_a_tunnel_s_call_do_not_leave_this_host_beside_it() -> None:
    elsewhere = access_to("192.0.2.1:5")
    began = time.monotonic()
    assert "has no TLS" in cause_of(elsewhere)
    assert time.monotonic() - began < 0.5


# TLS


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="module")
def identity(authority: Authority) -> Identity:
    return authority.issue("127.0.0.1", "gpu-node")


@pytest.fixture(scope="module")
def context(
    authority: Authority, identity: Identity, tmp_path_factory: Any
) -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.load_cert_chain(*identity.write(tmp_path_factory.mktemp("tls"), "server"))
    return made


def test_connections_of_a_call_with_tls_have_its_settings(
    authority: Authority, context: ssl.SSLContext, tmp_path: Any
) -> None:
    mine = authority.issue(name="me")
    context.load_verify_locations(cadata=authority.cert.decode())
    context.verify_mode = ssl.CERT_REQUIRED
    tls = Tls(ca=authority.write(tmp_path), cert=mine.cert, key=mine.key)
    try:
        with listening(context) as listener:
            access = access_to(listener.port, tls=True, connections=2)
            policy = policy_of(tls=tls)
            made = opened(policy, access)
            (_, sock), *_ = listener.attached
            assert isinstance(sock, ssl.SSLSocket)
            shown = sock.getpeercert()
            assert shown is not None
            assert ((("commonName", "me"),)) in shown["subject"]
            policy.reuse("a", made)
            again = opened(policy, access)
            assert not any(each.confirmed for each in again)
            confirm(again)
            close(again)
            # Another process's network has the pod's address.
            named = Tls(ca=authority.cert, cert=mine.cert, key=mine.key)
            assert "not trusted" in cause_of(access, "localhost:50051", named)
            named = Tls(named.ca, named.cert, named.key, server_name="gpu-node")
            policy = policy_of(called="localhost:50051", tls=named)
            close(opened(policy, access))
            # The server asks for a certificate.
            assert cause_of(access, tls=Tls(ca=authority.cert))
    finally:
        context.verify_mode = ssl.CERT_NONE


def test_a_certificate_of_somebody_else_is_not_trusted(
    context: ssl.SSLContext,
) -> None:
    with listening(context) as listener:
        access = access_to(listener.port, tls=True)
        cause = cause_of(access, tls=Tls(ca=Authority().cert))
        assert "certificate is not trusted" in cause
        assert not listener.attached


def test_a_call_with_tls_is_never_followed_by_plaintext(
    listener: Listener, authority: Authority
) -> None:
    tls = Tls(ca=authority.cert)
    assert "plaintext" in cause_of(access_to(listener.port), tls=tls)
    assert not listener.accepted
    # It says TLS, and does not do it.
    assert cause_of(access_to(listener.port, tls=True), tls=tls)
    assert not listener.attached


# From one call to the next


def test_a_connection_serves_the_next_call_without_a_round_trip(
    listener: Listener,
) -> None:
    policy = policy_of()
    access = access_to(listener.port, connections=2)
    first = opened(policy, access)
    policy.reuse("a", first)
    more = opened(policy, access_to(listener.port, connections=3))
    assert [each.confirmed for each in more] == [False, False, True]
    confirm(more[:2])
    assert len(listener.accepted) == 6
    assert len(listener.attached) == 4 + 6
    policy.reuse("a", more)
    # Another process of the server does not know them.
    other = opened(policy, access_to(listener.port), "b")
    assert other[0].confirmed
    listener.wait_for_end(6)
    close(other)


def test_connections_that_the_server_has_dropped_are_not_used(
    listener: Listener,
) -> None:
    policy = policy_of()
    access = access_to(listener.port)
    policy.reuse("a", opened(policy, access))
    for _, sock in list(listener.attached):
        sock.shutdown(socket.SHUT_RDWR)
    listener.wait_for_end(2)
    again = opened(policy, access)
    assert again[0].confirmed
    close(again)


def test_few_connections_are_kept_and_not_for_long(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections_module, "MOST_FREE", 2)
    policy = policy_of()
    access = access_to(listener.port, connections=3)
    policy.reuse("a", opened(policy, access))
    listener.wait_for_end(2)
    now = time.monotonic()
    late = now + connections_module.MAX_IDLE_S + 1
    policy.reuse("a", [])
    with monkeypatch.context() as later:
        later.setattr(time, "monotonic", lambda: late)
        policy.reuse("a", [])
    listener.wait_for_end(6)


def test_a_child_that_holds_a_socket_does_not_keep_it_open(listener: Listener) -> None:
    policy = policy_of()
    (made,) = opened(policy, access_to(listener.port))
    policy.reuse("a", [made])
    inherited = [os.dup(each.fileno()) for each in (made.up, made.down)]
    policy.close()
    listener.wait_for_end(2)
    for each in inherited:
        os.close(each)


@pytest.mark.parametrize("how", ["close", "drop"])
def test_a_client_that_is_gone_leaves_no_socket(listener: Listener, how: str) -> None:
    policy = policy_of()
    policy.reuse("a", opened(policy, access_to(listener.port)))
    in_use = opened(policy, access_to(listener.port, connections=2))
    if how == "close":
        policy.reuse("a", in_use[:1])
        policy.close()
        policy.reuse("a", in_use[1:])
        assert policy.open(access_to(listener.port), "a", None) is None
        listener.wait_for_end(6)
    else:
        policy.reuse("a", in_use[:1])
        del policy, in_use
        gc.collect()
        listener.wait_for_end(4)


FORKING = """
import os, sys
from tests.client.transport.test_direct import access_to, opened, policy_of

port = int(sys.argv[1])
policy = policy_of()
free, used = opened(policy, access_to(port, connections=2))
policy.reuse("a", [free])
child = os.fork()
if not child:
    policy.after_fork()
    assert not any(each.startswith("socket:") for each in descriptors())
    (own,) = opened(policy, access_to(port))
    assert own.confirmed
    policy.reuse("a", [own])
    sys.exit()
assert os.waitpid(child, 0)[1] == 0
assert used.up.is_idle() and used.down.is_idle()
(again,) = opened(policy, access_to(port))
assert again is free
policy.reuse("a", [used, again])
"""

DESCRIPTORS = """
def descriptors():
    for name in os.listdir("/proc/self/fd"):
        try:
            yield os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            pass
"""


def test_a_child_of_a_fork_uses_none_of_its_parent_s_and_breaks_none(
    listener: Listener,
) -> None:
    """Both end with free connections, without a word."""
    command = [sys.executable, "-X", "dev", "-W", "error"]
    done = subprocess.run(
        [*command, "-c", f"{DESCRIPTORS}{FORKING}", str(listener.port)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert len(listener.accepted) == 6
    listener.wait_for_end(6)


# When to use them


@pytest.mark.parametrize(
    ("plan", "several", "expected"),
    [
        (large_plan(), True, 2),
        (large_plan(), False, 1),
        (large_plan(1030), True, 1),
        (large_plan(1030, block_rows=512), True, 2),
        # W alone has 4 MiB.
        (large_plan(1, results=("dx",)), True, 1),
        (large_plan(511, results=("dw",)), True, 1),
        (small_plan(1023), True, 0),
        (small_plan(1024), True, 1),
        (large_plan(None), True, 0),
    ],
)
def test_jobs_from_4_mib_use_them(plan: Plan, several: bool, expected: int) -> None:
    assert policy_of().connections(plan, several=several) == expected


def test_they_are_used_where_the_server_has_them_and_the_client_allows_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def offered(transport: str, called: str = CALLED, info: Any = WITH) -> int:
        policy = DirectPolicy(transport, Endpoint(called))
        policy.learn(info)
        return policy.connections(large_plan(), several=True)

    assert offered("auto") == 2
    assert offered("auto", info=WITHOUT) == 0
    assert offered("auto", "unix:/run/gradwire") == 0
    assert offered("grpc") == offered("shm") == 0
    assert offered("direct") == 2
    assert offered("auto", "gpu-node:1") == 2
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    assert offered("auto", "gpu-node:1") == 0
    unknown = DirectPolicy("auto", Endpoint(CALLED))
    assert unknown.connections(large_plan(), several=True) == 0


def test_demanded_they_are_used_for_every_job_or_refused() -> None:
    policy = policy_of("direct")
    assert policy.connections(large_plan(1), several=True) == 1
    assert policy.connections(large_plan(None), several=True) == 2
    with pytest.raises(gradwire.ConnectError, match="data-listen"):
        policy.learn(WITHOUT)
    with pytest.raises(gradwire.InputError, match="HOST:PORT"):
        DirectPolicy("direct", Endpoint("unix:/run/gradwire"))
    with pytest.raises(gradwire.ConnectError):
        policy.open(access_to(1), "a", None)
    assert policy.connections(large_plan(), several=True) == 2


def test_after_two_broken_connections_there_is_a_pause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = policy_of()

    def pausing() -> bool:
        return policy.connections(large_plan(), several=True) == 0

    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for _ in range(3):  # of another cause
        policy.failed(gradwire.DeadlineError("late"))
    policy.failed(LOST)
    assert not pausing()
    now += policy_module.RETRY_S + 1
    policy.failed(LOST)
    assert not pausing()
    now += 1
    policy.failed(LOST)
    assert pausing()
    now += policy_module.RETRY_S + 1
    assert not pausing()


@pytest.mark.parametrize("client_of", [gradwire.Client, gradwire.AsyncClient])
def test_several_servers_have_them_but_no_shared_memory(client_of: Any) -> None:
    addresses = ["127.0.0.1:1", "127.0.0.1:2"]
    info = SimpleNamespace(features=(DIRECT, SHARED_MEMORY))
    for transport, expected in ("auto", 2), ("direct", 2), ("grpc", 0):
        client = client_of(addresses, transport=transport)
        for engine in client._engine._servers.engines():
            engine.shm.learn(info)
            engine.direct.learn(info)
            assert not engine.shm.on
            assert engine.direct.demanded == (transport == "direct")
            assert engine.direct.connections(large_plan(), several=True) == expected
    with pytest.raises(gradwire.InputError, match="HOST:PORT"):
        client_of([*addresses, "unix:/run/gradwire"], transport="direct")


@pytest.mark.parametrize("complete", [True, False])
def test_a_server_that_calls_a_client_idle_that_has_sent_all_got_nothing(
    complete: bool,
) -> None:
    """Its bytes may arrive behind that, when a silent wire speaks again."""
    ups, downs = socket.socketpair(), socket.socketpair()
    connection = DirectConnection(
        DirectSocket(ups[0]), DirectSocket(downs[0]), confirmed=True
    )
    go_on = threading.Event()

    def frames(*_: object) -> Iterator[Frame]:
        yield complete_frame(1)
        if not complete:  # the caller's `on_progress` blocks
            go_on.wait(20)

    call: Any = SimpleNamespace(deadline=None, wake=lambda: None, fail=print)
    share = SimpleNamespace(complete=True)
    elements: Any = SimpleNamespace(
        frames=frames, share=lambda _: share, all_sent=False
    )
    transfer = DirectTransfer([connection], call, "there")
    transfer.start(elements, {})
    ups[1].recv(HEADER_BYTES, socket.MSG_WAITALL)
    until = time.monotonic() + 10
    while complete and not elements.all_sent and time.monotonic() < until:
        time.sleep(0.001)
    threading.Timer(0.2, go_on.set).start()
    transfer.end_with(gradwire.ClientIdleError("the client sent nothing"))
    transfer.close()
    assert (transfer.broken is not None) is complete
    for each in (ups[1], downs[1]):
        each.close()
