"""Accepting direct connections.

All of it happens in the event loop, where a peer that is slow or says nothing costs a
descriptor and no thread. A task waits for each socket's Attach, and waits again while
the socket is kept for another call.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import weakref
from collections import Counter
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, TypeAlias

from gradwire_protocol.data_plane.frames import (
    ATTACH_BYTES,
    ATTACHED,
    Attach,
    DirectFramingError,
)
from gradwire_protocol.data_plane.sockets import DirectSocket, tune
from gradwire_server.settings import Settings
from gradwire_server.transports import listener
from gradwire_server.transports.data_plane.nonblocking import (
    handshake,
    readable,
    receive,
)
from gradwire_server.transports.data_plane.offers import (
    AttachRefusedError,
    Connection,
    Offer,
    Offers,
)
from gradwire_server.transports.tls import Certificates

_log = logging.getLogger("gradwire_server")

OFF = "off"
"""Value of the setting `data_listen` for no direct connections."""

_FAILURES = (OSError, EOFError, DirectFramingError, AttachRefusedError)
"""What ends a socket, and is its peer's affair."""

_Waiting: TypeAlias = "dict[asyncio.Task[None], str]"
"""Tasks that wait for an Attach, with the host of each peer; the oldest first."""


class SocketCounts(NamedTuple):
    """The open sockets of direct connections."""

    pending: int
    """Accepted, and no Attach has come."""
    idle: int
    """Kept for another call."""
    attached: int
    """Of a call."""


def make_data_listener(
    settings: Settings, tls: Certificates | None
) -> DataListener | None:
    """Return the listener that the settings ask for, not started, or None."""
    if settings.data_listen == OFF or not _hosts(settings):
        return None
    return DataListener(settings, tls)


class DataListener:
    """Listens for direct connections, and gives them to the calls that offered them.

    Its methods are for the event loop's thread.

    Args:
        settings: The operator's settings, with a TCP address in `listen`.
        tls: The certificates; None: plaintext.

    Attributes:
        addresses: Addresses for clients, once it has started. One without a host stands
            for the host that the client has called.
        bound: The addresses listened on, once it has started.
        tls: Whether the connections are under TLS.
    """

    def __init__(self, settings: Settings, tls: Certificates | None) -> None:
        self.addresses: tuple[str, ...] = ()
        self.bound: tuple[str, ...] = ()
        self.tls = tls is not None
        self._settings = settings
        self._certificates = tls
        self._offers = Offers()
        self._sockets: list[socket.socket] = []
        self._accepting: list[asyncio.Task[None]] = []
        self._pending: _Waiting = {}
        self._idle: _Waiting = {}
        self._attached: weakref.WeakSet[DirectSocket] = weakref.WeakSet()
        self._signers = ThreadPoolExecutor(_SIGNERS, "gradwire-handshake")
        self._quiet_until = 0.0
        self._closed = False

    async def start(self) -> None:
        """Listen.

        Raises:
            ListenError: An address cannot be listened on; the text gives the cause.
        """
        settings = self._settings
        given = settings.data_listen
        host, has_host, number = given.rpartition(":")
        hosts = [host] if has_host else _hosts(settings)
        port, self._sockets = listener.sockets_of_one_port(
            [f"{host}:{number}" for host in hosts],
            f"HOST:PORT, PORT or {OFF}",
            tune,  # before they listen: what they accept inherits it
            tls=self.tls,
            insecure=settings.insecure,
            warn=bool(has_host),  # else it was said of `listen`
        )
        self.bound = tuple(f"{host}:{port}" for host in hosts)
        self.addresses = (settings.data_advertise or f":{port}",)
        for each in self._sockets:
            each.setblocking(False)
            self._accepting.append(asyncio.create_task(self._accept(each)))

    def offer(self, connections: int) -> Offer:
        """Expect the connections of a call.

        The client may have its token from then on, and not before.

        Args:
            connections: Number of connections, at least 1.
        """
        return self._offers.add(connections)

    def reuse(self, connections: Sequence[Connection]) -> None:
        """Keep the sockets of a call that has ended well for another call.

        Args:
            connections: Connections whose frames have all been sent and received. They
                are no longer the caller's.
        """
        for each in (each for connection in connections for each in connection):
            self._attached.discard(each)
            if self._closed or each.fileno() < 0:
                each.close()
                continue
            if len(self._idle) >= _MOST_IDLE:
                _end(self._idle, next(iter(self._idle)))
            each.raw.setblocking(False)
            self._wait(self._idle, each.raw, "", self._attach_again(each.raw))

    def counts(self) -> SocketCounts:
        """Return how many sockets are open."""
        attached = sum(each.fileno() >= 0 for each in self._attached)
        return SocketCounts(len(self._pending), len(self._idle), attached)

    async def close(self) -> None:
        """Close the port, and all sockets that no call has."""
        self._closed = True
        tasks = [*self._accepting, *self._pending, *self._idle]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for each in self._sockets:
            each.close()
        self._offers.withdraw_all()
        self._signers.shutdown(wait=False)

    async def _accept(self, listening: socket.socket) -> None:
        while True:
            await readable(listening)
            try:
                accepted, (host, *_) = listening.accept()
                self._begin(accepted, host)
            except (BlockingIOError, ConnectionError):  # the client has gone
                pass
            except Exception as error:  # noqa: BLE001 - logged; the port stays open
                # Too many open files, for example.
                self._fail(error)
                await asyncio.sleep(_PAUSE_S)

    def _begin(self, sock: socket.socket, host: str) -> None:
        try:
            sock.setblocking(False)
            if self._certificates is not None:
                sock = self._certificates.context().wrap_socket(
                    sock, server_side=True, do_handshake_on_connect=False
                )
            if len(self._pending) >= _MOST_PENDING:
                self._make_room()
            self._wait(self._pending, sock, host, self._attach(sock))
        except BaseException as error:
            sock.close()
            if not isinstance(error, OSError):  # else the client has gone
                raise

    def _fail(self, error: Exception) -> None:
        """Tell that a connection was not accepted, and free what may be missing."""
        now = asyncio.get_running_loop().time()
        if now >= self._quiet_until:
            self._quiet_until = now + _QUIET_S
            _log.error(
                "direct connections cannot be accepted; clients send their elements "
                "in the call",
                extra={"error": str(error)},
            )
        for task in list(self._idle):
            _end(self._idle, task)

    def _make_room(self) -> None:
        """End the oldest of the host that has the most: nobody keeps others out."""
        ((host, _),) = Counter(self._pending.values()).most_common(1)
        oldest = next(task for task, of in self._pending.items() if of == host)
        _end(self._pending, oldest)

    def _wait(
        self,
        among: _Waiting,
        sock: socket.socket,
        host: str,
        attach: Coroutine[Any, Any, None],
    ) -> None:
        task = asyncio.create_task(attach)
        among[task] = host
        task.add_done_callback(partial(_waited, among, sock))

    async def _attach(self, sock: socket.socket) -> None:
        async with asyncio.timeout(_ATTACH_S):
            if isinstance(sock, ssl.SSLSocket):
                await handshake(sock, self._signers)
            data = await receive(sock, ATTACH_BYTES)
        self._give(sock, data)

    async def _attach_again(self, sock: socket.socket) -> None:
        async with asyncio.timeout(_IDLE_S):
            data = await receive(sock, 1)
        async with asyncio.timeout(_ATTACH_S):
            data += await receive(sock, ATTACH_BYTES - 1)
        self._give(sock, data)

    def _give(self, sock: socket.socket, data: bytes) -> None:
        attach = Attach.decode(data)
        offer = self._offers.find(attach)
        self._attached.add(offer.take(attach, sock, partial(_answer, sock)))


def _hosts(settings: Settings) -> list[str]:
    """Return the hosts of the TCP addresses."""
    tcp = (each for each in settings.listen if not each.startswith("unix:"))
    return list(dict.fromkeys(each.rpartition(":")[0] for each in tcp))


def _answer(sock: socket.socket) -> None:
    if sock.send(ATTACHED) != len(ATTACHED):
        raise ConnectionAbortedError  # it still has unread results in its buffers


def _end(among: _Waiting, task: asyncio.Task[None]) -> None:
    among.pop(task)
    task.cancel()


def _waited(among: _Waiting, sock: socket.socket, task: asyncio.Task[None]) -> None:
    """Close the socket unless a call has it."""
    among.pop(task, None)
    if task.cancelled():
        sock.close()
        return
    error = task.exception()
    if error is None:
        return
    sock.close()
    if not isinstance(error, _FAILURES):
        _log.error("a direct connection failed", exc_info=error)
    elif _log.isEnabledFor(logging.DEBUG):
        _log.debug("closed a direct connection", extra={"error": repr(error)})


_ATTACH_S = 5.0
"""Seconds for a handshake and an Attach; for a socket that was kept, from its first
byte on."""

_IDLE_S = 120.0
"""Seconds that a socket is kept for another call."""

_MOST_PENDING = 64

_MOST_IDLE = 256

_SIGNERS = 4
"""Threads for steps of handshakes: the signature in one takes a millisecond."""

_PAUSE_S = 0.2
"""Seconds between attempts to accept when there is no descriptor."""

_QUIET_S = 60.0
"""Seconds after a log line about that in which there is no other."""
