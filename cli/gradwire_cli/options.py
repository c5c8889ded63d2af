"""Options shared by several commands."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeAlias

from cyclopts import Parameter, Token

from gradwire import Tls
from gradwire_cli.errors import CommandError, ExitStatus
from gradwire_protocol.dtypes import Dtype

DEFAULT_ADDRESS = "127.0.0.1:50051"
"""The default address of ``gradwire serve``."""

Address: TypeAlias = Annotated[
    str | None,
    Parameter(
        metavar="ADDRESS",
        env_var="GRADWIRE_ADDRESS",
        help="Server address: HOST:PORT or unix:PATH.",
    ),
]
"""``--address`` or GRADWIRE_ADDRESS."""


def split(_: object, tokens: Sequence[Token]) -> tuple[str, ...]:
    """Split an option with several values, given with commas or repeatedly."""
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
        help="Server address: HOST:PORT or unix:PATH. May be repeated, or"
        " dns:///HOST:PORT for every address of a name: the servers share the jobs.",
    ),
]
"""``--address``, repeatable, or GRADWIRE_ADDRESS with commas."""

FLAG = Parameter(negative=(), show_default=False)
"""A boolean flag without a negative form."""


def one_of(dtypes: Sequence[Dtype]) -> Parameter:
    """An option that takes the name of one of these dtypes."""
    labels = [dtype.label for dtype in dtypes]

    def parse(_: object, tokens: Sequence[Token]) -> Dtype:
        token = tokens[0]
        if token.value not in labels:
            raise CommandError(
                f"{token.keyword} is {token.value!r}: expected {' or '.join(labels)}",
                ExitStatus.USAGE,
            )
        return Dtype.named(token.value)

    return Parameter(converter=parse, n_tokens=1, metavar="|".join(labels))


def to_count(_: object, tokens: Sequence[Token]) -> int:
    """Parse a whole number; cyclopts would round 8.5 to 8."""
    token = tokens[0]
    try:
        return int(token.value)
    except ValueError:
        where = "" if token.source in {"", "cli", "env"} else f" in {token.source}"
        raise CommandError(
            f"{token.keyword}{where} is {token.value!r}: expected a whole number",
            ExitStatus.USAGE,
        ) from None


def to_seconds(_: object, tokens: Sequence[Token]) -> float:
    """Parse a duration: every one is a limit or an interval, so 0 is none."""
    token = tokens[0]
    try:
        seconds = float(token.value)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds > 0):
        raise CommandError(
            f"{token.keyword} is {token.value!r}: expected a number of seconds above 0",
            ExitStatus.USAGE,
        )
    return seconds


Seconds: TypeAlias = Annotated[
    float, Parameter(metavar="SECONDS", converter=to_seconds, n_tokens=1)
]
"""A duration in seconds, above 0."""


def _tls_file(variable: str) -> Parameter:
    return Parameter(metavar="FILE", env_var=variable)


@dataclass(frozen=True)
class Security:
    """TLS and credentials for the connection to ``--address``.

    The variables differ from the server's: ``GRADWIRE_TLS_CERT`` is the
    certificate of a server that may run in the same environment.
    """

    tls: Annotated[bool, FLAG, Parameter(env_var="GRADWIRE_CONNECT_TLS")] = False
    """Connect over TLS, and trust the system's authorities. Every other --tls
    option implies it."""

    tls_ca: Annotated[Path | None, _tls_file("GRADWIRE_CONNECT_TLS_CA")] = None
    """PEM file with the authorities to trust instead of the system's."""

    tls_cert: Annotated[Path | None, _tls_file("GRADWIRE_CONNECT_TLS_CERT")] = None
    """PEM file with the client certificate, for a server with mutual TLS."""

    tls_key: Annotated[Path | None, _tls_file("GRADWIRE_CONNECT_TLS_KEY")] = None
    """PEM file with the private key of --tls-cert."""

    tls_server_name: Annotated[
        str | None,
        Parameter(metavar="NAME", env_var="GRADWIRE_CONNECT_TLS_SERVER_NAME"),
    ] = None
    """The name in the server's certificate, if it differs from the host in the
    address."""

    token_file: Annotated[
        Path | None, Parameter(metavar="FILE", env_var="GRADWIRE_TOKEN_FILE")
    ] = None
    """File with the token, for a server with credentials. The variable
    GRADWIRE_TOKEN may hold the token itself. No flag takes the token, because
    other users see the arguments of processes, and shells save them."""

    @property
    def token(self) -> str | None:
        """The token to send; None without one.

        Raises:
            CommandError: The token file cannot be read.
        """
        if self.token_file is None:
            return os.environ.get("GRADWIRE_TOKEN", "").strip() or None
        try:
            return self.token_file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            cause = getattr(error, "strerror", None) or "it is not text"
            raise CommandError(
                f"the token file {self.token_file} cannot be read: {cause}"
            ) from None

    @property
    def wanted(self) -> Tls | None:
        """The `tls` argument of `gradwire.connect`; None for plaintext."""
        tls = Tls(self.tls_ca, self.tls_cert, self.tls_key, self.tls_server_name)
        return tls if self.tls or tls != Tls() else None


PLAINTEXT = Security()

SecurityOptions: TypeAlias = Annotated[Security, Parameter(name="*")]
"""The ``--tls`` options and ``--token-file``."""
