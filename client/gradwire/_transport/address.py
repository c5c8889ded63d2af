"""Server addresses, and the options of gRPC channels."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from typing import Any

from gradwire._api.errors import InputError
from gradwire_protocol import limits, socket_path
from gradwire_protocol.version import VERSION

_ALL_OF = "dns:///"
"""Prefix of a DNS name that stands for several servers."""

_NO_HOST = re.compile(r"[#?\s]|%(?!.*\])")
"""Signs that no host has. gRPC would cut the address at the first two, and connect to
port 443 of what is before them. A percent sign is only in the scope of an IPv6 address,
``[fe80::1%eth0]``."""

_MAX_BACKOFF_MS = 500
"""Longest time between two connection attempts. Until the next attempt, every call
fails with the last attempt's error, even if the server is back."""

_MIN_RESOLUTION_MS = 1000
"""Shortest time between two look-ups of a name, which a broken connection causes.
gRPC's default is 30 s: a server that comes back with another address, as a container
does that was started anew, would not be found for so long."""


def grpc_target(address: str) -> str:
    """Return gRPC's target for an address.

    Args:
        address: ``HOST:PORT`` (an IPv6 host in brackets) or ``unix:PATH``.

    Raises:
        InputError: The address is neither; the message says what is expected.
    """
    if not isinstance(address, str):
        raise InputError(
            f"the address is a {type(address).__name__}: expected a string,"
            " HOST:PORT or unix:PATH"
        )
    scheme, _, path = address.partition(":")
    if scheme == "unix":
        if not path:
            raise InputError(f"the address {address!r} has no path: expected unix:PATH")
        size = len(path.encode())
        if size > socket_path.MAX_BYTES:
            raise InputError(
                f"the socket path of {address!r} has {size} bytes: expected at most"
                f" {socket_path.MAX_BYTES}"
            )
        if socket_path.UNUSABLE in path:
            raise InputError(
                f"the socket path of {address!r} has a comma, at which gRPC would cut"
                " it: expected a path without one"
            )
        return socket_path.target(path)
    if "/" in address:
        raise InputError(
            f"the address {address!r} is a URL or a path: expected HOST:PORT or"
            " unix:PATH"
        )
    host, _, port = address.rpartition(":")
    if not host or (":" in host and not (host[0] == "[" and host[-1] == "]")):
        raise InputError(f"the address {address!r} has no port: expected HOST:PORT")
    if _NO_HOST.search(host):
        raise InputError(
            f"the address {address!r} has the host {host!r}: expected a name or an IP"
            " address"
        )
    if not port.isascii() or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InputError(
            f"the address {address!r} has the port {port!r}: expected a number"
            " from 1 to 65535"
        )
    return f"dns:///{address}"


@dataclass(frozen=True, slots=True)
class Addresses:
    """The addresses of a client's servers."""

    known: tuple[str, ...]
    """``HOST:PORT`` or ``unix:PATH``, without repetition."""

    names: tuple[str, ...]
    """``HOST:PORT`` of DNS names, each of whose addresses is a server."""

    text: str
    """All addresses as given."""

    several: bool
    """Whether there may be more than one server, now or later."""

    @property
    def first(self) -> str:
        """One of the addresses."""
        return (*self.known, *self.names)[0]


def parse_addresses(value: str | Sequence[str]) -> Addresses:
    """Return the addresses for a value of `address`.

    Args:
        value: An address, or a sequence: ``HOST:PORT``, ``unix:PATH``, or
            ``dns:///HOST:PORT`` for all addresses of a name. A sequence may have one
            address: others may join it (`Client.set_servers`).

    Raises:
        InputError: An address is invalid; the message says what is expected.
    """
    several = not isinstance(value, str) and isinstance(value, Sequence)
    each: Any = tuple(dict.fromkeys(value)) if several else (value,)
    if not each:
        raise InputError("address is empty: expected HOST:PORT or unix:PATH")
    known, names = [], []
    for address in each:
        if isinstance(address, str) and address.startswith(_ALL_OF):
            name = address.removeprefix(_ALL_OF)
            grpc_target(name)
            if name.startswith("unix:"):
                raise InputError(
                    f"{address!r} has no host: expected {_ALL_OF}HOST:PORT"
                )
            names.append(name)
        else:
            grpc_target(address)
            known.append(address)
    several = several or bool(names)
    return Addresses(tuple(known), tuple(names), ", ".join(each), several)


def host_and_port(address: str) -> tuple[str, int]:
    """Split a valid ``HOST:PORT``."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def addresses_of(port: int, found: Iterable[tuple[Any, ...]]) -> list[str]:
    """Return ``HOST:PORT`` for each address found by `socket.getaddrinfo`."""
    hosts = dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found)
    return [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host in hosts]


def is_local(address: str) -> bool:
    """Return whether an address certainly belongs to this host.

    Names other than localhost do not count, because their addresses can change.
    """
    return address.startswith("unix:") or _is_loopback(address)


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0]
    if host.lower() == "localhost":
        return True
    try:
        found = ip_address(host.strip("[]"))
    except ValueError:
        return False
    if isinstance(found, IPv6Address) and found.ipv4_mapped is not None:
        found = found.ipv4_mapped
    return found.is_loopback


def proxy_of(address: str) -> str:
    """The HTTP proxy between this process and an address, for messages to people.

    gRPC takes the first of these environment variables that is set, unless another
    one exempts the host.

    Returns:
        The variable and its value without a password; empty without a proxy.
    """
    if is_local(address):
        return ""
    host = host_and_port(address)[0]
    for variable in "no_grpc_proxy", "no_proxy":
        if exempt := os.environ.get(variable):
            names = (name.strip() for name in exempt.split(","))
            if any(name and host.endswith(name) for name in names):
                return ""
            break
    for variable in "grpc_proxy", "https_proxy", "http_proxy":
        if proxy := os.environ.get(variable):
            scheme, mark, rest = proxy.rpartition("://")
            return f"{variable}={scheme}{mark}{rest.rpartition('@')[2]}"
    return ""


def channel_options(address: str) -> tuple[tuple[str, Any], ...]:
    """Return the options of a channel to an address.

    Each client has its own connections, so that clients do not delay each other. Pings
    keep connections through middleboxes alive during long jobs. gRPC's own retries are
    off: they would buffer every message of a job, and only cover small calls.
    """
    return (
        ("grpc.primary_user_agent", f"gradwire/{VERSION}"),
        ("grpc.max_receive_message_length", limits.MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", limits.MAX_MESSAGE_BYTES),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_retries", 0),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", _MAX_BACKOFF_MS),
        ("grpc.dns_min_time_between_resolutions_ms", _MIN_RESOLUTION_MS),
        ("grpc.enable_http_proxy", 0 if _is_loopback(address) else 1),
    )
