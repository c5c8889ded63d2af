"""Checks of PEM certificates and keys before gRPC uses them.

gRPC accepts any bytes as a certificate. Errors appear only when a handshake fails,
without the name of the file.
"""

from __future__ import annotations

import codecs
import os
import ssl
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class PemError(ValueError):
    """Invalid PEM data; the text describes the problem."""


def without_mark(pem: bytes) -> bytes:
    """Drop the byte-order mark that editors on Windows put before UTF-8 text.

    Raises:
        PemError: The text is UTF-16, which no TLS library reads.
    """
    if pem.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise PemError("is UTF-16 text: save it as ASCII or UTF-8")
    return pem.removeprefix(codecs.BOM_UTF8)


def check_certificates(pem: bytes) -> None:
    """Check that `pem` holds only valid certificates, and at least one.

    Raises:
        PemError: There is no certificate, or one is damaged.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cadata=pem.decode("ascii"))
    except (ssl.SSLError, ValueError):  # includes UnicodeDecodeError
        raise PemError("holds no certificate in PEM form, or a damaged one") from None


def check_key(certificates: bytes, key: bytes) -> None:
    """Check that `key` is the private key of the first certificate.

    Raises:
        PemError: The key is missing, encrypted, too short or for another certificate.
    """
    asked: list[None] = []

    def no_password() -> str:
        asked.append(None)
        return ""

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        _load_identity(context, certificates, key, no_password)
    except ssl.SSLError as error:
        if asked:
            text = "is encrypted with a password: a key without one is needed"
        elif error.reason == "KEY_VALUES_MISMATCH":
            text = "is not the key of the certificate"
        elif error.reason == "EE_KEY_TOO_SMALL":
            text = "is too short to be safe"
        else:
            text = "holds no private key in PEM form, or a damaged one"
        raise PemError(text) from None
    except OSError:  # without /proc, leave the check to gRPC
        return


def server_context(
    certificates: bytes, key: bytes, authorities: bytes | None = None
) -> ssl.SSLContext:
    """Return what a server without gRPC needs for TLS 1.2 and 1.3.

    Args:
        certificates: The server's certificate and its chain, checked.
        key: Its private key, checked.
        authorities: Those that sign clients' certificates, checked; None: clients
            need no certificate.

    Raises:
        OSError: There is nowhere to put the key for a moment, or it cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # A renegotiation would sign where data is expected.
    context.options |= ssl.OP_NO_RENEGOTIATION
    if authorities is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=authorities.decode("ascii"))
    _load_identity(context, certificates, key)
    return context


def _load_identity(
    context: ssl.SSLContext,
    certificates: bytes,
    key: bytes,
    password: Callable[[], str] | None = None,
) -> None:
    # OpenSSL reads certificate and key only from files. The key must not be in a file
    # that others can read.
    with _as_file(certificates) as first, _as_file(key) as second:
        context.load_cert_chain(first, second, password=password)


@contextmanager
def _as_file(content: bytes) -> Iterator[str]:
    """Yield a path to these bytes, in memory of this process only if possible."""
    if not hasattr(os, "memfd_create"):  # not Linux
        with tempfile.NamedTemporaryFile() as private:  # mode 0600
            private.write(content)
            private.flush()
            yield private.name
        return
    descriptor = os.memfd_create("pem", os.MFD_CLOEXEC)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
