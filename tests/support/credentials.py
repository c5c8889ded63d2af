"""Credentials for tests: tokens, and JWTs with the keys that prove them."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc

from gradwire_server.auth.tokens import Entry, new_token

AUDIENCE = "gradwire"
ISSUER = "https://issuer.test"


def make_tokens(*tenants: str) -> tuple[dict[str, str], str]:
    """A token for each tenant, and the file that says so."""
    made = {
        tenant: new_token(tenant, datetime.date(2026, 11, 26)) for tenant in tenants
    }
    entries: Sequence[Entry] = [entry for _, entry in made.values()]
    text = "\n".join(entry.toml() for entry in entries)
    return {tenant: token for tenant, (token, _) in made.items()}, text


def replace_file(path: Path, text: str) -> None:
    """Gives a file another content at once, as an editor or Kubernetes does."""
    fresh = path.with_name(f"{path.name}.new")
    fresh.write_text(text)
    fresh.replace(path)


class _Sent(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    def __init__(self, metadata: tuple[tuple[str, str | bytes], ...]) -> None:
        self._metadata = metadata

    def _call(self, continuation: Any, details: Any, request: Any) -> Any:
        return continuation(details._replace(metadata=self._metadata), request)

    intercept_unary_unary = intercept_unary_stream = _call
    intercept_stream_unary = intercept_stream_stream = _call


def sending(channel: grpc.Channel, *metadata: tuple[str, str | bytes]) -> grpc.Channel:
    """The channel, with this metadata on every call."""
    return grpc.intercept_channel(channel, _Sent(metadata))


def authorized(channel: grpc.Channel, token: str) -> grpc.Channel:
    """The channel, with a token on every call."""
    return sending(channel, ("authorization", f"Bearer {token}"))


class Issuer:
    """Somebody who signs JWTs, with a key of each kind."""

    def __init__(self) -> None:
        from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

        self.keys: dict[str, Any] = {
            "RS256": rsa.generate_private_key(65537, 2048),
            "ES256": ec.generate_private_key(ec.SECP256R1()),
            "EdDSA": ed25519.Ed25519PrivateKey.generate(),
        }

    def key_set(self, *algorithms: str) -> str:
        """The public keys, as a JSON Web Key Set; all if none is named."""
        from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

        kinds = {
            "RS256": RSAAlgorithm,
            "ES256": ECAlgorithm,
            "EdDSA": OKPAlgorithm,
        }
        keys = [
            json.loads(kinds[name].to_jwk(self.keys[name].public_key()))
            | {"kid": name, "alg": name, "use": "sig"}
            for name in algorithms or self.keys
        ]
        return json.dumps({"keys": keys})

    def token(self, tenant: Any, algorithm: str = "ES256", **claims: Any) -> str:
        """A JWT; claims that are None are left out."""
        import jwt

        said = {
            "sub": tenant,
            "aud": AUDIENCE,
            "iss": ISSUER,
            "exp": time.time() + 300,
        } | claims
        return jwt.encode(
            {name: value for name, value in said.items() if value is not None},
            self.keys[algorithm],
            algorithm,
            headers={"kid": algorithm},
        )
