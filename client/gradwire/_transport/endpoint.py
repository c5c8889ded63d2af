"""A server's address, and the gRPC channels to it."""

from __future__ import annotations

import ssl
from dataclasses import replace
from typing import Any, TypeVar, cast

import grpc
import grpc.aio

from gradwire._api.errors import InputError
from gradwire._api.options import MetadataPairs
from gradwire._transport.address import (
    Addresses,
    channel_options,
    grpc_target,
    host_and_port,
    is_local,
)
from gradwire._transport.bearer_token import HEADER, Authorized, Token, TokenLike
from gradwire._transport.tls import Tls, parse_tls

Method = TypeVar("Method")


class Endpoint:
    """The address of a client's server, with TLS and token.

    Args:
        address: ``HOST:PORT`` or ``unix:PATH``.
        tls: As for `connect`.
        token: As for `connect`.

    Raises:
        InputError: The address or a field of `tls` is invalid, or the token would be
            sent to another host in plaintext.

    Attributes:
        address: The address as given.
        host: The host, without brackets; None for a unix socket.
        tls: The TLS settings; None for plaintext.
    """

    def __init__(
        self,
        address: str,
        tls: Tls | bool | None = None,
        token: TokenLike | None = None,
    ) -> None:
        self._target = grpc_target(address)
        self.host = None if address.startswith("unix:") else host_and_port(address)[0]
        self._credentials = parse_tls(tls, address)
        self.address = address
        self.tls = None if self._credentials is None else self._credentials.tls
        self._token = None if token is None else Token(token)
        if token is not None and not self.private:
            raise InputError(
                f"the token would be sent to {address} in plaintext, where others"
                " could read it: set tls, or use a tunnel from an address of this"
                " host (127.0.0.1, [::1], localhost or unix:PATH)"
            )

    def __str__(self) -> str:
        return self.address

    @property
    def private(self) -> bool:
        """Whether others cannot read what is sent.

        That is so with TLS, and for addresses of this host. Secrets such as tokens must
        not be sent otherwise.
        """
        return self.tls is not None or is_local(self.address)

    def require_private(self, metadata: MetadataPairs) -> None:
        """Check that metadata has no secret that others could read.

        Raises:
            InputError: It has one.
        """
        if any(key == HEADER for key, _ in metadata) and not self.private:
            raise InputError(
                f"metadata has {HEADER}, which would be sent to {self.address} in"
                " plaintext, where others could read it: set tls"
            )

    def authorized(self, method: Method) -> Method:
        """Return a method that is called with the token, if there is one."""
        if self._token is None:
            return method
        return cast("Method", Authorized(method, self._token))

    def channel(self) -> grpc.Channel:
        """Create a synchronous channel."""
        if self._credentials is None:
            return grpc.insecure_channel(self._target, self._options())
        credentials = self._credentials.of_channel()
        return grpc.secure_channel(self._target, credentials, self._options())

    def aio_channel(self) -> grpc.aio.Channel:
        """Create an asynchronous channel."""
        if self._credentials is None:
            return grpc.aio.insecure_channel(self._target, self._options())
        credentials = self._credentials.of_channel()
        return grpc.aio.secure_channel(self._target, credentials, self._options())

    def ssl_context(self) -> ssl.SSLContext | None:
        """Return the settings of TLS beside the channel; None for plaintext.

        They are the channel's. The server's name is to be `server_name`.
        """
        return None if self._credentials is None else self._credentials.ssl_context()

    @property
    def server_name(self) -> str:
        """The name in the server's certificate; empty for a unix socket."""
        if self.tls is not None and self.tls.server_name is not None:
            return self.tls.server_name
        # A certificate has an IPv6 address without its scope.
        return (self.host or "").partition("%")[0]

    def _options(self) -> tuple[tuple[str, Any], ...]:
        own = () if self._credentials is None else self._credentials.options()
        return (*channel_options(self.address), *own)


class Endpoints:
    """The addresses of a client's servers, if there are several.

    The arguments are those of `Endpoint`. A DNS name is checked like the address of one
    server, before its addresses are known.
    """

    def __init__(
        self,
        addresses: Addresses,
        tls: Tls | bool | None = None,
        token: TokenLike | None = None,
    ) -> None:
        self._text = addresses.text
        self._tls = tls
        self._all = [
            Endpoint(each, tls, token) for each in (*addresses.known, *addresses.names)
        ]

    def __str__(self) -> str:
        return self._text

    def require_private(self, metadata: MetadataPairs) -> None:
        """Check that metadata has no secret that others could read.

        Raises:
            InputError: It has one.
        """
        for endpoint in self._all:
            endpoint.require_private(metadata)

    def tls_of(self, name: str | None) -> Tls | bool | None:
        """Return the TLS settings for an address of a DNS name.

        Certificates are issued for the name, not for its current addresses.
        """
        if name is None or not self._tls:
            return self._tls
        tls = self._tls if isinstance(self._tls, Tls) else Tls()
        return replace(tls, server_name=tls.server_name or host_and_port(name)[0])
