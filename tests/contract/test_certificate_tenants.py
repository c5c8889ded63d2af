"""Tenants that prove who they are by the certificate of their connection."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from tests.contract.conftest import assert_untroubled
from tests.contract.test_authentication import NEED_A_TENANT, calls, refusal
from tests.support.certificates import Authority
from tests.support.credentials import authorized, make_tokens
from tests.support.raw import compute_job, stream_job, whole_numbers
from tests.support.serving import ServerProcess, running_server

PROBLEM = whole_numbers(40, 6, 5)


@dataclass(frozen=True)
class Guarded:
    """A server that knows clients by their certificates."""

    server: ServerProcess
    authority: Authority
    tokens: dict[str, str]

    def of(self, name: str) -> grpc.Channel:
        """A channel with a certificate of that common name."""
        me = self.authority.issue(name=name)
        credentials = grpc.ssl_channel_credentials(self.authority.cert, me.key, me.cert)
        return grpc.secure_channel(self.server.addresses[0], credentials)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    directory: Path = tmp_path_factory.mktemp("certificates")
    authority = Authority()
    cert, key = authority.issue("localhost", "127.0.0.1").write(directory, "server")
    tokens, text = make_tokens("alice")
    (directory / "tokens.toml").write_text(text)
    with running_server(
        listen=["127.0.0.1:0", f"unix:{directory / 'socket'}"],
        tls_cert=cert,
        tls_key=key,
        tls_client_ca=authority.write(directory),
        auth_certificates=True,
        auth_tokens=str(directory / "tokens.toml"),
    ) as server:
        yield Guarded(server, authority, tokens)
        assert_untroubled(server)


def tenant_of(guarded: Guarded, job_id: str) -> str:
    record = guarded.server.wait_for_log(lambda each: each.get("job_id") == job_id)
    return str(record["tenant"])


def test_the_certificates_name_is_the_tenant_of_every_method(guarded):
    with guarded.of("trainer-7") as channel:
        stream_job(channel, PROBLEM, job_id="stream")
        compute_job(channel, PROBLEM, job_id="compute")
        everything = calls(channel)
        for method in ("GetServerInfo", "Reflection", "Channelz", "Health"):
            everything[method]()
    assert tenant_of(guarded, "stream") == "trainer-7"
    assert tenant_of(guarded, "compute") == "trainer-7"


def test_a_token_says_more_than_a_certificate(guarded):
    with guarded.of("trainer-7") as channel:
        token = guarded.tokens["alice"]
        compute_job(authorized(channel, token), PROBLEM, job_id="token")
        refused = refusal(calls(authorized(channel, f"{token}x"))["Compute"])
    assert tenant_of(guarded, "token") == "alice"
    assert refused.reason == "CREDENTIALS_INVALID"


def test_a_certificate_without_a_name_that_a_tenant_could_have_is_refused(guarded):
    with guarded.of("trainér") as channel:
        refused = refusal(calls(channel)["Compute"])
    assert refused.status is grpc.StatusCode.UNAUTHENTICATED
    assert refused.text == "the certificate names no tenant"


@pytest.mark.parametrize("method", NEED_A_TENANT[:-1])
def test_who_shows_no_certificate_needs_a_token(guarded, method):
    with grpc.insecure_channel(guarded.server.addresses[1]) as channel:  # the socket
        refused = refusal(calls(channel)[method])
        assert refused.reason == "CREDENTIALS_INVALID"
        compute_job(authorized(channel, guarded.tokens["alice"]), PROBLEM)
