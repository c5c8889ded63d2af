"""A server's address, and the channels that are made to it."""

from __future__ import annotations

from typing import Any

import grpc
import grpc.aio

from gradwire._exceptions import InputError
from gradwire._options import MetadataPairs
from gradwire._target import channel_options, grpc_target, is_local
from gradwire._tls import Tls, parse_tls

_SECRET = "authorization"  # noqa: S105 - the name of it
"""Metadata whose reader could call in the sender's name."""


class Endpoint:
    """Where a client's calls go, and whether TLS protects them.

    Args:
        address: ``HOST:PORT`` or ``unix:PATH``.
        tls: As for `connect`.

    Raises:
        InputError: The address or a field of `tls` cannot be.

    Attributes:
        address: As it was given.
        tls: What is wanted of TLS; None where everything goes in plaintext.
    """

    def __init__(self, address: str, tls: Tls | bool | None = None) -> None:
        self._target = grpc_target(address)
        self._credentials = parse_tls(tls, address)
        self.address = address
        self.tls = None if self._credentials is None else self._credentials.tls

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
        if not self.private and any(key == _SECRET for key, _ in metadata):
            raise InputError(
                f"metadata holds {_SECRET}, which would go to {self.address} in"
                " plaintext: give tls, or everybody on the way can read it"
            )

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
