"""JSON Web Tokens (RFC 7519) of an issuer whose public keys are in a file.

PyJWT verifies them; it comes with the extra `server`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradwire_server.admission.tenancy import is_name
from gradwire_server.auth.errors import RefusedError

if TYPE_CHECKING:
    from jwt import PyJWK

ALGORITHMS = (
    *("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    *("ES256", "ES384", "ES512", "EdDSA"),
)
"""Signatures that only the issuer can make. With the others (HS256, ...) who can
verify a token can make one, and a public key taken for a shared secret lets
everybody; "none" is no signature."""

_LEEWAY_S = 10
"""By how much the issuer's clock and this one may differ."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What a token has to say."""

    audience: str
    """For whom it was issued: this server's name at the issuer."""
    issuer: str
    """By whom."""
    claim: str
    """Which of its claims names the tenant."""


class Keys:
    """An issuer's public keys.

    Args:
        keys: At least one.
        expected: What its tokens have to say.
    """

    def __init__(self, keys: list[PyJWK], expected: Expected) -> None:
        self._keys = keys
        self._expected = expected

    def tenant_of(self, token: str) -> str | None:
        """Whose a token is; None where it is no JWT.

        Raises:
            RefusedError: It is one, and not good here.
        """
        import jwt  # noqa: PLC0415 - comes with an extra

        if token.count(".") != 2:
            return None
        expected = self._expected
        try:
            key = self._key_of(jwt.get_unverified_header(token))
            claims = jwt.decode(
                token,
                key,
                algorithms=ALGORITHMS,
                audience=expected.audience,
                issuer=expected.issuer,
                leeway=_LEEWAY_S,
                options={
                    "require": ["exp", "aud", "iss", expected.claim],
                    "enforce_minimum_key_length": True,
                },
            )
        except jwt.ExpiredSignatureError:
            # The signature was right: its owner may well be told.
            raise RefusedError("the token has expired") from None
        except (jwt.InvalidAudienceError, jwt.InvalidIssuerError):
            raise RefusedError("the token is for another audience or issuer") from None
        except RefusedError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a stranger's token brings
            # about in the library (nested a thousand deep: RecursionError), it
            # lets nobody in.
            raise RefusedError(why=type(error).__name__) from None
        name = claims[expected.claim]
        if not isinstance(name, str) or not is_name(name):
            raise RefusedError(f"the token's {expected.claim} names no tenant")
        return name

    def _key_of(self, header: dict[str, Any]) -> PyJWK:
        name = header.get("kid")
        if name is None and len(self._keys) == 1:
            return self._keys[0]
        for key in self._keys:
            if name is not None and key.key_id == name:
                return key
        raise RefusedError(why="no key has the token's kid")


def parse_keys(content: bytes, expected: Expected) -> Keys:
    """The keys of a JSON Web Key Set (RFC 7517) that can be used.

    Raises:
        ValueError: It is none, or has none, or the package that reads it is not
            installed; the text repeats nothing of it.
    """
    try:
        import jwt  # noqa: PLC0415 - comes with an extra
    except ImportError:
        raise ValueError(_MISSING) from None
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is no JSON: {error}") from None
    if not isinstance(document, dict) or not isinstance(document.get("keys"), list):
        raise ValueError(_NO_SET)  # noqa: TRY004 - a file is wrong, not an argument
    try:
        found = jwt.PyJWKSet.from_dict(document).keys
    except jwt.exceptions.MissingCryptographyError:
        raise ValueError(_MISSING) from None
    except jwt.PyJWTError:
        found = []
    usable = [
        key
        for key in found
        if key.algorithm_name in ALGORITHMS and key.public_key_use in {None, "sig"}
    ]
    if not usable:
        raise ValueError(f"it has no key for any of {', '.join(ALGORITHMS)}")
    return Keys(usable, expected)


_NO_SET = "it is no JSON Web Key Set: expected an object with keys"
_MISSING = (
    "JWTs need the packages PyJWT and cryptography: pip install 'gradwire[server]'"
)
