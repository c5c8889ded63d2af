"""Tokens, which only the server may see."""

from __future__ import annotations

import pytest

import gradwire
from gradwire._api.options import parse_options
from gradwire._transport.bearer_token import Token
from gradwire._transport.endpoint import Endpoint

SECRET = "gw_very-secret"


@pytest.mark.parametrize("kind", [gradwire.Client, gradwire.AsyncClient])
@pytest.mark.parametrize(
    "address",
    ["gpu-node:50051", "127.evil.test:1", "localhost.evil.test:1", "10.0.0.1:50051"],
)
def test_a_token_is_not_sent_to_another_host_in_plaintext(kind, address):
    with pytest.raises(gradwire.InputError) as refused:
        kind(address, token=SECRET)
    assert "set tls, or use a tunnel" in str(refused.value)
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    "address", ["127.0.0.1:1", "[::1]:1", "localhost:1", "unix:/run/gradwire"]
)
def test_on_this_host_and_over_tls_it_is(address):
    Endpoint(address, token=SECRET)
    Endpoint("gpu-node:50051", True, SECRET)


@pytest.mark.parametrize(
    ("token", "says"),
    [
        ("", "token is not a bearer token"),
        (f"{SECRET}\n", "without spaces and line breaks"),
        (f"Bearer {SECRET}", "without spaces and line breaks"),
        (f"{SECRET}é", "token is not a bearer token"),
        (
            SECRET.encode(),
            "token is a bytes: expected a string, or a function that returns one",
        ),
        (7, "token is a int"),
    ],
)
def test_what_is_no_token_is_refused_and_not_repeated(token, says):
    with pytest.raises(gradwire.InputError) as refused:
        gradwire.Client("127.0.0.1:1", token=token)
    assert says in str(refused.value)
    assert SECRET not in str(refused.value)


def test_what_returns_a_token_is_asked_at_each_call():
    tokens = iter(["one", "two"])
    token = Token(lambda: next(tokens))
    metadata = (("traceparent", "00-x"),)
    sent = [token.added_to(metadata) for _ in range(2)]
    assert sent == [
        (*metadata, ("authorization", "Bearer one")),
        (*metadata, ("authorization", "Bearer two")),
    ]
    with pytest.raises(StopIteration):
        token.added_to(())


@pytest.mark.parametrize("returned", [None, SECRET.encode(), f"{SECRET} ", ""])
def test_what_returns_no_token_is_said_and_not_repeated(returned):
    with pytest.raises(
        gradwire.InputError, match=r"what token\(\) returned"
    ) as refused:
        Token(lambda: returned).added_to(())
    assert SECRET not in str(refused.value)


def test_two_credentials_are_one_too_many():
    with pytest.raises(gradwire.InputError, match="expected only one of them"):
        Token(SECRET).added_to((("authorization", "Basic x"),))


def test_no_repr_shows_a_secret():
    metadata = {"authorization": f"Bearer {SECRET}"}
    options = parse_options(results="y", metadata=metadata)
    client = gradwire.Client("127.0.0.1:1", token=SECRET)
    shown = [client, client._engine._endpoint, client._engine._endpoint._token, options]
    assert SECRET not in repr(shown)
    with pytest.raises(gradwire.InputError) as refused:
        parse_options(results="y", metadata={"authorization": f"{SECRET}\n"})
    assert SECRET not in str(refused.value)
