"""Opening direct connections, and keeping them from one call to the next."""

from __future__ import annotations

import errno
import os
import queue
import selectors
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address
from typing import Any, TypeAlias, TypeVar

from gradwire._api.errors import ConnectError
from gradwire._transport.endpoint import Endpoint
from gradwire_protocol.data_plane.frames import (
    ATTACHED,
    ATTACHED_BYTES,
    TOKEN_BYTES,
    Attach,
    Direction,
)
from gradwire_protocol.data_plane.sockets import DirectSocket, tune
from gradwire_protocol.v1.job_pb2 import DirectAccess

R = TypeVar("R")

MOST_FREE = 16
"""Most connections of a server that are kept between calls."""

MAX_IDLE_S = 60.0
"""Seconds for which a connection is kept. The server drops it after twice as long, so
that it is not dropped while it is attached."""

_MOST_OPENED = 64
"""Most connections of a call, whatever the server says."""


class NoDirectConnectionError(ConnectError):
    """Direct connections are demanded, and there are none."""


class CannotOpenError(Exception):
    """Direct connections cannot be opened; the text is a clause that says why."""


@dataclass(eq=False)
class DirectConnection:
    """A pair of sockets, each with frames in one direction.

    They block, and return now and then (`DirectSocket.set_blocking`).
    """

    up: DirectSocket
    """Sends operands."""

    down: DirectSocket
    """Receives results."""

    confirmed: bool
    """False: the server's answers to both Attach are still to be received: on `down`
    before the first frame, on `up` after the last."""

    def close(self) -> None:
        """End the connection. No other thread may use it then."""
        for each in self.up, self.down:
            # In a child of a fork there may be other descriptors of the socket.
            each.shutdown()
            each.close()

    def forget(self) -> None:
        """Close the descriptors in a child: the connection is the parent's."""
        self.up.close()
        self.down.close()

    def attach(self, number: int, token: bytes) -> None:
        """Begin to use a free connection for a call.

        Args:
            number: Number of the connection.
            token: The call's token.

        Raises:
            OSError: The connection is broken.
        """
        self.confirmed = False
        self.down.send(Attach(Direction.DOWN, number, token).encode())
        self.up.send(Attach(Direction.UP, number, token).encode())


class ConnectionPool:
    """The free connections of one server. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._instance = ""
        self._closed = False
        self._free: list[tuple[float, DirectConnection]] = []
        self._opened: weakref.WeakSet[DirectSocket] = weakref.WeakSet()
        self._finalizer = weakref.finalize(self, _close_free, self._free, os.getpid())

    def take(self, server_instance: str) -> DirectConnection | None:
        """Take a connection that is still open; None if there is none."""
        with self._lock:
            self._drop(server_instance)
            while self._free:
                _, last = self._free.pop()
                if last.up.is_idle() and last.down.is_idle():
                    return last
                last.close()
        return None

    def put(
        self, server_instance: str, connections: Iterable[DirectConnection]
    ) -> None:
        """Keep connections for other calls, or close them."""
        with self._lock:
            self._drop(server_instance)
            now = time.monotonic()
            for each in connections:
                if self._closed or len(self._free) >= MOST_FREE:
                    each.close()
                else:
                    self._free.append((now, each))

    def track(self, connections: Iterable[DirectConnection]) -> bool:
        """Have connections closed in a child of a fork; False: the pool is closed."""
        with self._lock:
            for each in connections:
                self._opened.update((each.up, each.down))
            return not self._closed

    def close(self) -> None:
        """Close the free connections, and keep no more."""
        with self._lock:
            self._closed = True
            _close_free(self._free, os.getpid())

    def after_fork(self) -> None:
        """Forget all connections in a child of a fork."""
        self._lock = threading.Lock()
        self._free.clear()
        self._finalizer.detach()
        self._finalizer = weakref.finalize(self, _close_free, self._free, os.getpid())
        for each in list(self._opened):
            # Without `shutdown`, which would end the parent's connection.
            each.close()
        self._opened = weakref.WeakSet()

    def _drop(self, server_instance: str) -> None:
        """Close connections of another server process, and those that are too old."""
        since = time.monotonic() - MAX_IDLE_S
        if server_instance != self._instance:
            self._instance, since = server_instance, float("inf")
        while self._free and self._free[0][0] < since:
            self._free.pop(0)[1].close()


def _close_free(free: list[tuple[float, DirectConnection]], pid: int) -> None:
    while free:
        _, each = free.pop()
        if os.getpid() == pid:
            each.close()
        else:
            each.forget()


def open_connections(
    endpoint: Endpoint,
    access: DirectAccess,
    pool: ConnectionPool,
    server_instance: str,
    deadline: float,
) -> list[DirectConnection]:
    """Open the connections of a call, from the pool as far as possible.

    Args:
        endpoint: The server that the client has called.
        access: The server's answer.
        pool: Has free connections.
        server_instance: The server process that has answered.
        deadline: When all must be open; `time.monotonic`.

    Raises:
        CannotOpenError: They cannot all be opened. None is open then.
    """
    _check(endpoint, access)
    count, token = access.connections, access.token
    made: list[DirectConnection] = []
    try:
        while len(made) < count and (free := pool.take(server_instance)) is not None:
            made.append(free)
            free.attach(len(made) - 1, token)
        if len(made) < count:
            targets = _targets(endpoint, access.addresses, deadline)
            tls = _tls(endpoint)
            seats = [
                Attach(direction, number, token)
                for number in range(len(made), count)
                for direction in (Direction.UP, Direction.DOWN)
            ]
            sockets = _together(
                [_attached(targets, seat, tls, deadline) for seat in seats]
            )
            made += [
                DirectConnection(up, down, confirmed=True)
                for up, down in zip(sockets[::2], sockets[1::2], strict=True)
            ]
    except BaseException as error:
        for each in made:
            each.close()
        if isinstance(error, OSError):
            raise CannotOpenError(_cause(error)) from error
        raise
    return made


def _check(endpoint: Endpoint, access: DirectAccess) -> None:
    if access.tls != (endpoint.tls is not None):
        offered, called = ("TLS", "plaintext") if access.tls else ("plaintext", "TLS")
        raise CannotOpenError(f"the server offers {offered} for a call with {called}")
    if len(access.token) != TOKEN_BYTES:
        raise CannotOpenError(f"the server's token has {len(access.token)} bytes")
    if not 1 <= access.connections <= _MOST_OPENED:
        raise CannotOpenError(f"the server expects {access.connections} connections")


@dataclass(frozen=True)
class _Target:
    """Where to connect to."""

    text: str
    family: int
    sockaddr: Any


def _targets(
    endpoint: Endpoint, addresses: Iterable[str], deadline: float
) -> list[_Target]:
    """Return all places where the server may listen, the best first.

    Raises:
        CannotOpenError: There is none.
    """
    found: list[_Target] = []
    causes: list[str] = []
    for address in addresses:
        try:
            each = _resolved(endpoint, address, deadline)
        except (OSError, ValueError) as error:
            causes.append(f"{address}: {_cause(error)}")
            continue
        # A plaintext call to this host may be the entrance of a tunnel to another one.
        # Past the tunnel, others could read the elements.
        allowed = [
            target
            for target in each
            if endpoint.tls is not None or not endpoint.private or _is_loopback(target)
        ]
        if not allowed:
            causes.append(
                f"{address} is not on this host, as {endpoint} is, and has no TLS"
            )
        found += allowed
    if not found:
        raise CannotOpenError("; ".join(causes) or "the server names no address")
    return found


def _resolved(endpoint: Endpoint, address: str, deadline: float) -> list[_Target]:
    given, _, number = address.rpartition(":")
    host, port = given.strip("[]") or endpoint.host, int(number)
    if not host or not 0 < port < 1 << 16:
        raise ValueError("expected HOST:PORT")

    def look_up(flags: int) -> list[_Target]:
        found = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP, flags=flags
        )
        shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        return [_Target(shown, family, place) for family, *_, place in found]

    try:
        return look_up(socket.AI_NUMERICHOST)
    except socket.gaierror:
        # A name: asking for its addresses has timeouts of its own, longer than ours.
        return _within(lambda: look_up(0), deadline)


def _within(work: Callable[[], R], deadline: float) -> R:
    """Return the result of `work`, which may go on in a thread of its own."""
    done: queue.SimpleQueue[tuple[R | None, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put((work(), None))
        except Exception as error:  # noqa: BLE001 - raised by the caller's thread
            done.put((None, error))

    threading.Thread(target=run, name="gradwire-look-up", daemon=True).start()
    try:
        result, error = done.get(timeout=max(deadline - time.monotonic(), 0.0))
    except queue.Empty:
        raise TimeoutError("its name was not looked up in time") from None
    if error is not None:
        try:
            raise error
        finally:
            del error  # it refers to this frame
    return result  # type: ignore[return-value]


def _is_loopback(target: _Target) -> bool:
    return ip_address(target.sockaddr[0].partition("%")[0]).is_loopback


@dataclass(frozen=True)
class _Tls:
    context: ssl.SSLContext
    name: str


def _tls(endpoint: Endpoint) -> _Tls | None:
    context = endpoint.ssl_context()
    return None if context is None else _Tls(context, endpoint.server_name)


# Connecting, the handshake of TLS and Attach run for all sockets of a call together in
# the caller's thread: each is a generator that yields what it waits for.

_Wait: TypeAlias = tuple[socket.socket, int, float]
"""A socket, the event of `selectors` that it waits for, and the deadline."""

_Opening: TypeAlias = Generator[_Wait, None, DirectSocket]


def _attached(
    targets: Sequence[_Target], seat: Attach, tls: _Tls | None, deadline: float
) -> _Opening:
    """Connect to the first target that answers, and attach."""
    causes: list[str] = []
    for index, target in enumerate(targets):
        # A target that does not answer must not take the time of the others.
        now = time.monotonic()
        until = now + (deadline - now) / (len(targets) - index)
        try:
            return (yield from _attached_at(target, seat, tls, until))
        except OSError as error:
            causes.append(f"{target.text}: {_cause(error)}")
    raise CannotOpenError("; ".join(dict.fromkeys(causes)))


def _attached_at(
    target: _Target, seat: Attach, tls: _Tls | None, until: float
) -> _Opening:
    sock = socket.socket(target.family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        tune(sock)
        yield from _connected(sock, target, until)
        if tls is not None:
            sock = secured = tls.context.wrap_socket(
                sock, do_handshake_on_connect=False, server_hostname=tls.name
            )
            yield from _until_ready(secured, secured.do_handshake, until)
        yield from _answered(sock, seat.encode(), until)
        made = DirectSocket(sock)
        made.set_blocking()
    except BaseException:
        sock.close()
        raise
    weakref.finalize(made, _close_dropped, sock, os.getpid()).atexit = False
    return made


def _connected(
    sock: socket.socket, target: _Target, until: float
) -> Generator[_Wait, None, None]:
    code = sock.connect_ex(target.sockaddr)
    if code == errno.EINPROGRESS:
        yield sock, selectors.EVENT_WRITE, until
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        raise OSError(code, os.strerror(code))


def _answered(
    sock: socket.socket, attach: bytes, until: float
) -> Generator[_Wait, None, None]:
    # A socket that has sent nothing yet has room for it.
    sock.sendall(attach)
    answer = b""
    while len(answer) < ATTACHED_BYTES:
        receive = partial(sock.recv, ATTACHED_BYTES - len(answer))
        more = yield from _until_ready(sock, receive, until)
        if not more:
            raise ConnectionResetError("the server refuses the connection")
        answer += more
    if answer != ATTACHED:
        raise OSError("what listens there is no gradwire server of this version")


def _until_ready(
    sock: socket.socket, work: Callable[[], R], until: float
) -> Generator[_Wait, None, R]:
    """Return the result of `work` once the socket has what it needs."""
    while True:
        try:
            return work()
        except (BlockingIOError, ssl.SSLWantReadError):
            event = selectors.EVENT_READ
        except ssl.SSLWantWriteError:
            event = selectors.EVENT_WRITE
        yield sock, event, until


def _together(openings: Sequence[_Opening]) -> list[DirectSocket]:
    """Return the sockets of all openings, or close them if one fails."""
    made: dict[int, DirectSocket] = {}
    done = False
    try:
        with selectors.DefaultSelector() as selector:
            untils: dict[int, float] = {}

            def advance(index: int, error: BaseException | None = None) -> None:
                opening = openings[index]
                try:
                    wait = opening.throw(error) if error else next(opening)
                except StopIteration as ended:
                    made[index] = ended.value
                    return
                sock, event, untils[index] = wait
                selector.register(sock, event, index)

            for index in range(len(openings)):
                advance(index)
            while len(made) < len(openings):
                waiting = list(selector.get_map().values())
                first = min(untils[key.data] for key in waiting)
                selected = selector.select(max(first - time.monotonic(), 0.0))
                ready = {key.data for key, _ in selected}
                now = time.monotonic()
                for key in waiting:
                    late = now >= untils[key.data]
                    if late or key.data in ready:
                        selector.unregister(key.fileobj)
                        in_time = key.data in ready
                        advance(
                            key.data, None if in_time else TimeoutError("no answer")
                        )
        done = True
        return [made[index] for index in range(len(openings))]
    finally:
        if not done:
            for opening in openings:
                opening.close()
            for each in made.values():
                each.shutdown()
                each.close()


def _close_dropped(sock: socket.socket, pid: int) -> None:
    """Close the socket of a connection that was dropped without `close`."""
    if os.getpid() == pid and sock.fileno() != -1:
        DirectSocket(sock).shutdown()
    sock.close()


def _cause(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the server's certificate is not trusted: {error.verify_message}"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
