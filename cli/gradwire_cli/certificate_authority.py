"""A private certificate authority, for trials."""

from __future__ import annotations

import datetime
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_CLOCKS_DIFFER = datetime.timedelta(minutes=5)
"""How far a peer's clock may be behind and still accept the certificates."""

_LONGEST_NAME = 64
"""Maximum length of a common name in characters (X.520)."""

_HOST = re.compile(r"(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


@dataclass(frozen=True)
class Identity:
    """A certificate and its private key, each in PEM form."""

    cert: bytes
    key: bytes


class Authority:
    """Signs certificates.

    Args:
        days: For how many days, from now, the certificates are valid.
    """

    def __init__(self, days: int) -> None:
        now = datetime.datetime.now(datetime.UTC)
        self._begin, self._end = now - _CLOCKS_DIFFER, now + datetime.timedelta(days)
        self._name = _name("gradwire trial authority")
        self._key = ec.generate_private_key(ec.SECP256R1())
        usage = x509.KeyUsage(
            digital_signature=True,
            key_cert_sign=True,
            crl_sign=True,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            encipher_only=False,
            decipher_only=False,
        )
        self.identity = self._signed(
            self._name,
            self._key,
            (x509.BasicConstraints(ca=True, path_length=0), True),
            (usage, True),
        )

    def server(self, hosts: Sequence[str]) -> Identity:
        """Issue a server certificate.

        Args:
            hosts: Host names and IP addresses of the server.

        Raises:
            ValueError: A host is neither a name nor an IP address.
        """
        names = x509.SubjectAlternativeName([_host(host) for host in hosts])
        return self._issued(hosts[0], ExtendedKeyUsageOID.SERVER_AUTH, (names, False))

    def client(self, name: str) -> Identity:
        """Issue a client certificate.

        Raises:
            ValueError: The name is empty, too long or not printable.
        """
        if not 0 < len(name) <= _LONGEST_NAME:
            raise ValueError(
                f"client has {len(name)} characters: expected 1 to {_LONGEST_NAME}"
            )
        if not name.isprintable():
            raise ValueError(f"client is {name!r}: expected printable characters")
        return self._issued(name, ExtendedKeyUsageOID.CLIENT_AUTH)

    def _issued(
        self,
        name: str,
        purpose: x509.ObjectIdentifier,
        *more: tuple[x509.ExtensionType, bool],
    ) -> Identity:
        return self._signed(
            _name(name),
            ec.generate_private_key(ec.SECP256R1()),
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (x509.ExtendedKeyUsage([purpose]), False),
            *more,
        )

    def _signed(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        *extensions: tuple[x509.ExtensionType, bool],
    ) -> Identity:
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(self._begin)
            .not_valid_after(self._end)
        )
        own, signer = key.public_key(), self._key.public_key()
        for extension, critical in (
            *extensions,
            (x509.SubjectKeyIdentifier.from_public_key(own), False),
            (x509.AuthorityKeyIdentifier.from_issuer_public_key(signer), False),
        ):
            builder = builder.add_extension(extension, critical)
        return Identity(
            builder.sign(self._key, hashes.SHA256()).public_bytes(
                serialization.Encoding.PEM
            ),
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ),
        )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _host(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text.strip("[]")))
    except ValueError:
        if not _HOST.fullmatch(text):
            raise ValueError(
                f"host is {text!r}: expected a host name or IP address, without port"
            ) from None
    return x509.DNSName(text)
