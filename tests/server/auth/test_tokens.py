"""Tokens and the file that says whose they are."""

from __future__ import annotations

import datetime
import re

import pytest

from gradwire_server.admission.tenancy import Limits
from gradwire_server.auth.tokens import new_token, parse_tokens, sha256_of, without
from tests.support.credentials import make_tokens

TODAY = datetime.date(2026, 11, 26)


def test_a_token_can_be_found_by_scanners_and_never_comes_twice():
    tokens = {new_token("alice", TODAY)[0] for _ in range(100)}
    assert len(tokens) == 100
    assert all(re.fullmatch("gw_[A-Za-z0-9_-]{43}", token) for token in tokens)


def test_the_file_knows_whose_a_token_is_and_nothing_of_the_token():
    tokens, text = make_tokens("alice", 'b"o\\b', "svc:ns/trainer 7")
    known = parse_tokens(text.encode())
    for tenant, token in tokens.items():
        assert known.tenant_of(token) == tenant
        assert known.tenant_of(token[:-1]) is None
        assert known.tenant_of(sha256_of(token)) is None
        assert token not in text
        assert token[3:] not in text
    assert known.tenant_of("") is None
    assert [entry.created for entry in known] == [TODAY] * 3


def test_a_tenant_may_have_several_tokens():
    one, two = make_tokens("alice"), make_tokens("alice")
    known = parse_tokens((one[1] + two[1]).encode())
    assert {known.tenant_of(tokens["alice"]) for tokens, _ in (one, two)} == {"alice"}


def test_a_revoked_token_is_taken_out_and_all_else_stays():
    tokens, text = make_tokens("alice", "bob", "carol")
    text = f"# ours\n{text}\n# the end\n"
    bob = next(entry for entry in parse_tokens(text.encode()) if entry.tenant == "bob")
    left = without(text, bob.id)
    known = parse_tokens(left.encode())
    assert [known.tenant_of(tokens[name]) for name in tokens] == [
        "alice",
        None,
        "carol",
    ]
    assert left.startswith("# ours\n[[tokens]]")
    assert left.endswith("# the end\n")
    with pytest.raises(ValueError, match=f"no section .* for the token {bob.id}"):
        without(left, bob.id)


GOOD = f'[[tokens]]\ntenant = "a"\nsha256 = "{"0" * 64}"\n'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tokens = 3", "tokens is no list of sections"),
        ("tokens = [3]", "tokens is no list of sections"),
        ("[[tokens]", "no TOML file: .*line 1"),
        (GOOD + GOOD, "a sha256 stands there twice"),
        (GOOD.replace('"a"', '""'), "the 1. of .* has a tenant that is no name"),
        (GOOD.replace('"a"', '"ä"'), "has a tenant that is no name"),
        (GOOD.replace('"a"', f'"{"a" * 129}"'), "expected 1 to 128 printable ASCII"),
        (GOOD.replace('"a"', "1"), "has a tenant that is no name"),
        (GOOD + 'creatd = "x"', "has a key that is none of created, sha256, tenant"),
        (GOOD + 'created = "x"', "has a created that is no date"),
        (GOOD + "[token]", "the file has a key that is none of"),
    ],
)
def test_a_file_that_is_wrong_says_where(text, says):
    with pytest.raises(ValueError, match=says):
        parse_tokens(text.encode())


@pytest.mark.parametrize(
    "line", ["{0}", "{0} = 1", 'sha256 = "{0}"', 'tenant = "{0}" x', 'tenant = "{0}ä"']
)
def test_a_token_that_was_pasted_into_the_file_is_not_repeated(line):
    token, _ = new_token("alice", TODAY)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - whatever it says
        parse_tokens(f"[[tokens]]\n{line.format(token)}\n".encode())
    assert token[3:] not in str(caught.value)


def test_a_token_is_made_for_a_name_only():
    with pytest.raises(ValueError, match="the tenant is no name"):
        new_token("", TODAY)


def test_a_tenant_may_have_limits_of_its_own():
    text = (
        "[tenants.alice]\nmax-jobs = 4\n[tenants.'svc:x']\nmemory-limit = 8_000_000\n"
    )
    known = parse_tokens(text.encode())
    others = Limits(2, None, 9)
    assert known.limits_of("alice", others) == Limits(4, None, 9)
    assert known.limits_of("svc:x", others) == Limits(2, 8_000_000, 9)
    assert known.limits_of("bob", others) == others


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tenants = 3", "tenants is no table of sections"),
        ("[tenants]\nalice = 3", "tenants is no table of sections"),
        ("[tenants.alice]\nmax-job = 4", "alice. has a key that is none of keep-limit"),
        ("[tenants.alice]\nmax-jobs = 0", "max-jobs that is no whole number of at"),
        ("[tenants.alice]\nmax-jobs = true", "no whole number of at least 1"),
        ("[tenants.alice]\nmemory-limit = '2GiB'", "of at least 4194304"),
        ("[tenants.'é']\nmax-jobs = 1", "a section .* whose name is no name"),
    ],
)
def test_limits_that_are_wrong_say_where(text, says):
    with pytest.raises(ValueError, match=says):
        parse_tokens(text.encode())
