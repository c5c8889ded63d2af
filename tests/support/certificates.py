"""Certificates for tests: good ones, and such as must be refused.

authority = Authority()
server = authority.issue("localhost", "127.0.0.1")
server.write(tmp_path, "server")          # server.pem and server-key.pem
"""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_NOW = datetime.datetime.now(datetime.UTC)
_DAY = datetime.timedelta(days=1)


def pem_of_key(key: ec.EllipticCurvePrivateKey, password: bytes | None = None) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(password)
        if password
        else serialization.NoEncryption(),
    )


@dataclass(frozen=True)
class Identity:
    """A certificate and its private key, in PEM form."""

    cert: bytes
    private: ec.EllipticCurvePrivateKey

    @property
    def key(self) -> bytes:
        return pem_of_key(self.private)

    def write(self, directory: Path, name: str) -> tuple[str, str]:
        """Write both, or replace them; their paths."""
        cert, key = directory / f"{name}.pem", directory / f"{name}-key.pem"
        cert.write_bytes(self.cert)
        key.write_bytes(self.key)
        return str(cert), str(key)


class Authority:
    """One that signs whatever a test asks for."""

    def __init__(self, name: str = "an authority") -> None:
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.cert = self._signed(self._name, self._key, _NOW + _DAY, ca=True)

    def issue(
        self, *hosts: str, name: str = "somebody", expired: bool = False
    ) -> Identity:
        """A certificate for these hosts (none, for a client), and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        end = _NOW - _DAY if expired else _NOW + _DAY
        return Identity(self._signed(subject, key, end, hosts=hosts), key)

    def write(self, directory: Path, name: str = "ca") -> str:
        path = directory / f"{name}.pem"
        path.write_bytes(self.cert)
        return str(path)

    def _signed(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        end: datetime.datetime,
        *,
        hosts: tuple[str, ...] = (),
        ca: bool = False,
    ) -> bytes:
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(_NOW - 7 * _DAY)
            .not_valid_after(end)
            .add_extension(
                x509.BasicConstraints(ca=ca, path_length=None), critical=True
            )
        )
        if hosts:
            names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
            builder = builder.add_extension(names, critical=False)
        signed = builder.sign(self._key, hashes.SHA256())
        return signed.public_bytes(serialization.Encoding.PEM)


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
