"""A server's certificates, reloaded when their files change."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import grpc

from gradwire_protocol import pem
from gradwire_protocol.pem import PemError
from gradwire_server.errors import ListenError
from gradwire_server.settings import Settings
from gradwire_server.transports.file_watch import (
    FileError,
    WatchedFiles,
    read_file,
)


class Certificates:
    """The server's certificate, and the authorities of its clients' certificates.

    gRPC asks for them before every handshake, in its own threads. A new connection
    therefore uses the files' current content; open connections continue.

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
        given = self._watched.value
        lock = threading.Lock()

        def changed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal given
            with lock:
                latest = self._watched.value
                if given is latest:
                    return None
                given = latest
                return given

        return grpc.dynamic_ssl_server_credentials(
            given,
            changed,  # type: ignore[arg-type]  # None is no change, to gRPC
            require_client_authentication=self.mutual,
        )

    def _load(self) -> grpc.ServerCertificateConfiguration:
        cert = self._checked("tls_cert", pem.check_certificates)
        key = self._checked("tls_key", partial(pem.check_key, cert))
        authorities = None
        if self.mutual:
            authorities = self._checked("tls_client_ca", pem.check_certificates)
        return grpc.ssl_server_certificate_configuration([(key, cert)], authorities)

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
