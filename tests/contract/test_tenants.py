"""What tenants may have of a server, and whose turn it is there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from gradwire.v1 import gradient_service_pb2 as service_pb2
from gradwire.v1 import gradient_service_pb2_grpc
from tests.contract.conftest import assert_untroubled
from tests.support.credentials import authorized, make_tokens
from tests.support.raw import Stream, compute_job, make_job, whole_numbers
from tests.support.serving import ServerProcess, running_server

MIB = 1 << 20
PROBLEM = whole_numbers(4, 6, 5)
LIMITS = """
[tenants.narrow]
max-jobs = 1
max-queue = 1
memory-limit = 67_108_864
"""
TENANTS = ("many", "one", "narrow")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], Path]:
    tokens, text = make_tokens(*TENANTS)
    file: Path = tmp_path_factory.mktemp("credentials") / "tokens.toml"
    file.write_text(text + LIMITS)
    return tokens, file


@pytest.fixture(scope="module")
def server(tokens: Any) -> Iterator[ServerProcess]:
    with running_server(
        auth_tokens=str(tokens[1]), max_jobs=2, memory_limit=1024 * MIB
    ) as process:
        yield process
        assert_untroubled(process)


@pytest.fixture(scope="module")
def of(server: ServerProcess, tokens: Any) -> Iterator[dict[str, grpc.Channel]]:
    """The server as each tenant sees it."""
    with grpc.insecure_channel(server.address) as channel:
        yield {name: authorized(channel, tokens[0][name]) for name in TENANTS}


def queued(stack: ExitStack, channel: grpc.Channel, job_id: str = "") -> Stream:
    """A small job that is all there, and waits."""
    stream = stack.enter_context(Stream(channel, timeout_s=60))
    stream.send(PROBLEM.job(job_id=job_id))
    stream.send_all(PROBLEM.body(4))
    stream.half_close()
    answer = stream.receive()
    assert answer is not None
    assert answer.WhichOneof("message") == "queued"
    return stream


def running(stack: ExitStack, channel: grpc.Channel, **options: Any) -> Stream:
    """A job that runs, and waits for its rows."""
    stream = stack.enter_context(Stream(channel, timeout_s=60))
    stream.send(PROBLEM.job(**options))
    stream.receive_accepted()
    return stream


def finish(stream: Stream) -> None:
    stream.send_all(PROBLEM.body(4))
    stream.half_close()
    while stream.receive() is not None:
        pass


def test_a_tenants_hundred_jobs_leave_anothers_one_its_turn(server, of):
    with ExitStack() as stack:
        first = [running(stack, of["many"]) for _ in range(2)]
        many = [queued(stack, of["many"], f"many {n}") for n in range(100)]
        one = queued(stack, of["one"], "one")
        finish(first[0])  # and the other keeps its place, so one runs at a time
        while one.receive() is not None:
            pass
        for stream in many:
            while stream.receive() is not None:
                pass
        finish(first[1])
    ended = [
        record["job_id"]
        for record in server.records
        if record.get("job_id") == "one" or "many " in str(record.get("job_id"))
    ]
    assert len(ended) == 101
    assert ended.index("one") <= 2  # there are two tenants


def test_a_tenant_is_told_which_of_its_limits_it_has_met(of):
    with ExitStack() as stack:
        first = running(stack, of["narrow"])
        queued(stack, of["narrow"])
        with Stream(of["narrow"]) as stream:
            stream.send(PROBLEM.job())
            refused = stream.failure()
        assert refused.status is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert refused.reason == "BUSY"
        assert refused.retry_after_s == 1
        assert refused.metadata["limit"] == "tenant_max_queue"
        assert "tenant_max_queue" in refused.text
        compute_job(of["one"], PROBLEM)  # others do not notice
        finish(first)


def test_a_job_larger_than_its_tenants_memory_is_refused_for_good(of):
    large = make_job(m=4, n=4000, k=2000)
    with Stream(of["narrow"]) as stream:
        stream.send(large)
        refused = stream.failure()
    assert refused.reason == "JOB_TOO_LARGE"
    assert refused.metadata["limit"] == "tenant_memory_limit"
    assert refused.retry_after_s is None
    with Stream(of["one"]) as stream:
        stream.send(large)
        stream.receive_accepted()


def test_a_tenants_half_open_calls_leave_the_server_to_others(of):
    with ExitStack() as stack:
        for _ in range(40):  # of which its memory admits 32
            stack.enter_context(Stream(of["narrow"]))
        with Stream(of["narrow"]) as stream:
            refused = stream.failure()
        assert refused.reason == "BUSY"
        assert refused.metadata["limit"] == "tenant_memory_limit"
        compute_job(of["one"], PROBLEM)


def test_a_tenant_is_told_what_it_can_have(of):
    def limits(tenant: str) -> Any:
        stub = gradient_service_pb2_grpc.GradientServiceStub(of[tenant])
        return stub.GetServerInfo(service_pb2.GetServerInfoRequest()).limits

    narrow, other = limits("narrow"), limits("one")
    assert (narrow.max_jobs, narrow.max_queue) == (1, 1)
    assert narrow.memory_bytes == 64 * MIB
    assert (other.max_jobs, other.max_queue) == (2, 256)
    assert other.memory_bytes == 960 * MIB
