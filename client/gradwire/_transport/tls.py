"""The TLS settings of a client."""

from __future__ import annotations

import contextlib
import os
import re
import ssl
import tempfile
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
"""The path of a PEM file, or its contents."""

_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",  # Debian, Ubuntu, Alpine, Arch
    "/etc/pki/tls/certs/ca-bundle.crt",  # Fedora, RHEL
    "/etc/ssl/ca-bundle.pem",  # openSUSE
)
"""Certificate bundles of Linux distributions."""

_GRPC_ROOTS = "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH"
"""gRPC's own setting of trusted authorities. If it is set, it takes precedence. gRPC
has built-in authorities for systems without a known bundle."""

_BEGIN = "-----BEGIN "

_CERTIFICATE = re.compile(
    b"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL
)

_NAME = re.compile("[!-~]+")


@dataclass(frozen=True, slots=True, repr=False)
class Tls:
    """TLS settings of a client.

    `ca`, `cert` and `key` are paths of PEM files, or their contents as bytes. Files are
    read when the client is created.

    Example:
        >>> tls = gradwire.Tls(ca="ca.pem", cert="me.pem", key="me-key.pem")
        >>> client = gradwire.connect("gpu-node:50051", tls=tls)
    """

    ca: Pem | None = None
    """Certificates of trusted authorities, one of which must have signed the server's
    certificate. None: the system's authorities."""

    cert: Pem | None = None
    """The client's certificate with its chain, for servers that require one."""

    key: Pem | None = None
    """The private key of `cert`, not encrypted."""

    server_name: str | None = None
    """The name in the server's certificate. None: the host of the address."""

    def __repr__(self) -> str:
        """Show all fields that are set, but no PEM contents."""
        shown = (
            f"{field.name}={_shown(value)}"
            for field in fields(self)
            if (value := getattr(self, field.name)) is not None
        )
        return f"Tls({', '.join(shown)})"


class Credentials:
    """TLS settings with their files read and checked.

    Args:
        tls: The settings.

    Raises:
        InputError: A field is invalid; the message names it.
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
        self._context: ssl.SSLContext | None = None

    def of_channel(self) -> grpc.ChannelCredentials:
        """Return gRPC's credentials."""
        return grpc.ssl_channel_credentials(self._ca, self._key, self._cert)

    def ssl_context(self) -> ssl.SSLContext:
        """Return the same settings for sockets of the standard library."""
        # Two threads may make one each, which does no harm.
        if self._context is None:
            self._context = _context(self._ca, self._cert, self._key)
        return self._context

    def options(self) -> Iterator[tuple[str, str]]:
        """Yield additional options of a channel."""
        if self.tls.server_name is not None:
            yield "grpc.ssl_target_name_override", self.tls.server_name


def parse_tls(value: Tls | bool | None, address: str) -> Credentials | None:
    """Return the credentials for a value of `tls`; None for plaintext.

    Raises:
        InputError: The value is invalid; the message names the field.
    """
    if value is None or value is False:
        return None
    if value is not True and not isinstance(value, Tls):
        raise InputError(
            f"tls is a {type(value).__name__}: expected True, to trust the system's"
            " authorities, or a gradwire.Tls"
        )
    if address.startswith("unix:"):
        raise InputError(
            f"tls is set, but {address} is a unix socket, which has no TLS: expected"
            " no tls"
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


def _context(ca: bytes | None, cert: bytes | None, key: bytes | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # As in gRPC, an authority need not be a root.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    if ca is None and (roots := os.environ.get(_GRPC_ROOTS)):
        ca = Path(roots).read_bytes()
    if ca is None:
        context.load_default_certs()
    else:
        # A bundle may have comments that are not ASCII between its certificates.
        authorities = b"\n".join(_CERTIFICATE.findall(ca))
        context.load_verify_locations(cadata=authorities.decode("ascii"))
    if cert is not None and key is not None:
        with _file(cert + b"\n" + key) as path:
            context.load_cert_chain(path, password=_no_password)
    return context


@contextlib.contextmanager
def _file(content: bytes) -> Iterator[str]:
    """Yield the path of a file that only this process can read, for OpenSSL."""
    if hasattr(os, "memfd_create") and Path("/proc/self/fd").is_dir():
        descriptor = os.memfd_create("gradwire-tls", os.MFD_CLOEXEC)
        try:
            path = Path(f"/proc/self/fd/{descriptor}")
            path.write_bytes(content)
            yield str(path)
        finally:
            os.close(descriptor)
    else:
        with tempfile.NamedTemporaryFile(buffering=0) as file:
            file.write(content)
            yield file.name


def _no_password() -> str:
    """OpenSSL would ask for a password at the terminal; keys are not encrypted."""
    raise ValueError("the private key is encrypted")


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
    # Several lines are more likely a key than a path, so they are not shown.
    if "\n" in os.fspath(given):
        raise InputError(f"tls.{field} is a string that is neither a path nor PEM")
    try:
        return Path(given).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: it has a zero byte
        cause = getattr(error, "strerror", None) or error
        raise InputError(f"tls.{field} ({given}) cannot be read: {cause}") from None


def _is_pem(given: object) -> bool:
    return isinstance(given, bytes) or (isinstance(given, str) and _BEGIN in given)


def _shown(value: object) -> str:
    return "<PEM>" if _is_pem(value) or "\n" in str(value) else repr(value)
