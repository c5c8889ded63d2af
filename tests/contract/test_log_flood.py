"""Calls that fail again and again do not fill the log."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import pytest

from gradwire.v1 import gradient_service_pb2 as service_pb2
from gradwire.v1 import session_service_pb2 as pb2
from gradwire_server.observability.access_log import MOST_ALIKE
from tests.support.credentials import authorized, make_tokens
from tests.support.metrics import scrape
from tests.support.raw import SERVICE, make_job, whole_numbers
from tests.support.serving import running_server
from tests.support.sessions import RawSessions, refusal


def fail(channel: Any, request: bytes, count: int) -> None:
    method = channel.unary_unary(f"/{SERVICE}/Compute")
    for call in [method.future(request, timeout=20) for _ in range(count)]:
        with pytest.raises(grpc.RpcError):
            call.result()


def test_calls_that_find_a_damaged_state_have_a_line_each_and_no_more(
    tmp_path: Path,
) -> None:
    with (
        running_server(state_dir=str(tmp_path), limits_log=True) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        sessions = RawSessions(channel)
        session = sessions.open()
        request = pb2.SaveSessionRequest(session=session.token, name="mine")
        session.call("SaveSession", request)
        (file,) = tmp_path.rglob("mine.safetensors")
        file.write_bytes(b"no state")
        for _ in range(MOST_ALIKE + 5):
            failure = refusal(lambda: sessions.open(restore="mine"))
            assert failure.reason == "STATE_INVALID"
            assert str(tmp_path) not in failure.text
        lines = [r for r in server.records if "STATE_INVALID" in str(r)]
        assert len(lines) == MOST_ALIKE
        assert {(r["levelname"], r["file"]) for r in lines} == {("ERROR", str(file))}
        assert server.logs.count(str(file)) == MOST_ALIKE


def test_each_tenant_has_the_first_lines_of_a_reason_and_a_count_of_the_others(
    tmp_path: Path,
) -> None:
    tokens, text = make_tokens("alice", "bob")
    (tmp_path / "tokens.toml").write_text(text)
    wrong = service_pb2.ComputeRequest(job=make_job(m=-1)).SerializeToString()
    right = whole_numbers(6, 5, 4).compute_request().SerializeToString()
    with (
        running_server(
            auth_tokens=str(tmp_path / "tokens.toml"),
            limits_log=True,
            metrics_listen="0",
        ) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        alice, bob = (authorized(channel, tokens[name]) for name in ("alice", "bob"))
        fail(channel, right, MOST_ALIKE + 30)  # without a token
        fail(alice, wrong, MOST_ALIKE + 25)
        fail(bob, wrong, 3)
        for _ in range(MOST_ALIKE + 1):  # jobs that are computed have a line each
            bob.unary_unary(f"/{SERVICE}/Compute")(right, timeout=20)
        metrics = scrape(server.metrics_url)
        server.process.terminate()
        assert server.process.wait(20) == 0
        lines = Counter(
            (record["message"], record["reason"], record.get("tenant"))
            for record in server.records
            if record.get("reason") and "more_calls" not in record
        )
        more = {
            (record["reason"], record.get("tenant")): record["more_calls"]
            for record in server.records
            if "more_calls" in record
        }
        done = [r for r in server.records if r.get("outcome") == "OK"]
    assert lines == {
        ("refused", "CREDENTIALS_INVALID", None): MOST_ALIKE,
        ("job", "SHAPE_INVALID", "alice"): MOST_ALIKE,
        ("job", "SHAPE_INVALID", "bob"): 3,
    }
    assert more == {
        ("CREDENTIALS_INVALID", None): 30,
        ("SHAPE_INVALID", "alice"): 25,
    }
    assert len(done) == MOST_ALIKE + 1
    # Metrics count them all, and name no tenant unless they are asked to.
    assert metrics.sum("auth_failures_total") == MOST_ALIKE + 30
    assert metrics.by("jobs_total", "reason") == {
        ("",): MOST_ALIKE + 1,
        ("SHAPE_INVALID",): MOST_ALIKE + 25 + 3,
    }
    assert 'tenant="' not in metrics.text
    assert "gradwire_tenant_" not in metrics.text
