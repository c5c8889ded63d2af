"""What a caller may say of TLS, and what is refused before anything is sent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import gradwire
from gradwire._transport.address import is_local
from gradwire._transport.endpoint import Endpoint
from tests.support.certificates import Authority, Identity

ADDRESS = "gpu-node:50051"


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="module")
def identity(authority: Authority) -> Identity:
    return authority.issue(name="me")


@pytest.fixture(params=[gradwire.Client, gradwire.AsyncClient])
def client_of(request: pytest.FixtureRequest) -> Any:
    return request.param


def refusal(tls: Any, address: str = ADDRESS) -> str:
    with pytest.raises(gradwire.InputError) as refused:
        gradwire.Client(address, tls=tls)
    return str(refused.value)


def test_files_may_be_paths_or_their_contents(
    client_of: Any, tmp_path: Path, authority: Authority, identity: Identity
) -> None:
    ca = authority.write(tmp_path)
    cert, key = identity.write(tmp_path, "me")
    client_of(ADDRESS, tls=gradwire.Tls(ca=ca, cert=cert, key=Path(key)))
    client_of(
        ADDRESS,
        tls=gradwire.Tls(ca=authority.cert, cert=identity.cert, key=identity.key),
    )
    client_of(ADDRESS, tls=gradwire.Tls(ca=authority.cert.decode()))


@pytest.mark.parametrize("tls", [None, False])
def test_without_tls_everything_goes_in_plaintext(tls: Any) -> None:
    assert Endpoint(ADDRESS, tls).tls is None


def test_a_field_that_cannot_be_is_named_when_the_client_is_made(
    tmp_path: Path, authority: Authority, identity: Identity
) -> None:
    tls = gradwire.Tls
    other, _ = authority.issue().write(tmp_path, "other")
    garbage = tmp_path / "garbage.pem"
    garbage.write_bytes(identity.cert[:200])
    missing = tmp_path / "missing.pem"
    _, key = identity.write(tmp_path, "me")
    locked = identity.locked(b"secret")
    utf16 = identity.cert.decode().encode("utf-16")
    for given, expected in (
        (tls(ca=missing), f"tls.ca ({missing}) cannot be read: No such file or direct"),
        (tls(ca=tmp_path), f"tls.ca ({tmp_path}) cannot be read: Is a directory"),
        (tls(ca=garbage), f"tls.ca ({garbage}) holds no certificate in PEM form"),
        (tls(ca=b""), "tls.ca holds no certificate in PEM form"),
        (tls(ca=utf16), "tls.ca is UTF-16 text: save it as ASCII or UTF-8"),
        (tls(ca=7), "tls.ca is a int: expected a path, or bytes"),
        (tls(cert=other), "tls.cert is given without tls.key"),
        (tls(key=key), "tls.key is given without tls.cert"),
        (tls(cert=garbage, key=key), f"tls.cert ({garbage}) holds no certificate"),
        (tls(cert=other, key=key), f"tls.key ({key}) is not the key of the certif"),
        (tls(cert=other, key=other), f"tls.key ({other}) holds no private key in"),
        (tls(cert=other, key=locked), "tls.key is encrypted with a password"),
        (tls(ca="\0"), "cannot be read: embedded null byte"),
        (tls(server_name="gpu\0node"), "tls.server_name is 'gpu\\x00node': expected"),
        (tls(server_name=""), "tls.server_name is '': expected a host's name"),
        ("ca.pem", "tls is a str: expected True"),
    ):
        assert expected in refusal(given)


def test_a_unix_socket_is_not_asked_for_tls() -> None:
    assert "is a unix socket, which has no TLS" in refusal(
        True, "unix:/run/gradwire.sock"
    )


def test_no_key_is_ever_shown(identity: Identity) -> None:
    tls = gradwire.Tls(cert=identity.cert, key=identity.key, server_name="gpu")
    assert repr(tls) == "Tls(cert=<PEM>, key=<PEM>, server_name='gpu')"
    text = gradwire.Tls(cert="me.pem", key=identity.key.decode())
    assert repr(text) == "Tls(cert='me.pem', key=<PEM>)"
    secret = identity.key.decode().splitlines()[1]
    for key in (identity.key[30:], identity.key[30:].decode()):
        damaged = gradwire.Tls(cert=identity.cert, key=key)
        assert secret not in refusal(damaged)
        assert secret not in repr(damaged)


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("127.0.0.1:1", True),
        ("127.8.9.10:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("LocalHost:1", True),
        ("[::ffff:127.0.0.1]:1", True),
        ("[::ffff:10.0.0.1]:1", False),
        ("unix:/run/gradwire.sock", True),
        ("127.0.0.1.example.com:1", False),
        ("localhost.example.com:1", False),
        ("gpu-node:1", False),
        ("10.0.0.1:1", False),
        ("0.0.0.0:1", False),
    ],
)
def test_what_is_surely_of_this_host(address: str, local: bool) -> None:
    assert is_local(address) is local
    assert Endpoint(address).private is local
    if not address.startswith("unix:"):
        assert Endpoint(address, tls=True).private


def test_a_secret_goes_to_another_host_over_tls_alone(client_of: Any) -> None:
    secret = {"authorization": "Bearer of-mine"}
    with pytest.raises(gradwire.InputError, match="in plaintext") as refused:
        client_of(ADDRESS, metadata=secret)
    assert "of-mine" not in str(refused.value)
    client_of(ADDRESS, metadata=secret, tls=True)
    client_of("127.0.0.1:1", metadata=secret)
    with pytest.raises(gradwire.InputError, match="in plaintext"):
        client_of(ADDRESS).stream([], metadata=secret)
