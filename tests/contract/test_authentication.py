"""Who is let in, who is not, and that no secret shows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from gradwire.v1 import gradient_service_pb2 as service_pb2
from gradwire.v1 import gradient_service_pb2_grpc
from tests.contract.conftest import assert_untroubled
from tests.support.credentials import (
    AUDIENCE,
    ISSUER,
    Issuer,
    authorized,
    make_tokens,
    replace_file,
    sending,
)
from tests.support.raw import (
    CallError,
    Request,
    Stream,
    compute_job,
    stream_job,
    whole_numbers,
)
from tests.support.serving import ServerProcess, running_server
from tests.support.shared_memory import RawRegion, shared_job

MIB = 1 << 20
PROBLEM = whole_numbers(40, 6, 5)
WRONG = "gw_wrong-wrong-wrong-wrong-wrong-wrong-wrong-wr"


@dataclass(frozen=True)
class Guarded:
    """A server that asks for credentials, and some that it takes."""

    server: ServerProcess
    channel: grpc.Channel
    file: Path
    text: str
    tokens: dict[str, str]
    issuer: Issuer

    def of(self, tenant: str) -> grpc.Channel:
        """The channel as a tenant uses it."""
        return authorized(self.channel, self.tokens[tenant])


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    directory = tmp_path_factory.mktemp("credentials")
    tokens, text = make_tokens("alice", "bob")
    issuer = Issuer()
    (directory / "tokens.toml").write_text(text)
    (directory / "keys.json").write_text(issuer.key_set())
    with (
        running_server(
            auth_tokens=str(directory / "tokens.toml"),
            auth_jwks=str(directory / "keys.json"),
            auth_jwt_audience=AUDIENCE,
            auth_jwt_issuer=ISSUER,
            allow_shared_memory=True,
        ) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        yield Guarded(server, channel, directory / "tokens.toml", text, tokens, issuer)
        assert_untroubled(server)


def calls(channel: grpc.Channel) -> dict[str, Any]:
    """One call of every method that the server has."""
    own = gradient_service_pb2_grpc.GradientServiceStub(channel)
    health = health_pb2_grpc.HealthStub(channel)
    channelz = channelz_pb2_grpc.ChannelzStub(channel)
    reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
    more = {"timeout": 20}
    wanted = [reflection_pb2.ServerReflectionRequest(list_services="")]
    region = service_pb2.OpenRegionRequest(size_bytes=MIB)
    return {
        "GetServerInfo": lambda: own.GetServerInfo(
            service_pb2.GetServerInfoRequest(), **more
        ),
        "Compute": lambda: own.Compute(PROBLEM.compute_request(), **more),
        "ComputeStream": lambda: list(
            own.ComputeStream(iter([Request(job=PROBLEM.job())]), **more)
        ),
        "OpenRegion": lambda: next(own.OpenRegion(region, **more)),
        "Reflection": lambda: list(
            reflection.ServerReflectionInfo(iter(wanted), **more)
        ),
        "Channelz": lambda: channelz.GetServers(
            channelz_pb2.GetServersRequest(), **more
        ),
        "Health": lambda: health.Check(health_pb2.HealthCheckRequest(), **more),
        "Unknown": lambda: channel.unary_unary("/gradwire.v9.Other/Do")(b"", **more),
    }


NEED_A_TENANT = (
    "GetServerInfo",
    "Compute",
    "ComputeStream",
    "OpenRegion",
    "Reflection",
    "Channelz",
    "Unknown",
)


def refusal(call: Any) -> CallError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return CallError(caught.value)


@pytest.mark.parametrize("method", NEED_A_TENANT)
def test_every_method_asks_for_credentials(guarded, method):
    refused = refusal(calls(guarded.channel)[method])
    assert refused.status is grpc.StatusCode.UNAUTHENTICATED
    assert refused.reason == "CREDENTIALS_INVALID"
    assert "send the metadata authorization: Bearer TOKEN" in refused.text
    assert refused.repeats_the_status


@pytest.mark.parametrize("method", NEED_A_TENANT[:-1])
def test_every_method_knows_wrong_credentials_from_right_ones(guarded, method):
    refused = refusal(calls(authorized(guarded.channel, WRONG))[method])
    assert refused.reason == "CREDENTIALS_INVALID"
    assert refused.text == "the credentials are not valid here"
    if method != "ComputeStream":  # of which that is half a job
        calls(guarded.of("alice"))[method]()


def test_anybody_may_ask_for_the_servers_health(guarded):
    assert calls(guarded.channel)["Health"]().status == 1


def test_a_job_runs_for_the_tenant_and_the_log_names_it(guarded):
    with_jwt = guarded.issuer.token("trainer@example.test")
    for tenant, token in [*guarded.tokens.items(), ("trainer@example.test", with_jwt)]:
        for way in (stream_job, compute_job):
            job_id = f"{way.__name__} of {tenant}"
            way(authorized(guarded.channel, token), PROBLEM, job_id=job_id)
            record = guarded.server.wait_for_log(
                lambda record, job_id=job_id: record.get("job_id") == job_id
            )
            assert record["tenant"] == tenant


@pytest.mark.parametrize(
    "value",
    ["", "Bearer", "Bearer ", "Basic abc", "Bearer a b", "Bearer a.b.c", "gw_abc"],
)
def test_a_header_that_is_no_bearer_token_is_refused(guarded, value):
    channel = sending(guarded.channel, ("authorization", value))
    refused = refusal(calls(channel)["Compute"])
    assert refused.status is grpc.StatusCode.UNAUTHENTICATED


def test_two_credentials_are_refused(guarded):
    both = [("authorization", f"Bearer {each}") for each in guarded.tokens.values()]
    refused = refusal(calls(sending(guarded.channel, *both))["Compute"])
    assert refused.text == "the metadata authorization is not one Bearer TOKEN"


def test_a_call_is_refused_before_a_message_of_it_comes(guarded):
    with Stream(authorized(guarded.channel, WRONG)) as stream:
        assert stream.failure().reason == "CREDENTIALS_INVALID"
    record = guarded.server.wait_for_log(lambda record: record["message"] == "refused")
    assert record["method"].startswith("/")
    assert record["peer"].startswith("ipv4:127.0.0.1")


def test_shared_memory_is_its_tenants(guarded):
    alice, bob = guarded.of("alice"), guarded.of("bob")
    with RawRegion(alice, MIB) as region:
        job = region.lay_out(PROBLEM)
        with Stream(bob) as other:
            other.send(job)
            refused = other.failure()
        assert refused.reason == "NOT_ALLOWED"
        assert region.answer.token not in refused.text
        shared_job(alice, job)


def test_a_token_is_good_from_when_it_stands_in_the_file_until_it_does_not(guarded):
    more, text = make_tokens("carol")
    info = calls(authorized(guarded.channel, more["carol"]))["GetServerInfo"]
    assert refusal(info).reason == "CREDENTIALS_INVALID"
    replace_file(guarded.file, guarded.text + text)
    info()
    replace_file(guarded.file, "tokens = wrong")
    info()
    assert guarded.server.wait_for_log("what was loaded before stays in effect")
    replace_file(guarded.file, guarded.text)
    assert refusal(info).reason == "CREDENTIALS_INVALID"


def test_health_may_be_closed_too(tmp_path):
    tokens, text = make_tokens("alice")
    (tmp_path / "tokens.toml").write_text(text)
    with (
        running_server(
            auth_tokens=str(tmp_path / "tokens.toml"), auth_health=True
        ) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        assert refusal(calls(channel)["Health"]).reason == "CREDENTIALS_INVALID"
        alice = authorized(channel, tokens["alice"])
        assert calls(alice)["Health"]().status == 1
        # JWTs are for servers that were given keys.
        jwt = authorized(channel, Issuer().token("alice"))
        assert refusal(calls(jwt)["Health"]).reason == "CREDENTIALS_INVALID"


def test_no_secret_shows_in_the_log_or_in_an_error(guarded):
    """Whatever the tests above did with it, and a little more."""
    secrets = [WRONG, *guarded.tokens.values()]
    texts = []
    for token in (*secrets, guarded.issuer.token("alice", exp=1)):
        secrets.append(token)
        for call in calls(authorized(guarded.channel, token)).values():
            try:
                call()
            except grpc.RpcError as error:
                texts += [error.details() or "", str(error.trailing_metadata())]
    with RawRegion(guarded.of("alice"), MIB) as region:
        secrets.append(region.answer.token)
    guarded.server.wait_for_log(lambda record: record.get("method") == "OpenRegion")
    everything = guarded.server.logs + "\n".join(texts)
    assert "CREDENTIALS_INVALID" in everything
    for secret in secrets:
        assert secret not in everything
        assert secret.removeprefix("gw_") not in everything
