"""How a client and its server make sure of each other: `Tls`."""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TypeAlias

import grpc

from gradwire._api.errors import InputError
from gradwire_protocol import pem
from gradwire_protocol.pem import PemError

Pem: TypeAlias = "str | os.PathLike[str] | bytes"
"""A path of a file in PEM form, or what such a file holds."""

_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",  # Debian, Ubuntu, Alpine, Arch
    "/etc/pki/tls/certs/ca-bundle.crt",  # Fedora, RHEL
    "/etc/ssl/ca-bundle.pem",  # openSUSE
)
"""Where distributions keep the authorities that the system trusts."""

_GRPC_ROOTS = "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH"
"""Who sets it has told gRPC itself which authorities to trust. gRPC also has
some of its own, for systems whose bundle is not found."""

_BEGIN = "-----BEGIN "

_NAME = re.compile("[!-~]+")


@dataclass(frozen=True, slots=True, repr=False)
class Tls:
    """What a client wants of TLS, beside that it is there.

    Each of the first three is a path of a file in PEM form, or what such a
    file holds, as bytes. They are read when the client is made.

    Example:
        >>> tls = gradwire.Tls(ca="ca.pem", cert="me.pem", key="me-key.pem")
        >>> client = gradwire.connect("gpu-node:50051", tls=tls)
    """

    ca: Pem | None = None
    """Certificates of the authorities of which one must have signed the
    server's. None: those that the system trusts."""

    cert: Pem | None = None
    """The client's own certificate, and what leads from it to its authority,
    for a server that asks for one."""

    key: Pem | None = None
    """The private key of `cert`, not encrypted."""

    server_name: str | None = None
    """The name that the server's certificate must be for. None: the host in
    the address."""

    def __repr__(self) -> str:
        """Every field that is set; of PEM itself no more than that."""
        shown = (
            f"{field.name}={_shown(value)}"
            for field in fields(self)
            if (value := getattr(self, field.name)) is not None
        )
        return f"Tls({', '.join(shown)})"


class Credentials:
    """A client's TLS, read and checked.

    Args:
        tls: What the caller wants.

    Raises:
        InputError: A field cannot be; the text names it.
    """

    def __init__(self, tls: Tls) -> None:
        self.tls = tls
        if tls.server_name is not None and (
            not isinstance(tls.server_name, str) or not _NAME.fullmatch(tls.server_name)
        ):
            raise InputError(
                f"tls.server_name is {tls.server_name!r}: expected a host's name"
            )
        self._ca, self._cert, self._key = _authorities(tls), *_identity(tls)

    def of_channel(self) -> grpc.ChannelCredentials:
        """They, as gRPC takes them."""
        return grpc.ssl_channel_credentials(self._ca, self._key, self._cert)

    def options(self) -> Iterator[tuple[str, str]]:
        """What they add to a channel's options."""
        if self.tls.server_name is not None:
            yield "grpc.ssl_target_name_override", self.tls.server_name


def parse_tls(value: Tls | bool | None, address: str) -> Credentials | None:
    """What a caller wants of TLS; None where everything goes in plaintext.

    Raises:
        InputError: It cannot be; the text names the field.
    """
    if value is None or value is False:
        return None
    if value is not True and not isinstance(value, Tls):
        raise InputError(
            f"tls is a {type(value).__name__}: give True, which trusts the authorities"
            " of the system, or a gradwire.Tls"
        )
    if address.startswith("unix:"):
        raise InputError(
            f"tls is given, but {address} is a unix socket, on which servers speak"
            " plaintext: leave tls out"
        )
    return Credentials(Tls() if value is True else value)


def _authorities(tls: Tls) -> bytes | None:
    if tls.ca is not None:
        return _checked("ca", tls.ca, pem.check_certificates)
    if _GRPC_ROOTS not in os.environ:
        found = ssl.get_default_verify_paths().cafile
        for path in map(Path, (found, *_BUNDLES) if found else _BUNDLES):
            if path.is_file():
                return path.read_bytes()
    return None


def _identity(tls: Tls) -> tuple[bytes | None, bytes | None]:
    if tls.cert is None and tls.key is None:
        return None, None
    if tls.cert is None or tls.key is None:
        given, missing = ("key", "cert") if tls.cert is None else ("cert", "key")
        raise InputError(
            f"tls.{given} is given without tls.{missing}: a client's certificate and"
            " its private key go together"
        )
    cert = _checked("cert", tls.cert, pem.check_certificates)
    return cert, _checked("key", tls.key, partial(pem.check_key, cert))


def _checked(field: str, given: Pem, check: Callable[[bytes], None]) -> bytes:
    content = _read(field, given)
    try:
        content = pem.without_mark(content)
        check(content)
    except PemError as error:
        path = "" if _is_pem(given) else f" ({os.fsdecode(given)})"
        raise InputError(f"tls.{field}{path} {error}") from None
    return content


def _read(field: str, given: Pem) -> bytes:
    if isinstance(given, bytes):
        return given
    if not isinstance(given, str | os.PathLike):
        raise InputError(
            f"tls.{field} is a {type(given).__name__}: expected a path, or bytes"
        )
    if _is_pem(given):
        return str(given).encode()
    # A text of several lines is more likely a key than a path, and not shown.
    if "\n" in os.fspath(given):
        raise InputError(f"tls.{field} is a text that is neither a path nor PEM")
    try:
        return Path(given).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: it has a zero byte
        cause = getattr(error, "strerror", None) or error
        raise InputError(f"tls.{field} ({given}) cannot be read: {cause}") from None


def _is_pem(given: object) -> bool:
    return isinstance(given, bytes) or (isinstance(given, str) and _BEGIN in given)


def _shown(value: object) -> str:
    return "<PEM>" if _is_pem(value) or "\n" in str(value) else repr(value)
