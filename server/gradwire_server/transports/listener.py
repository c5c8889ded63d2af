"""Addresses to listen on: parsing, and checks that name the cause of a failure.

gRPC reports a failed bind without its cause, and takes a unix socket away from a server
that still listens on it. So each address is tried here first.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import re
import socket
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import Any

import grpc

from gradwire_protocol import socket_path
from gradwire_server.errors import ListenError

_log = logging.getLogger("gradwire_server")

_BIND_TO_LISTEN_S = 0.1
"""Time that a starting server may take between bind(2) and listen(2), seconds. In
between, its socket refuses connections just as an abandoned one does."""

_CLOSE_S = 2.0

_ATTEMPTS = 10
"""Attempts to find a port that is free on several hosts."""

_LOOPBACK = "127.0.0.1"


def bind(
    server: grpc.aio.Server,
    address: str,
    credentials: grpc.ServerCredentials | None = None,
    *,
    insecure: bool = False,
) -> str:
    """Make `server` listen on `address`.

    Args:
        server: A server that has not been started.
        address: HOST:PORT or unix:PATH; port 0 takes a free port.
        credentials: For TLS on TCP addresses; None: plaintext.
        insecure: Whether plaintext is allowed beyond loopback.

    Returns:
        The address for clients.

    Raises:
        ListenError: The address cannot be listened on; the text gives the cause.
    """
    if address.startswith("unix:"):
        return _bind_unix(server, address)
    return _bind_tcp(server, address, credentials, insecure=insecure)


def bind_probes(server: grpc.aio.Server, address: str) -> str:
    """Make a server of probes listen on `address` in plaintext, on any interface.

    Its answers are no secrets, and those who ask speak no TLS, so plaintext needs no
    permission here.

    Args:
        server: A server that has not been started, without gradwire's own services.
        address: HOST:PORT, or PORT of loopback; port 0 takes a free port.

    Returns:
        The address for clients.

    Raises:
        ListenError: The address cannot be listened on; the text gives the cause.
    """
    host, port, found = _resolved(address, "HOST:PORT or PORT", _LOOPBACK)
    _try(address, found)
    return f"{host}:{_add(server, f'{host}:{port}')}"


def listening_sockets(address: str) -> tuple[str, list[socket.socket]]:
    """Listen on `address` in plaintext, for a server without gRPC.

    Args:
        address: HOST:PORT, or PORT of loopback; port 0 takes a free port.

    Returns:
        The address for clients, and a socket for each address of the host.

    Raises:
        ListenError: The address cannot be listened on; the text gives the cause.
    """
    host, port, found = _resolved(address, "HOST:PORT or PORT", _LOOPBACK)
    port, sockets = _open(address, port, found)
    return f"{host}:{port}", sockets


def sockets_of_one_port(
    addresses: Sequence[str],
    expected: str,
    prepare: Callable[[socket.socket], object],
    *,
    tls: bool,
    insecure: bool,
    warn: bool,
) -> tuple[int, list[socket.socket]]:
    """Listen on the same port of several hosts, for a server without gRPC.

    Args:
        addresses: HOST:PORT of each host, all with one port; port 0 takes a port that
            is free on every host.
        expected: The form of an address, for errors.
        prepare: Called with each socket before it listens.
        tls: Whether the sockets are for TLS.
        insecure: Whether plaintext is allowed beyond loopback.
        warn: Whether to warn of it then.

    Returns:
        The port, and the sockets.

    Raises:
        ListenError: An address cannot be listened on; the text gives the cause.
    """
    port, every = 0, []
    for address in addresses:
        _, port, found = _resolved(address, expected)
        if not tls and _is_exposed(found):
            _allow_plaintext(address, insecure=insecure, warn=warn)
        every += found
    return _open(" and ".join(addresses), port, _distinct(every), prepare)


async def wait_closed(address: str) -> None:
    """Wait until gRPC has removed the file of a unix socket that it has closed.

    Else it would remove that of the next server.
    """
    if not address.startswith("unix:"):
        return
    path = Path(address.removeprefix("unix:"))
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_CLOSE_S):
            while _exists(path):  # noqa: ASYNC110 - gRPC tells nobody
                await asyncio.sleep(_BIND_TO_LISTEN_S / 10)


def can_be_a_socket(path: Path) -> bool:
    """Return whether a unix socket may have this path, judged by its text."""
    size = len(os.fsencode(path.absolute()))
    return size <= socket_path.MAX_BYTES and socket_path.UNUSABLE not in str(path)


def remove(address: str) -> None:
    """Remove the socket file of an address, if it is a unix socket's."""
    if address.startswith("unix:"):
        Path(address.removeprefix("unix:")).unlink(missing_ok=True)


def _bind_tcp(
    server: grpc.aio.Server,
    address: str,
    credentials: grpc.ServerCredentials | None,
    *,
    insecure: bool,
) -> str:
    host, _, found = _resolved(address, "HOST:PORT or unix:PATH")
    if credentials is None and _is_exposed(found):
        _allow_plaintext(address, insecure=insecure)
    _try(address, found)
    return f"{host}:{_add(server, address, credentials)}"


def _resolved(
    address: str, expected: str, default_host: str = ""
) -> tuple[str, int, list[Any]]:
    """Return an address's host and port, and what the host stands for."""
    host, _, port = address.rpartition(":")
    if ":" not in address:
        host = default_host
    number = int(port) if re.fullmatch("[0-9]{1,5}", port) else -1
    if not host or not 0 <= number < 65536:
        raise ListenError(f"cannot listen on {address!r}: expected {expected}")
    try:
        found = socket.getaddrinfo(
            host.strip("[]"), number, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as error:
        raise ListenError(f"cannot listen on {address}: {_cause(error)}") from None
    except UnicodeError:
        raise ListenError(
            f"cannot listen on {address}: no host has this name"
        ) from None
    return host, number, found


def _open(
    shown: str,
    port: int,
    found: list[Any],
    prepare: Callable[[socket.socket], object] = lambda _: None,
) -> tuple[int, list[socket.socket]]:
    """Listen on one port of every host found; return it and the sockets."""
    both = len({family for family, *_ in found}) > 1
    attempts = _ATTEMPTS
    while True:
        at, sockets = port, []
        try:
            for family, kind, protocol, _, where in found:
                opened = socket.socket(family, kind, protocol)
                sockets.append(opened)
                opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if both and family == socket.AF_INET6:
                    # Else [::] would take the port of 0.0.0.0, too.
                    opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                prepare(opened)
                opened.bind((where[0], at, *where[2:]))
                opened.listen()
                at = opened.getsockname()[1]
        except OSError as error:
            for opened in sockets:
                opened.close()
            attempts -= 1
            # What is free on one host may be taken on the next.
            if port or error.errno != errno.EADDRINUSE or not attempts:
                cause = _cause(error)
                raise ListenError(f"cannot listen on {shown}: {cause}") from None
        else:
            return at, sockets


def _distinct(found: list[Any]) -> list[Any]:
    """Return each address once, and none whose port a wildcard of its family has."""
    every = {(family, where[0]): each for each in found for family, *_, where in [each]}
    wild = {family for family, host in every if _is_wildcard(host)}
    return [
        each
        for (family, host), each in every.items()
        if family not in wild or _is_wildcard(host)
    ]


def _is_wildcard(host: str) -> bool:
    return ip_address(host.partition("%")[0]).is_unspecified


def _try(address: str, found: list[Any]) -> None:
    """Listen for a moment: gRPC does not say why it cannot."""
    try:
        for family, kind, protocol, _, where in found:
            with socket.socket(family, kind, protocol) as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                trial.bind(where)
                trial.listen()
    except OSError as error:
        raise ListenError(f"cannot listen on {address}: {_cause(error)}") from None


def _bind_unix(server: grpc.aio.Server, address: str) -> str:
    path = Path(address.removeprefix("unix:")).absolute()
    if address == "unix:" or socket_path.UNUSABLE in str(path):
        raise ListenError(
            f"cannot listen on {address!r}: the path of a unix socket is expected, "
            "without a comma, at which gRPC's clients would cut it"
        )
    size = len(os.fsencode(path))
    if size > socket_path.MAX_BYTES:
        raise ListenError(
            f"cannot listen on {address}: the path has {size} bytes, and a unix "
            f"socket's may have {socket_path.MAX_BYTES}"
        )
    try:
        _check_free(path)
    except OSError as error:
        raise ListenError(f"cannot listen on {address}: {_cause(error)}") from None
    with _private_files():
        _add(server, socket_path.target(str(path)))
    return f"unix:{path}"


def _check_free(path: Path) -> None:
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no directory {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"the directory {path.parent} cannot be written")
    if not os.path.lexists(path):
        return
    if not stat.S_ISSOCK(path.lstat().st_mode):
        raise FileExistsError("the path is taken by something that is no socket")
    if _answers(path):
        raise FileExistsError("another server listens there")
    path.unlink()
    _log.info("removed a socket that a killed server left", extra={"path": str(path)})


def _exists(path: Path) -> bool:
    return os.path.lexists(path)


def _answers(path: Path) -> bool:
    """Whether a server listens on a socket, or is just starting to."""
    for wait in (0.0, _BIND_TO_LISTEN_S):
        time.sleep(wait)
        with socket.socket(socket.AF_UNIX) as trial:
            trial.settimeout(1.0)
            try:
                trial.connect(str(path))
            except ConnectionRefusedError:
                continue
            except TimeoutError:  # its backlog is full
                return True
        return True
    return False


def _is_exposed(found: list[Any]) -> bool:
    """Return whether others than this host can reach one of the addresses."""
    return not all(_is_loopback(str(each[4][0])) for each in found)


def _is_loopback(host: str) -> bool:
    found = ip_address(host.partition("%")[0])
    if isinstance(found, IPv6Address) and found.ipv4_mapped is not None:
        found = found.ipv4_mapped
    return found.is_loopback


def _allow_plaintext(address: str, *, insecure: bool, warn: bool = True) -> None:
    if not insecure:
        raise ListenError(
            f"cannot listen on {address} in plaintext, which others than this host "
            "can read: give --tls-cert and --tls-key, or --insecure to have it so "
            "all the same"
        )
    if warn:
        _log.warning(
            "plaintext: anybody on the network path can read along and use the server",
            extra={"address": address},
        )


def _add(
    server: grpc.aio.Server,
    address: str,
    credentials: grpc.ServerCredentials | None = None,
) -> int:
    try:
        if credentials is not None:
            return server.add_secure_port(address, credentials)
        return server.add_insecure_port(address)
    except RuntimeError as error:
        raise ListenError(f"cannot listen on {address}: {error}") from None


@contextmanager
def _private_files() -> Iterator[None]:
    """Create files for their owner only within this context (sockets: mode 0600)."""
    before = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(before)


def _cause(error: OSError) -> str:
    text = error.strerror or str(error)
    return text[:1].lower() + text[1:]
