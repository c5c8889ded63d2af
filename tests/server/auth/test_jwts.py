"""JWTs that an issuer of the operator's has signed, and all others."""

from __future__ import annotations

import base64
import contextlib
import json
import time

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwire_server.auth import make_auth_interceptor
from gradwire_server.auth.errors import RefusedError
from gradwire_server.auth.jwts import Expected, parse_keys
from gradwire_server.errors import CredentialsError
from gradwire_server.observability.calls import CallObserver
from gradwire_server.settings import Settings
from tests.support.credentials import AUDIENCE, ISSUER, Issuer

EXPECTED = Expected(AUDIENCE, ISSUER, "sub")


@pytest.fixture(scope="module")
def issuer():
    return Issuer()


@pytest.fixture(scope="module")
def keys(issuer):
    return parse_keys(issuer.key_set().encode(), EXPECTED)


def refusal(keys, token):
    with pytest.raises(RefusedError) as caught:
        keys.tenant_of(token)
    assert token not in caught.value.told + caught.value.why
    return caught.value


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
def test_the_issuers_tokens_name_their_tenant(issuer, keys, algorithm):
    assert keys.tenant_of(issuer.token("alice", algorithm)) == "alice"


def test_another_claim_may_name_the_tenant(issuer):
    content = issuer.key_set("EdDSA").encode()
    keys = parse_keys(content, Expected(AUDIENCE, ISSUER, "team"))
    assert keys.tenant_of(issuer.token("x", "EdDSA", team="vision")) == "vision"
    assert refusal(keys, issuer.token("x", "EdDSA")).why == "MissingRequiredClaimError"


def test_what_is_no_jwt_is_left_to_others(keys):
    assert keys.tenant_of("gw_abc") is None
    assert keys.tenant_of("a.b") is None


@pytest.mark.parametrize(
    "claims",
    [{"exp": None}, {"aud": None}, {"iss": None}, {"sub": None}, {"exp": "later"}],
)
def test_a_claim_that_is_missing_or_wrong_is_refused(issuer, keys, claims):
    refused = refusal(keys, issuer.token("alice", **claims))
    assert refused.told == "the credentials are not valid here"


def test_the_owner_of_a_token_is_told_why_it_is_not_good(issuer, keys):
    late = issuer.token("alice", exp=time.time() - 60)
    assert refusal(keys, late).told == "the token has expired"
    for claim in ("nbf", "iat"):
        early = issuer.token("alice", **{claim: time.time() + 60})
        says = "the token is not valid yet by the clock of the server"
        assert refusal(keys, early).told == says
    for claims in ({"aud": "another"}, {"iss": "https://other.test"}):
        refused = refusal(keys, issuer.token("alice", **claims))
        assert refused.told == "the token is for another audience or issuer"
    for name in ("", "ä", "a" * 129):
        refused = refusal(keys, issuer.token(name))
        assert refused.told == "the token's sub names no tenant"


def test_another_issuers_signature_is_refused(keys):
    assert refusal(keys, Issuer().token("alice")).why == "InvalidSignatureError"


def test_a_token_of_no_known_key_is_refused(issuer):
    keys = parse_keys(issuer.key_set("RS256", "ES256").encode(), EXPECTED)
    refused = refusal(keys, issuer.token("alice", "EdDSA"))
    assert refused.why == "no key has the token's kid"


def encoded(part: bytes) -> str:
    return base64.urlsafe_b64encode(part).rstrip(b"=").decode()


def unsigned(header: dict[str, str], claims: dict[str, object]) -> str:
    return (
        ".".join(encoded(json.dumps(part).encode()) for part in (header, claims)) + "."
    )


def test_a_token_that_says_how_it_is_to_be_verified_is_not_believed(issuer, keys):
    claims = {
        "sub": "alice",
        "aud": AUDIENCE,
        "iss": ISSUER,
        "exp": time.time() + 300,
    }
    # The public key, which everybody has, as a shared secret.
    public = json.loads(issuer.key_set("RS256"))["keys"][0]["n"]
    forged = [
        jwt.encode(claims, public, "HS256", headers={"kid": kid})
        for kid in ("RS256", "ES256")
    ]
    forged.append(unsigned({"alg": "none", "kid": "RS256"}, claims))
    forged.append(unsigned({"alg": "RS256", "kid": "RS256"}, claims))
    for token in forged:
        refused = refusal(keys, token)
        assert refused.told == "the credentials are not valid here"


ODD_HEADERS = (
    b"[" * 5000,
    b'{"a":' * 1500,
    b'{"alg":"ES256","kid":[1]}',
    b'{"alg":"ES256","kid":"ES256","crit":["x"]}',
)


@given(
    st.one_of(
        st.text(),
        st.from_regex(r"[A-Za-z0-9_=-]*\.[A-Za-z0-9_=-]*\.[A-Za-z0-9_=-]*"),
        st.binary().map(lambda part: f"{encoded(part)}.{encoded(part)}.e30"),
        st.sampled_from(
            [b"[" * 5000, b'{"a":' * 1500, b'{"alg":"ES256","kid":[1]}']
        ).map(lambda part: f"{encoded(part)}.e30.e30"),
    )
)
def test_whatever_a_stranger_sends_lets_nobody_in(keys, token):
    with contextlib.suppress(RefusedError):
        assert keys.tenant_of(token) is None


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "it is no JSON"),
        (b"[]", "it is no JSON Web Key Set"),
        (b'{"keys": 3}', "it is no JSON Web Key Set"),
        (b'{"keys": []}', "it has no key for any of RS256"),
        (b'{"keys": [{"kty": "oct", "k": "c2VjcmV0"}]}', "it has no key for any of"),
    ],
)
def test_a_key_set_without_a_public_key_is_refused(content, says):
    with pytest.raises(ValueError, match=says):
        parse_keys(content, EXPECTED)


def test_without_the_package_it_is_said_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "jwt", None)
    with pytest.raises(ValueError, match=r"pip install 'gradwire\[server\]'"):
        parse_keys(b"{}", EXPECTED)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"auth_jwks": "k"}, "auth_jwks needs auth_jwt_audience, auth_jwt_issuer and"),
        ({"auth_jwt_issuer": ISSUER}, "are for JWTs, and there is no auth_jwks"),
        ({"auth_certificates": True}, "auth_certificates is set without tls_client_ca"),
        ({"tenant_max_jobs": 1}, "a limit of tenants is given, and nobody is asked"),
        ({"auth_health": True}, "auth_health is given, and nobody is asked"),
    ],
)
def test_settings_that_need_others_say_which(given, says):
    with pytest.raises(CredentialsError, match=says):
        make_auth_interceptor(Settings(**given), CallObserver())
