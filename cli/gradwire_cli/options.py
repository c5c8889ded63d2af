"""Options that several commands have."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeAlias

from cyclopts import Parameter, Token

from gradwire import Tls
from gradwire_cli.errors import CommandError

DEFAULT_ADDRESS = "127.0.0.1:50051"
"""Where ``gradwire serve`` listens unless it is told otherwise."""

Address: TypeAlias = Annotated[
    str | None,
    Parameter(
        metavar="ADDRESS",
        env_var="GRADWIRE_ADDRESS",
        help="The server: HOST:PORT or unix:PATH.",
    ),
]
"""``--address`` or GRADWIRE_ADDRESS."""


def split(_: object, tokens: Sequence[Token]) -> tuple[str, ...]:
    """The values of an option that takes several, with commas or repeated."""
    values = [part.strip() for token in tokens for part in token.value.split(",")]
    return () if values == [""] else tuple(values)


Addresses: TypeAlias = Annotated[
    tuple[str, ...],
    Parameter(
        metavar="ADDRESS",
        env_var="GRADWIRE_ADDRESS",
        converter=split,
        n_tokens=1,
        negative=(),
        show_default=False,
        help="The server: HOST:PORT or unix:PATH. Several of them, or"
        " dns:///HOST:PORT for all that a name stands for, share the work.",
    ),
]
"""``--address``, maybe repeated, or GRADWIRE_ADDRESS with commas."""

FLAG = Parameter(negative=(), show_default=False)
"""An option that is there or is not."""

Seconds: TypeAlias = Annotated[float, Parameter(metavar="SECONDS")]
"""A time."""


def _tls_file(variable: str) -> Parameter:
    return Parameter(metavar="FILE", env_var=variable)


@dataclass(frozen=True)
class Security:
    """How the server at ``--address`` proves who it is, and how the caller does.

    The variables have names of their own: ``GRADWIRE_TLS_CERT`` is the
    certificate of a server that may run beside this command.
    """

    tls: Annotated[bool, FLAG, Parameter(env_var="GRADWIRE_CONNECT_TLS")] = False
    """Connect over TLS, to a server that an authority of the system vouches
    for. Each of the four below implies it."""

    tls_ca: Annotated[Path | None, _tls_file("GRADWIRE_CONNECT_TLS_CA")] = None
    """PEM file with the authorities that may vouch for the server instead."""

    tls_cert: Annotated[Path | None, _tls_file("GRADWIRE_CONNECT_TLS_CERT")] = None
    """PEM file with a certificate to show a server that asks for one."""

    tls_key: Annotated[Path | None, _tls_file("GRADWIRE_CONNECT_TLS_KEY")] = None
    """PEM file with its private key."""

    tls_server_name: Annotated[
        str | None,
        Parameter(metavar="NAME", env_var="GRADWIRE_CONNECT_TLS_SERVER_NAME"),
    ] = None
    """The name that the server's certificate is for, where that is not the
    host in the address."""

    token_file: Annotated[
        Path | None, Parameter(metavar="FILE", env_var="GRADWIRE_TOKEN_FILE")
    ] = None
    """File with the token to send to a server that asks for one. The variable
    GRADWIRE_TOKEN may hold the token itself. No flag does: everybody on this
    host sees the arguments of every command, and shells keep them."""

    @property
    def token(self) -> str | None:
        """The token, if one is to be sent.

        Raises:
            CommandError: The file cannot be read.
        """
        if self.token_file is None:
            return os.environ.get("GRADWIRE_TOKEN", "").strip() or None
        try:
            return self.token_file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            cause = getattr(error, "strerror", None) or "it is no text"
            raise CommandError(
                f"the token file {self.token_file} cannot be read: {cause}"
            ) from None

    @property
    def wanted(self) -> Tls | None:
        """What `gradwire.connect` takes; None: in plaintext."""
        tls = Tls(self.tls_ca, self.tls_cert, self.tls_key, self.tls_server_name)
        return tls if self.tls or tls != Tls() else None


PLAINTEXT = Security()

SecurityOptions: TypeAlias = Annotated[Security, Parameter(name="*")]
"""``--tls``, those that begin so, and ``--token-file``."""
