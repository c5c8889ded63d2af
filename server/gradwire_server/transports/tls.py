"""A server's certificates, reloaded when their files change."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import grpc

from gradwire_protocol import pem
from gradwire_protocol.pem import PemError
from gradwire_server.errors import ListenError
from gradwire_server.settings import Settings
from gradwire_server.transports.file_watch import (
    FileError,
    FileUnreadableError,
    WatchedFiles,
    read_file,
)


class _Loaded(NamedTuple):
    """What the files say."""

    grpc: grpc.ServerCertificateConfiguration
    context: ssl.SSLContext


class Certificates:
    """The server's certificate, and the authorities of its clients' certificates.

    gRPC asks for them before every handshake, in its own threads, and so does the
    listener of direct connections. A new connection therefore uses the files' current
    content; open connections continue.

    Args:
        settings: With `tls_cert` and `tls_key`, and optionally `tls_client_ca`.

    Raises:
        ListenError: A file cannot be used; the text names its setting.

    Attributes:
        mutual: Whether clients must show a certificate too.
    """

    def __init__(self, settings: Settings) -> None:
        self._files = {
            name: Path(path)
            for name in ("tls_cert", "tls_key", "tls_client_ca")
            if (path := getattr(settings, name)) is not None
        }
        self.mutual = "tls_client_ca" in self._files
        try:
            self._watched = WatchedFiles(
                list(self._files.values()), "the TLS certificates", self._load
            )
        except FileError as error:
            raise ListenError(f"cannot listen with TLS: {error}") from None

    def credentials(self) -> grpc.ServerCredentials:
        """Return gRPC's credentials for one address."""
        given = self._watched.value.grpc
        lock = threading.Lock()

        def changed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal given
            with lock:
                latest = self._watched.value.grpc
                if given is latest:
                    return None
                given = latest
                return given

        return grpc.dynamic_ssl_server_credentials(
            given,
            changed,  # type: ignore[arg-type]  # None is no change, to gRPC
            require_client_authentication=self.mutual,
        )

    def context(self) -> ssl.SSLContext:
        """Return the context of handshakes that begin now; the same until a change."""
        return self._watched.value.context

    def _load(self) -> _Loaded:
        cert = self._checked("tls_cert", pem.check_certificates)
        key = self._checked("tls_key", partial(pem.check_key, cert))
        authorities = None
        if self.mutual:
            authorities = self._checked("tls_client_ca", pem.check_certificates)
        try:
            context = pem.server_context(cert, key, authorities)
        except OSError as error:
            raise FileUnreadableError(f"tls_key cannot be used now: {error}") from None
        return _Loaded(
            grpc.ssl_server_certificate_configuration([(key, cert)], authorities),
            context,
        )

    def _checked(self, name: str, check: Callable[[bytes], None]) -> bytes:
        path = self._files[name]
        shown = f"{name} ({path})"
        content = read_file(path, shown)
        try:
            content = pem.without_mark(content)
            check(content)
        except PemError as error:
            raise FileError(f"{shown} {error}") from None
        return content
