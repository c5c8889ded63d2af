"""Certificates and keys in PEM form, looked at before gRPC is given them.

gRPC takes any bytes for a certificate, and what is wrong with them shows only
when a handshake fails, without saying where they came from.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager


class PemError(ValueError):
    """These bytes are not what they should be; the text says what they lack."""


def check_certificates(pem: bytes) -> None:
    """Check that there are certificates, and all of them whole.

    Raises:
        PemError: There are none, or one is damaged.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cadata=pem.decode("ascii"))
    except (ssl.SSLError, ValueError):  # which UnicodeDecodeError is as well
        raise PemError("holds no certificate in PEM form, or a damaged one") from None


def check_key(certificates: bytes, key: bytes) -> None:
    """Check that a private key is there, and that of the first certificate.

    Raises:
        PemError: It is not, or only who knows a password can read it.
    """
    asked: list[None] = []

    def no_password() -> str:
        asked.append(None)
        return ""

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # OpenSSL reads the two from files alone, and a key does not belong in
        # one that others may find.
        with _as_file(certificates) as first, _as_file(key) as second:
            context.load_cert_chain(first, second, password=no_password)
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
    except OSError:  # without /proc nothing can be looked at, and gRPC has to do
        return


@contextmanager
def _as_file(content: bytes) -> Iterator[str]:
    """A path of these bytes, which lie in this process's memory alone."""
    descriptor = os.memfd_create("pem", os.MFD_CLOEXEC)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
