"""Which of several calls' ends is the job's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from grpc import StatusCode

import gradwire
from gradwire._endpoint import Endpoint
from gradwire._exceptions import CallError
from gradwire._joining import Ends, NotJoinedError
from gradwire._options import parse_options
from gradwire.wire.reasons import Reason
from gradwire.wire.status import ErrorDetails


def make_ends(*, ready: bool = True, connections: int = 3, **options: Any) -> Ends:
    exchange: Any = SimpleNamespace(ready=ready, connections=connections)
    return Ends(exchange, Endpoint("there:1"), parse_options(results="y", **options))


def failure(status: StatusCode, reason: Reason | None = None) -> CallError:
    return CallError("it failed", status=status, attached=ErrorDetails(reason=reason))


ECHO = failure(StatusCode.CANCELLED, Reason.JOB_CANCELLED)
CAUSE = failure(StatusCode.ABORTED, Reason.CLIENT_IDLE)
LOST = failure(StatusCode.UNAVAILABLE)


def test_a_job_has_ended_well_when_all_of_its_calls_have() -> None:
    ends = make_ends()
    for connection in range(3):
        assert not ends.decided
        ends.add(connection, None)
    assert ends.decided
    ends.raise_error()


@pytest.mark.parametrize("cause", [CAUSE, LOST])
@pytest.mark.parametrize("echoes", [0, 1, 2])
def test_the_cause_is_raised_and_not_its_echo(cause: CallError, echoes: int) -> None:
    ends = make_ends()
    for connection in range(echoes):
        ends.add(connection, ECHO)
        assert ends.failed
        assert not ends.decided
    ends.add(echoes, cause)
    assert ends.decided
    with pytest.raises(CallError) as raised:
        ends.raise_error()
    assert raised.value is cause


def test_an_echo_alone_says_that_a_connection_broke() -> None:
    ends = make_ends()
    ends.add(1, ECHO)
    assert 0 < (ends.patience_s or 0) <= 1
    with pytest.raises(gradwire.ConnectionLostError, match="there:1"):
        ends.raise_error()


def test_an_echo_after_the_deadline_says_that_it_has_passed() -> None:
    ends = make_ends(timeout_s=1e-9)
    ends.add(1, ECHO)
    with pytest.raises(gradwire.DeadlineError):
        ends.raise_error()


def test_calls_that_were_given_up_were_cancelled() -> None:
    with pytest.raises(gradwire.JobCancelledError):
        make_ends().raise_error()


@pytest.mark.parametrize(
    ("connection", "error"),
    [
        (1, failure(StatusCode.FAILED_PRECONDITION, Reason.JOIN_UNKNOWN)),
        (2, LOST),
        (1, failure(StatusCode.UNAVAILABLE, Reason.DRAINING)),
        (0, failure(StatusCode.UNIMPLEMENTED, Reason.FEATURE_UNKNOWN)),
        (0, CAUSE),
    ],
)
def test_connections_that_cannot_be_had_are_told_apart(
    connection: int, error: CallError
) -> None:
    with pytest.raises(NotJoinedError):
        make_ends(ready=False).add(connection, error)
    ends = make_ends()
    ends.add(connection, error)
    with pytest.raises(CallError):
        ends.raise_error()


@pytest.mark.parametrize(
    ("error", "lasts"),
    [
        (failure(StatusCode.FAILED_PRECONDITION, Reason.JOIN_UNKNOWN), True),
        (LOST, True),
        (failure(StatusCode.RESOURCE_EXHAUSTED, Reason.BUSY), False),
    ],
)
def test_jobs_that_follow_try_again_only_where_connections_were_taken(
    error: CallError, lasts: bool
) -> None:
    with pytest.raises(NotJoinedError) as caught:
        make_ends(ready=False).add(1, error)
    client = gradwire.Client("localhost:1", channels=4)
    client._not_joined(caught.value)
    assert client._connections_now() == (1 if lasts else 4)


@pytest.mark.parametrize(
    ("connection", "error"),
    [
        (0, failure(StatusCode.RESOURCE_EXHAUSTED, Reason.BUSY)),
        (0, LOST),
        (1, failure(StatusCode.DEADLINE_EXCEEDED)),
        (1, ECHO),
    ],
)
def test_other_failures_are_the_jobs_before_all_have_joined_too(
    connection: int, error: CallError
) -> None:
    ends = make_ends(ready=False)
    ends.add(connection, error)
    with pytest.raises(CallError):
        ends.raise_error()
