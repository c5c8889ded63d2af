"""A server's address, and the channels that are made to it."""

from __future__ import annotations

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
    """Where a client's calls go, and whether TLS protects them.

    Args:
        address: ``HOST:PORT`` or ``unix:PATH``.
        tls: As for `connect`.
        token: As for `connect`.

    Raises:
        InputError: The address or a field of `tls` cannot be, or the token
            would go to another host in plaintext.

    Attributes:
        address: As it was given.
        tls: What is wanted of TLS; None where everything goes in plaintext.
    """

    def __init__(
        self,
        address: str,
        tls: Tls | bool | None = None,
        token: TokenLike | None = None,
    ) -> None:
        self._target = grpc_target(address)
        self._credentials = parse_tls(tls, address)
        self.address = address
        self.tls = None if self._credentials is None else self._credentials.tls
        self._token = None if token is None else Token(token)
        if token is not None and not self.private:
            raise InputError(
                f"the token would go to {address} in plaintext, and everybody on the"
                " way could use it: give tls, or an address of this host (127.0.0.1,"
                " [::1], localhost or unix:PATH) where a tunnel begins"
            )

    def __str__(self) -> str:
        return self.address

    @property
    def private(self) -> bool:
        """Whether nobody on the way can read what is sent.

        It goes over TLS, or never leaves this host. What shall stay secret, a
        token for example, may be sent on no other condition.
        """
        return self.tls is not None or is_local(self.address)

    def require_private(self, metadata: MetadataPairs) -> None:
        """Check that metadata holds no secret that others could read.

        Raises:
            InputError: It does.
        """
        if any(key == HEADER for key, _ in metadata) and not self.private:
            raise InputError(
                f"metadata holds {HEADER}, which would go to {self.address} in"
                " plaintext: give tls, or everybody on the way can read it"
            )

    def authorized(self, method: Method) -> Method:
        """A method of the service, called with the token, if there is one."""
        if self._token is None:
            return method
        return cast("Method", Authorized(method, self._token))

    def channel(self) -> grpc.Channel:
        """A channel for programs that wait."""
        if self._credentials is None:
            return grpc.insecure_channel(self._target, self._options())
        credentials = self._credentials.of_channel()
        return grpc.secure_channel(self._target, credentials, self._options())

    def aio_channel(self) -> grpc.aio.Channel:
        """A channel for programs with an event loop."""
        if self._credentials is None:
            return grpc.aio.insecure_channel(self._target, self._options())
        credentials = self._credentials.of_channel()
        return grpc.aio.secure_channel(self._target, credentials, self._options())

    def _options(self) -> tuple[tuple[str, Any], ...]:
        own = () if self._credentials is None else self._credentials.options()
        return (*channel_options(self.address), *own)


class Endpoints:
    """Where the calls of a client of several servers go.

    The arguments are those of `Endpoint`. Of names whose addresses are to be
    looked up, what can be is checked as if they were one server's.
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
        """Check that metadata holds no secret that others could read.

        Raises:
            InputError: It does.
        """
        for endpoint in self._all:
            endpoint.require_private(metadata)

    def tls_of(self, name: str | None) -> Tls | bool | None:
        """What is wanted of TLS at one of the addresses that a name has.

        Certificates are for names, and not for what they stand for just now.
        """
        if name is None or not self._tls:
            return self._tls
        tls = self._tls if isinstance(self._tls, Tls) else Tls()
        return replace(tls, server_name=tls.server_name or host_and_port(name)[0])
