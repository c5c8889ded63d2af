"""JSON Web Tokens (RFC 7519) of an issuer, verified by public keys in a file.

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
"""Asymmetric signatures, which only the issuer can make. With symmetric ones (HS256,
...) any verifier can sign too, and if a public key is taken for the shared secret,
everybody can. "none" is no signature."""

_LEEWAY_S = 10
"""Allowed difference between the issuer's clock and this server's."""


@dataclass(frozen=True, slots=True)
class Expected:
    """Required claims of a token."""

    audience: str
    """This server's name at the issuer."""
    issuer: str
    """The issuer's name."""
    claim: str
    """Name of the claim with the tenant."""


class Keys:
    """An issuer's public keys.

    Args:
        keys: At least one key.
        expected: Required claims of the issuer's tokens.
    """

    def __init__(self, keys: list[PyJWK], expected: Expected) -> None:
        self._keys = keys
        self._expected = expected

    def tenant_of(self, token: str) -> str | None:
        """Return a token's tenant, or None if the token is no JWT.

        Raises:
            RefusedError: The JWT is not valid here.
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
        # From here on the signature is valid, so the client may know the cause.
        except jwt.ExpiredSignatureError:
            raise RefusedError("the token has expired") from None
        except jwt.ImmatureSignatureError:  # nbf, or iat: a clock is wrong
            raise RefusedError(
                "the token is not valid yet by the clock of the server"
            ) from None
        except (jwt.InvalidAudienceError, jwt.InvalidIssuerError):
            raise RefusedError("the token is for another audience or issuer") from None
        except RefusedError:
            raise
        except Exception as error:  # noqa: BLE001 - any error refuses the token, also
            # one provoked in the library (nested a thousand deep: RecursionError).
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
    """Return the usable keys of a JSON Web Key Set (RFC 7517).

    Raises:
        ValueError: The content is no key set or has no usable key, or a package to read
            it is missing; the text quotes nothing of the content.
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
