"""The port for direct connections: who gets in, and what is left of the others."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gradwire_protocol.data_plane.frames import ATTACHED, Attach, Direction
from gradwire_server import ListenError, Server, Settings
from gradwire_server.transports.data_plane import (
    Connection,
    DataListener,
    Offer,
    listener,
    make_data_listener,
)
from gradwire_server.transports.data_plane.listener import SocketCounts
from gradwire_server.transports.tls import Certificates
from tests.support.certificates import Authority

UP, DOWN = Direction.UP, Direction.DOWN
LOOPBACK = "127.0.0.1"


class Client:
    """A client's socket, in the event loop.

    Args:
        address: Where to connect.
        tls: For TLS; None: plaintext.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._reader, self._writer = reader, writer

    @classmethod
    async def to(
        cls,
        data: DataListener,
        tls: ssl.SSLContext | None = None,
        from_host: str = LOOPBACK,
    ) -> Client:
        """Connect; under TLS when the handshake is done."""
        port = port_of(data)
        at = from_host, 0
        return cls(
            *await asyncio.open_connection(LOOPBACK, port, ssl=tls, local_addr=at)
        )

    def send(self, content: bytes) -> None:
        self._writer.write(content)

    async def answer(self) -> bytes:
        """What came: `ATTACHED`, or nothing if the server has closed the socket."""
        async with asyncio.timeout(20):
            try:
                return await self._reader.readexactly(len(ATTACHED))
            except (OSError, asyncio.IncompleteReadError):
                return b""

    async def attach(self, token: bytes, direction: Direction, number: int = 0) -> bool:
        """Whether the server answers an Attach with `ATTACHED`, else it closes."""
        self.send(Attach(direction, number, token).encode())
        answer = await self.answer()
        assert answer in {ATTACHED, b""}
        return answer == ATTACHED

    async def receive(self, size: int) -> bytes:
        async with asyncio.timeout(20):
            return await self._reader.readexactly(size)

    def close(self) -> None:
        self._writer.transport.abort()


def port_of(data: DataListener) -> int:
    return int(data.addresses[0].removeprefix(":"))


Listen = Callable[..., Awaitable[DataListener]]


@pytest.fixture
async def listen(nothing_left_open: None) -> AsyncIterator[Listen]:
    """Starts a listener with these settings."""
    async with AsyncExitStack() as stack:

        async def start(**settings: Any) -> DataListener:
            default = {"backend": "numpy", "listen": (f"{LOOPBACK}:1",)}
            given = Settings(**default | settings)
            tls = None if given.tls_cert is None else Certificates(given)
            data = make_data_listener(given, tls)
            assert data is not None
            stack.push_async_callback(data.close)
            await data.start()
            return data

        yield start


@pytest.fixture
async def data(listen: Listen) -> DataListener:
    return await listen()


@pytest.fixture
def nothing_left_open() -> Iterator[None]:
    def sockets() -> set[str]:
        found = set()
        for each in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                found.add(str(each.readlink()))
        return {each for each in found if each.startswith("socket:")}

    before = sockets()
    yield
    assert not sockets() - before


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.005)


async def attached(
    data: DataListener, offer: Offer, tls: ssl.SSLContext | None = None
) -> tuple[list[Client], list[Connection]]:
    """Sockets of a client for every seat, and what the call gets."""
    clients = []
    for number in reversed(range(offer.connections)):
        for direction in (DOWN, UP):
            client = await Client.to(data, tls)
            clients.insert(0, client)
            assert await client.attach(offer.token, direction, number)
    async with asyncio.timeout(20):
        return clients, await offer.attached()


def end(clients: list[Client], connections: list[Connection]) -> None:
    for client in clients:
        client.close()
    for connection in connections:
        connection.up.close()
        connection.down.close()


async def both_ways(clients: list[Client], connections: list[Connection]) -> None:
    """Bytes pass on each socket, to and from a thread that blocks."""
    for number, connection in enumerate(connections):
        # Else its thread would ask the system again and again.
        assert all(each.raw.gettimeout() is None for each in connection)
        up, down = clients[2 * number : 2 * number + 2]
        sent = bytes([number]) * 100_000
        into = bytearray(len(sent))
        receiving = asyncio.to_thread(connection.up.receive, memoryview(into))
        up.send(sent)
        await receiving
        assert into == sent
        sending = asyncio.to_thread(connection.down.send, b"head", sent)
        received, _ = await asyncio.gather(down.receive(4 + len(sent)), sending)
        assert received == b"head" + sent


async def test_a_call_gets_its_sockets_in_order_and_ready_for_frames(
    data: DataListener,
) -> None:
    offer = data.offer(3)
    assert len(offer.token) == 32
    assert offer.token != data.offer(3).token
    clients, connections = await attached(data, offer)
    assert len(connections) == 3
    assert data.counts() == SocketCounts(pending=0, idle=0, attached=6)
    offer.withdraw()
    offer.withdraw()
    await both_ways(clients, connections)
    end(clients, connections)
    assert data.counts() == SocketCounts(0, 0, 0)


async def test_a_call_waits_until_the_last_socket_has_come(data: DataListener) -> None:
    offer = data.offer(1)
    one, other = await Client.to(data), await Client.to(data)
    assert await one.attach(offer.token, UP)
    waiting = asyncio.create_task(offer.attached())
    assert data.counts().attached == 1
    await asyncio.sleep(0.02)
    assert not waiting.done()
    assert await other.attach(offer.token, DOWN)
    connections = await waiting
    await both_ways([one, other], connections)
    end([one, other], connections)


async def test_a_failure_of_the_server_itself_leaves_the_port_open(
    data: DataListener, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(listener, "_PAUSE_S", 0.01)
    with monkeypatch.context() as broken:
        broken.setattr(data, "_certificates", SimpleNamespace(context=None))
        unlucky = await Client.to(data)
        assert await unlucky.answer() == b""
    clients, connections = await attached(data, data.offer(1))
    (record,) = caplog.records
    assert "NoneType" in record.error
    end([unlucky, *clients], connections)


async def test_an_attach_may_come_byte_by_byte_with_frames_right_behind_it(
    data: DataListener,
) -> None:
    offer = data.offer(1)
    up, down = await Client.to(data), await Client.to(data)
    assert await down.attach(offer.token, DOWN)
    content = Attach(UP, 0, offer.token).encode()
    for number in range(len(content) - 1):
        up.send(content[number : number + 1])
        await asyncio.sleep(0)
    up.send(content[-1:] + b"the first frame")
    (connection,) = await offer.attached()
    into = bytearray(15)
    await asyncio.to_thread(connection.up.receive, memoryview(into))
    assert into == b"the first frame"
    end([up, down], [connection])


async def test_a_socket_that_no_call_expects_is_closed_and_changes_nothing(
    data: DataListener,
) -> None:
    offer, ended = data.offer(2), data.offer(1)
    ended.withdraw()
    first = await Client.to(data)
    assert await first.attach(offer.token, UP, 1)
    strangers = [
        Attach(UP, 0, bytes(32)),
        Attach(UP, 0, ended.token),
        Attach(UP, 0, offer.token[:-1] + bytes([offer.token[-1] ^ 1])),
        Attach(UP, 1, offer.token),  # taken
        Attach(UP, 2, offer.token),
        Attach(DOWN, 65535, offer.token),
    ]
    encoded = [each.encode() for each in strangers]
    encoded += [b"GET / HTTP/1.1\r\nHost: somewhere.example\r\n\r\n", bytes(40)]
    encoded += [os.urandom(4096), b"\x16\x03\x01" + bytes(60)]
    for content in encoded:
        client = await Client.to(data)
        client.send(content)
        assert await client.answer() == b"", content
        client.close()
    assert data.counts().attached == 1
    rest = [await Client.to(data) for _ in range(3)]
    for client, seat in zip(rest, [(UP, 0), (DOWN, 0), (DOWN, 1)], strict=True):
        assert await client.attach(offer.token, *seat)
    connections = await offer.attached()
    await both_ways([rest[0], rest[1], first, rest[2]], connections)
    end([first, *rest], connections)


async def test_a_token_ends_with_its_call_and_takes_its_sockets_along(
    data: DataListener,
) -> None:
    offer = data.offer(1)
    up, late = await Client.to(data), await Client.to(data)
    assert await up.attach(offer.token, UP)
    waiting = asyncio.create_task(offer.attached())
    await asyncio.sleep(0)
    offer.withdraw()
    with pytest.raises(ConnectionAbortedError):
        await waiting
    assert await up.answer() == b""
    assert not await late.attach(offer.token, DOWN)
    assert data.counts() == SocketCounts(0, 0, 0)
    end([up, late], [])


async def test_a_client_that_leaves_before_its_answer_costs_nothing(
    data: DataListener,
) -> None:
    offer = data.offer(1)
    for sent in (b"", b"GWDA"):
        client = await Client.to(data)
        client.send(sent)
        client.close()
    await until(lambda: data.counts() == SocketCounts(0, 0, 0))
    clients, connections = await attached(data, offer)
    end(clients, connections)


async def test_a_socket_without_an_attach_is_closed_in_time(
    data: DataListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "_ATTACH_S", 0.1)
    silent, slow = await Client.to(data), await Client.to(data)
    slow.send(Attach(UP, 0, data.offer(1).token).encode()[:-1])
    assert await asyncio.gather(silent.answer(), slow.answer()) == [b"", b""]
    await until(lambda: data.counts().pending == 0)
    end([silent, slow], [])


async def test_hundreds_that_say_nothing_keep_nobody_out(listen: Listen) -> None:
    data = await listen()
    offer = data.offer(1)
    early = await Client.to(data)
    silent = [await Client.to(data, from_host="127.0.0.2") for _ in range(300)]
    await until(lambda: data.counts().pending == 64)
    # The oldest of the host that has the most made room: not the one of another host.
    late = await Client.to(data, from_host="127.0.0.2")
    assert await late.attach(offer.token, DOWN)
    assert await early.attach(offer.token, UP)
    assert data.counts() == SocketCounts(pending=62, idle=0, attached=2)
    connections = await offer.attached()
    assert [await each.answer() for each in silent[:238]] == [b""] * 238
    end([early, late, *silent], connections)


async def test_sockets_are_used_again_by_call_after_call(data: DataListener) -> None:
    offer = data.offer(2)
    clients, connections = await attached(data, offer)
    for _ in range(3):
        offer.withdraw()
        data.reuse(connections)
        await until(lambda: data.counts() == SocketCounts(0, 4, 0))
        offer = data.offer(2)
        # Not in the roles that they had.
        clients = clients[1:] + clients[:1]
        for position, client in enumerate(clients):
            seat = (UP, DOWN)[position % 2], position // 2
            assert await client.attach(offer.token, *seat)
        connections = await offer.attached()
        await both_ways(clients, connections)
    end(clients, connections)


async def test_a_kept_socket_is_closed_for_a_token_that_has_ended(
    data: DataListener,
) -> None:
    offer = data.offer(1)
    clients, connections = await attached(data, offer)
    offer.withdraw()
    data.reuse(connections)
    assert not await clients[0].attach(offer.token, UP)
    assert await clients[1].attach(data.offer(1).token, DOWN)
    await until(lambda: data.counts().idle == 0)
    end(clients, [])


async def test_a_kept_socket_may_idle_for_long_but_not_within_an_attach(
    data: DataListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients, connections = await attached(data, data.offer(1))
    monkeypatch.setattr(listener, "_ATTACH_S", 0.05)
    data.reuse(connections)
    await asyncio.sleep(0.15)
    assert data.counts().idle == 2
    clients[0].send(b"G")
    assert await clients[0].answer() == b""
    assert await clients[1].attach(data.offer(1).token, DOWN)
    end(clients, [])


async def test_sockets_are_not_kept_for_ever_nor_without_bound(
    data: DataListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "_MOST_IDLE", 4)
    offers = [data.offer(2), data.offer(1)]
    every = [await attached(data, offer) for offer in offers]
    for _, connections in every:
        data.reuse(connections)
    # Six sockets: the two that came first made room.
    oldest = every[0][0][:2]
    assert [await each.answer() for each in oldest] == [b"", b""]
    await until(lambda: data.counts().idle == 4)
    monkeypatch.setattr(listener, "_IDLE_S", 0.05)
    clients, connections = await attached(data, data.offer(2))
    data.reuse(connections)
    assert [await each.answer() for each in clients] == [b""] * 4
    for each, _ in every:
        end(each, [])
    end(clients, [])


async def test_without_descriptors_it_waits_says_so_once_and_goes_on(
    data: DataListener, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(listener, "_PAUSE_S", 0.02)
    kept, connections = await attached(data, data.offer(1))
    data.reuse(connections)
    accepts: list[float] = []
    accept = socket.socket.accept

    def counted(sock: socket.socket) -> Any:
        accepts.append(time.monotonic())
        return accept(sock)

    monkeypatch.setattr(socket.socket, "accept", counted)
    port = port_of(data)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as stack:
        clients = [
            stack.enter_context(socket.create_connection((LOOPBACK, port)))
            for _ in range(4)
        ]
        free = os.dup(clients[-1].fileno())
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        try:
            await until(lambda: len(accepts) == 7)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        # The first accept failed. The two sockets that were kept made room for two.
        assert data.counts() == SocketCounts(2, 0, 0)
        assert [await each.answer() for each in kept] == [b"", b""]
        assert accepts[-1] - accepts[-4] > 3 * 0.02
        offer = data.offer(2)
        for number, client in enumerate(clients):
            seat = (UP, DOWN)[number % 2], number // 2
            client.sendall(Attach(*seat, offer.token).encode())
            assert await asyncio.to_thread(client.recv, 8) == ATTACHED
        offer.withdraw()
    (record,) = caplog.records
    assert "cannot be accepted" in record.message
    assert "Too many open files" in record.error
    end(kept, [])


async def test_closing_ends_whatever_no_call_has(data: DataListener) -> None:
    going = await attached(data, data.offer(1))
    kept = await attached(data, data.offer(1))
    data.reuse(kept[1])
    offer = data.offer(1)
    waiting, silent = await Client.to(data), await Client.to(data)
    assert await waiting.attach(offer.token, UP)
    await data.close()
    for each in (*kept[0], waiting, silent):
        assert await each.answer() == b""
    with pytest.raises(OSError, match="Connect call failed"):
        await Client.to(data)
    await both_ways(*going)
    data.reuse(going[1])  # of a call that ends now
    assert await going[0][0].answer() == b""
    assert data.counts() == SocketCounts(0, 0, 0)
    end([*going[0], *kept[0], waiting, silent], [])


# TLS


class Authenticated:
    """Files of a server's certificates, and contexts of its clients."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.authority = Authority()
        self.settings = self.written(self.authority)

    def written(self, authority: Authority) -> dict[str, Path]:
        cert, key = authority.issue(LOOPBACK).write(self.directory, "server")
        return {"tls_cert": Path(cert), "tls_key": Path(key)}

    def client(self, signed_by: Authority | None = None) -> ssl.SSLContext:
        return self.trusting(self.authority, signed_by)

    def trusting(
        self, authority: Authority, signed_by: Authority | None = None
    ) -> ssl.SSLContext:
        context = ssl.create_default_context(cadata=authority.cert.decode())
        if signed_by is not None:
            pair = signed_by.issue(name="client").write(self.directory, "client")
            context.load_cert_chain(*pair)
        return context


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Authenticated:
    return Authenticated(tmp_path_factory.mktemp("tls"))


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_under_tls_calls_get_sockets_again_and_again(
    listen: Listen, files: Authenticated, version: ssl.TLSVersion
) -> None:
    data = await listen(**files.settings)
    assert data.tls
    context = files.client()
    context.minimum_version = context.maximum_version = version
    offer = data.offer(2)
    clients, connections = await attached(data, offer, context)
    await both_ways(clients, connections)
    data.reuse(connections)
    offer = data.offer(2)
    clients[0].send(Attach(UP, 0, offer.token).encode() + b"a frame in the same record")
    assert await clients[0].answer() == ATTACHED
    for position, client in enumerate(clients[1:], 1):
        assert await client.attach(offer.token, (UP, DOWN)[position % 2], position // 2)
    connections = await offer.attached()
    into = bytearray(26)
    await asyncio.to_thread(connections[0].up.receive, memoryview(into))
    assert into == b"a frame in the same record"
    await both_ways(clients, connections)
    end(clients, connections)


async def test_a_peer_without_tls_or_with_an_old_one_gets_nowhere(
    listen: Listen, files: Authenticated, caplog: Any
) -> None:
    data = await listen(**files.settings)
    offer = data.offer(1)
    plain = await Client.to(data)
    assert not await plain.attach(offer.token, UP)
    garbage = await Client.to(data)
    garbage.send(b"\x16\x03\x01\x00\x05" + bytes(60))
    assert await garbage.answer() == b""
    old = files.client()
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    old.set_ciphers("DEFAULT:@SECLEVEL=0")
    with pytest.raises(OSError, match=r"(?i)tls|ssl|eof|reset"):
        await Client.to(data, old)
    assert not caplog.records
    end([plain, garbage], [])


async def test_slow_handshakes_hold_no_thread_and_end_in_time(
    listen: Listen, files: Authenticated, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = await listen(**files.settings)
    slow = [await Client.to(data) for _ in range(20)]
    for each in slow:
        each.send(b"\x16\x03\x01\x02\x00\x01")  # the begin of a ClientHello
    await until(lambda: data.counts().pending == 20)
    clients, connections = await attached(data, data.offer(1), files.client())
    assert data.counts().pending == 20
    end([*clients, *slow], connections)
    await until(lambda: data.counts().pending == 0)
    monkeypatch.setattr(listener, "_ATTACH_S", 0.05)
    late = await Client.to(data)
    late.send(b"\x16\x03\x01\x02\x00\x01")
    assert await late.answer() == b""
    late.close()


async def test_a_listener_closes_while_handshakes_are_under_way(
    listen: Listen, files: Authenticated
) -> None:
    data = await listen(**files.settings)
    context = files.client()
    opening = [asyncio.create_task(Client.to(data, context)) for _ in range(20)]
    await until(lambda: data.counts().pending > 4)
    await data.close()
    for each in await asyncio.gather(*opening, return_exceptions=True):
        if isinstance(each, Client):
            assert not await each.attach(bytes(32), UP)
            each.close()
        else:
            assert isinstance(each, OSError)


async def test_a_client_needs_a_certificate_where_the_call_does(
    listen: Listen, files: Authenticated, tmp_path: Path
) -> None:
    ca = {"tls_client_ca": Path(files.authority.write(tmp_path))}
    data = await listen(**files.settings, **ca)
    offer = data.offer(1)
    for context in (files.client(), files.client(signed_by=Authority())):
        # In TLS 1.3 the client learns of it after its own part of the handshake.
        with contextlib.suppress(OSError):
            stranger = await Client.to(data, context)
            assert not await stranger.attach(offer.token, UP)
            stranger.close()
    good = files.client(signed_by=files.authority)
    clients, connections = await attached(data, offer, good)
    await both_ways(clients, connections)
    end(clients, connections)


async def test_new_sockets_use_new_certificates_and_open_ones_go_on(
    listen: Listen, tmp_path: Path
) -> None:
    files = Authenticated(tmp_path)
    data = await listen(**files.settings)
    old = await attached(data, data.offer(1), files.client())
    data.reuse(old[1])
    another = Authority()
    files.written(another)
    with pytest.raises(ssl.SSLCertVerificationError):
        await Client.to(data, files.client())
    new = await attached(data, data.offer(1), files.trusting(another))
    await both_ways(*new)
    assert await old[0][0].attach(data.offer(1).token, UP)
    # A damaged file changes nothing.
    files.settings["tls_cert"].write_text("nothing")
    again = await attached(data, data.offer(1), files.trusting(another))
    end([*old[0], *new[0], *again[0]], new[1] + again[1])
    await data.close()


# Where it listens


@pytest.mark.parametrize(
    ("settings", "bound"),
    [
        ({"listen": ("127.0.0.1:1",)}, ("127.0.0.1",)),
        ({"listen": ("127.0.0.1:1", "127.0.0.1:2", "unix:/x")}, ("127.0.0.1",)),
        ({"listen": ("localhost:1", "127.0.0.1:1")}, ("localhost", "127.0.0.1")),
        ({"listen": ("127.0.0.2:1", "127.0.0.3:1")}, ("127.0.0.2", "127.0.0.3")),
        ({"listen": ("0.0.0.0:1", "127.0.0.1:2"), "insecure": True},
         ("0.0.0.0", "127.0.0.1")),
        ({"listen": ("[::]:1",), "insecure": True}, ("[::]",)),
        ({"listen": ("0.0.0.0:1", "[::]:1"), "insecure": True}, ("0.0.0.0", "[::]")),
        ({"data_listen": "127.0.0.2:0"}, ("127.0.0.2",)),
        ({"data_listen": "localhost:0", "listen": ("127.0.0.1:1",)}, ("localhost",)),
    ],
)  # fmt: skip
async def test_it_listens_on_one_port_of_every_host(
    listen: Listen, settings: dict[str, Any], bound: tuple[str, ...]
) -> None:
    data = await listen(**settings)
    (address,) = data.addresses
    assert address.startswith(":")
    port = int(address[1:])
    assert data.bound == tuple(f"{host}:{port}" for host in bound)
    for host in bound:
        reached = "127.0.0.9" if host in {"0.0.0.0", "[::]"} else host
        with socket.create_connection((reached, port), timeout=5):
            pass
    await until(lambda: data.counts().pending == 0)


async def test_a_port_can_be_chosen_and_told_differently(listen: Listen) -> None:
    with socket.create_server((LOOPBACK, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ListenError) as caught:
            await listen(data_listen=str(port))
        assert str(caught.value) == (
            f"cannot listen on 127.0.0.1:{port}: address already in use"
        )
    data = await listen(data_listen=str(port), data_advertise="gpu-node:1")
    assert data.bound == (f"127.0.0.1:{port}",)
    assert data.addresses == ("gpu-node:1",)


@pytest.mark.parametrize("given", ["on", "h:x", ":1", "65536", "h:"])
async def test_what_is_no_port_is_refused_with_the_form_of_one(
    listen: Listen, given: str
) -> None:
    with pytest.raises(ListenError, match="expected HOST:PORT, PORT or off"):
        await listen(data_listen=given)


@pytest.mark.parametrize(
    ("settings", "warnings"),
    [({"data_listen": "0.0.0.0:0"}, ["0.0.0.0:0"]), ({"listen": ("0.0.0.0:1",)}, [])],
    ids=["its own host", "that of listen, which has warned"],
)
async def test_plaintext_beyond_loopback_has_to_be_asked_for(
    listen: Listen, settings: dict[str, Any], warnings: list[str], caplog: Any
) -> None:
    caplog.set_level(logging.WARNING, "gradwire_server")
    with pytest.raises(ListenError, match=r"in plaintext.*--insecure"):
        await listen(**settings)
    await listen(**settings, insecure=True)
    assert [each.address for each in caplog.records] == warnings


@pytest.mark.parametrize(
    "settings", [{"listen": ("unix:/x",)}, {"data_listen": "off"}], ids=["unix", "off"]
)
def test_there_is_none_without_a_tcp_address_or_if_it_is_off(settings: Any) -> None:
    assert make_data_listener(Settings(backend="numpy", **settings), None) is None


async def test_a_server_opens_the_port_tells_it_and_closes_it(caplog: Any) -> None:
    listen = (f"{LOOPBACK}:0",)
    caplog.set_level(logging.INFO, "gradwire_server")
    async with Server(Settings(listen=listen, backend="numpy")):
        (record,) = [each for each in caplog.records if each.message == "serving"]
        host, _, port = record.data.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=5) as client:
            assert host == LOOPBACK
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), timeout=5)
    assert client.fileno() == -1


async def test_a_server_whose_data_port_is_taken_does_not_start() -> None:
    with socket.create_server((LOOPBACK, 0)) as taken:
        port = str(taken.getsockname()[1])
        listen = (f"{LOOPBACK}:0",)
        server = Server(Settings(listen=listen, backend="numpy", data_listen=port))
        with pytest.raises(ListenError, match="address already in use"):
            await server.start()
