"""What an operator says of who may call, and what callers say of themselves."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

from gradwire_server.auth.errors import RefusedError
from gradwire_server.auth.jwts import Expected, parse_keys
from gradwire_server.auth.tokens import parse_tokens
from tests.thorough.fuzz.parsers import Check

EXPECTED = Expected(audience="a", issuer="i", claim="sub")
# Of pairs whose other halves nobody has.
PUBLIC_KEYS = {
    "ed": {
        "kty": "OKP",
        "kid": "ed",
        "crv": "Ed25519",
        "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo",
    },
    "ec": {
        "kty": "EC",
        "kid": "ec",
        "crv": "P-256",
        "x": "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU",
        "y": "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0",
    },
    "rsa": {"kty": "RSA", "kid": "rsa", "alg": "RS256", "n": "x" * 342, "e": "AQAB"},
}


@contextlib.contextmanager
def token_files() -> Iterator[Check]:
    """Files of hashed tokens."""

    def check(data: bytes) -> None:
        try:
            tokens = parse_tokens(data)
        except ValueError as refused:
            assert str(refused)  # noqa: PT017
        else:
            assert all(entry.tenant and len(entry.sha256) == 64 for entry in tokens)

    yield check


@contextlib.contextmanager
def key_files() -> Iterator[Check]:
    """JSON Web Key Sets."""

    def check(data: bytes) -> None:
        try:
            parse_keys(data, EXPECTED)
        except ValueError as refused:
            assert str(refused)  # noqa: PT017

    yield check


@contextlib.contextmanager
def jwts() -> Iterator[Check]:
    """Tokens that callers send: nobody here has the key that would make one good."""
    document = json.dumps({"keys": list(PUBLIC_KEYS.values())})
    keys = parse_keys(document.encode(), EXPECTED)

    def check(data: bytes) -> None:
        token = data.decode("latin-1")
        try:
            tenant = keys.tenant_of(token)
        except RefusedError:
            return
        assert tenant is None

    yield check
