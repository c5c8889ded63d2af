"""Certificates for tests: good ones, and such as must be refused.

authority = Authority()
server = authority.issue("localhost", "127.0.0.1")
server.write(tmp_path, "server")          # server.pem and server-key.pem
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path

import trustme
from cryptography.hazmat.primitives import serialization

_NOW = datetime.datetime.now(datetime.UTC)
_DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Identity:
    """A certificate and its private key, in PEM form."""

    cert: bytes
    key: bytes

    def locked(self, password: bytes) -> bytes:
        """The private key, encrypted."""
        return serialization.load_pem_private_key(self.key, None).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(password),
        )

    def write(self, directory: Path, name: str) -> tuple[str, str]:
        """Write both, or replace them; their paths."""
        cert, key = directory / f"{name}.pem", directory / f"{name}-key.pem"
        cert.write_bytes(self.cert)
        key.write_bytes(self.key)
        return str(cert), str(key)


class Authority:
    """One that signs whatever a test asks for."""

    def __init__(self) -> None:
        self._ca = trustme.CA()
        self.cert = self._ca.cert_pem.bytes()

    def issue(
        self,
        *hosts: str,
        name: str = "somebody",
        expired: bool = False,
        not_yet: bool = False,
    ) -> Identity:
        """A certificate for these hosts (none, for a client), and its key."""
        made = self._ca.issue_cert(
            *hosts,
            common_name=name,
            not_before=_NOW + _DAY if not_yet else _NOW - 7 * _DAY,
            not_after=_NOW - _DAY if expired else _NOW + 2 * _DAY,
        )
        (cert,) = made.cert_chain_pems
        return Identity(cert.bytes(), made.private_key_pem.bytes())

    def write(self, directory: Path, name: str = "ca") -> str:
        path = directory / f"{name}.pem"
        path.write_bytes(self.cert)
        return str(path)
