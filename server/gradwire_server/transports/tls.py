"""A server's certificates: read from their files, and again when those change."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import grpc

from gradwire_protocol import pem
from gradwire_protocol.pem import PemError
from gradwire_server.errors import ListenError
from gradwire_server.files import Stamp, stamp
from gradwire_server.settings import Settings

_log = logging.getLogger("gradwire_server")


class _UnusableError(Exception):
    """A file cannot be used; the text names its setting."""


class Certificates:
    """What a server shows its clients, and how it knows them.

    gRPC asks before every handshake, in threads of its own, so a connection
    that comes after the files have changed meets what is in them then; those
    that are open go on.

    Args:
        settings: With `tls_cert` and `tls_key`, and perhaps `tls_client_ca`.

    Raises:
        ListenError: A file cannot be used; the text names its setting.

    Attributes:
        mutual: Whether clients have to show a certificate too.
    """

    def __init__(self, settings: Settings) -> None:
        self._files = {
            name: Path(path)
            for name in ("tls_cert", "tls_key", "tls_client_ca")
            if (path := getattr(settings, name)) is not None
        }
        self.mutual = "tls_client_ca" in self._files
        self._lock = threading.Lock()
        self._complained: str | None = None
        self._seen = self._stamps()
        try:
            self._latest = self._load()
        except _UnusableError as error:
            raise ListenError(f"cannot listen with TLS: {error}") from None

    def credentials(self) -> grpc.ServerCredentials:
        """They, as gRPC takes them, for one address."""
        given = self._latest

        def changed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal given
            with self._lock:
                self._look()
                if given is self._latest:
                    return None
                given = self._latest
                return given

        return grpc.dynamic_ssl_server_credentials(
            given,
            changed,  # type: ignore[arg-type]  # None is no change, to gRPC
            require_client_authentication=self.mutual,
        )

    def _look(self) -> None:
        """Take what the files hold, if that is new and good."""
        # Before they are read: what changes meanwhile is seen next time.
        now = self._stamps()
        if now == self._seen:
            return
        try:
            self._latest = self._load()
        except _UnusableError as error:
            # Tried again at the next handshake: what keeps a file from being read
            # may pass, and the file be as it was.
            if str(error) != self._complained:
                self._complained = str(error)
                _log.error(
                    "the new certificates cannot be used, so the old ones stay",
                    extra={"error": str(error)},
                )
        else:
            self._seen, self._complained = now, None
            _log.info("the certificates have changed")

    def _load(self) -> grpc.ServerCertificateConfiguration:
        cert = self._checked("tls_cert", pem.check_certificates)
        key = self._checked("tls_key", partial(pem.check_key, cert))
        authorities = None
        if self.mutual:
            authorities = self._checked("tls_client_ca", pem.check_certificates)
        return grpc.ssl_server_certificate_configuration([(key, cert)], authorities)

    def _checked(self, name: str, check: Callable[[bytes], None]) -> bytes:
        path = self._files[name]
        try:
            content = path.read_bytes()
            check(content)
        except OSError as error:
            cause = error.strerror or error
            raise _UnusableError(f"{name} ({path}) cannot be read: {cause}") from None
        except PemError as error:
            raise _UnusableError(f"{name} ({path}) {error}") from None
        return content

    def _stamps(self) -> list[Stamp]:
        """What is another one as soon as a file is."""
        return [stamp(path) for path in self._files.values()]
