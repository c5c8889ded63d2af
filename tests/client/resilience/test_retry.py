from __future__ import annotations

import logging
from typing import Any

import grpc
import pytest

import gradwire
from gradwire._api.errors import BY_STATUS, CallError
from gradwire._api.options import parse_options
from gradwire._resilience.retry import Attempts, Retries, is_transient, parse_retries
from gradwire._transport.grpc.grpc_errors import call_error
from gradwire_protocol.error_details import ErrorDetails
from gradwire_protocol.error_reasons import Reason

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def lost(
    status: grpc.StatusCode = UNAVAILABLE, **attached: Any
) -> gradwire.GradwireError:
    kind = BY_STATUS[status]
    return kind("it is gone", status=status, attached=ErrorDetails(**attached))


def longest(_: float, most: float) -> float:
    return most


def attempts(
    policy: gradwire.RetryPolicy, timeout_s: float | None = None, **kwargs: Any
) -> Attempts:
    retries = Retries(policy, draw=longest, clock=kwargs.pop("clock", Clock()))
    return Attempts(retries, timeout_s, "job-1")


@pytest.mark.parametrize("status", sorted(BY_STATUS, key=lambda each: each.name))
def test_of_statuses_alone_only_unavailable_is_worth_a_retry(
    status: grpc.StatusCode,
) -> None:
    assert is_transient(lost(status)) == (status is UNAVAILABLE)


@pytest.mark.parametrize("reason", Reason)
def test_what_reasons_are_worth_a_retry(reason: Reason) -> None:
    class Ended:
        def code(self) -> grpc.StatusCode:
            return reason.status

        def details(self) -> str:
            return ""

        def trailing_metadata(self) -> Any:
            from gradwire_protocol.error_details import TRAILER, encode

            details = ErrorDetails(reason=reason)
            ((_, packed),) = encode(reason.status, "", details)
            return ((TRAILER, packed),)

    error = call_error(Ended(), "gpu-node:50051")
    worth = {
        Reason.DRAINING,
        Reason.DEVICE_LOST,
        Reason.CONNECTION_LOST,
        Reason.CHECKSUM_MISMATCH,
    }
    assert is_transient(error) == (reason in worth)


def test_a_server_that_is_not_trusted_is_not_asked_again() -> None:
    assert not is_transient(gradwire.TlsError("who is it?", status=UNAVAILABLE))


def test_a_server_without_room_is_asked_again_only_if_it_says_when() -> None:
    status = grpc.StatusCode.RESOURCE_EXHAUSTED
    assert is_transient(lost(status, reason=Reason.BUSY, retry_after_s=0.0))
    assert not is_transient(lost(status, reason=Reason.BUSY))


def test_waits_grow_up_to_their_most_and_then_the_error_is_the_calls() -> None:
    policy = gradwire.RetryPolicy(
        attempts=6, initial_backoff_s=0.1, multiplier=3, max_backoff_s=2
    )
    one = attempts(policy)
    waits = [one.after(lost()) for _ in range(5)]
    assert waits == pytest.approx([0.1, 0.3, 0.9, 2, 2])
    error = lost()
    assert one.after(error) is None
    assert error.attempts == 6
    before = ", ".join(["UNAVAILABLE"] * 5)
    assert error.__notes__ == [
        f"This was attempt 6; the earlier ones failed with {before}."
    ]


def test_a_wait_is_drawn_between_nothing_and_its_most() -> None:
    drawn = []

    def draw(least: float, most: float) -> float:
        drawn.append((least, most))
        return 0.25 * most

    retries = Retries(gradwire.RetryPolicy(initial_backoff_s=0.8), draw=draw)
    assert Attempts(retries, None).after(lost()) == pytest.approx(0.2)
    assert drawn == [(0.0, 0.8)]


def test_an_attempt_that_gets_further_begins_the_count_anew() -> None:
    one = attempts(gradwire.RetryPolicy(attempts=3, initial_backoff_s=1, multiplier=2))
    assert [one.after(lost()) for _ in range(2)] == [1, 2]
    one.progressed()
    assert [one.after(lost()) for _ in range(3)] == [1, 2, None]
    assert one.count == 5


def test_what_the_server_says_comes_before_the_backoff() -> None:
    busy = lost(grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after_s=1.5)
    one = attempts(gradwire.RetryPolicy(initial_backoff_s=0.5))
    assert one.after(busy) == pytest.approx(2.0)


def test_a_server_that_says_much_later_is_not_waited_for() -> None:
    """Years would be more than a thread can wait, too."""
    busy = lost(grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after_s=3e11)
    assert attempts(gradwire.RetryPolicy()).after(busy) is None


def test_no_retry_begins_after_the_deadline() -> None:
    clock = Clock()
    policy = gradwire.RetryPolicy(initial_backoff_s=2, max_backoff_s=2)
    one = attempts(policy, timeout_s=5.0, clock=clock)
    clock.now += 2.5
    assert one.after(lost()) == 2.0
    assert one.left_s == pytest.approx(2.5)
    clock.now += 1.0
    assert one.after(lost()) is None


def test_every_attempt_has_what_is_left_of_the_deadline() -> None:
    options = parse_options(results="y", timeout_s=30.0)
    one = Attempts(Retries(gradwire.RetryPolicy()), options.timeout_s)
    one.after(lost())
    left = one.options(options).timeout_s
    assert left is not None
    assert 20 < left < 30


@pytest.mark.parametrize("affinity", ["the job", "of its session"])
def test_a_proxy_may_send_a_retry_elsewhere_unless_it_is_a_sessions(
    affinity: str,
) -> None:
    pairs = [("traceparent", "00"), ("gradwire-affinity", affinity)]
    options = parse_options(results="y", request_id="the job", metadata=pairs)
    one, seen = attempts(gradwire.RetryPolicy()), []
    for _ in range(3):
        metadata = one.options(options).metadata
        assert metadata[0] == pairs[0]
        seen.append(metadata[1][1])
        one.after(lost())
    assert len(set(seen)) == (3 if affinity == "the job" else 1)
    assert seen[0] == affinity


def test_a_budget_that_is_half_used_allows_no_retry_until_calls_succeed() -> None:
    policy = gradwire.RetryPolicy(budget=6, refund=0.5)
    retries = Retries(policy, draw=longest)

    def fails() -> bool:
        return Attempts(retries, None).after(lost()) is not None

    assert [fails() for _ in range(4)] == [True, True, False, False]
    for _ in range(4):
        Attempts(retries, None).succeeded()
    assert [fails() for _ in range(2)] == [False, False]
    for _ in range(100):
        Attempts(retries, None).succeeded()
    assert [fails() for _ in range(3)] == [True, True, False]


def test_what_is_not_worth_a_retry_costs_nothing_of_the_budget() -> None:
    retries = Retries(gradwire.RetryPolicy(budget=4), draw=longest)
    for _ in range(10):
        Attempts(retries, None).after(lost(grpc.StatusCode.INVALID_ARGUMENT))
    assert Attempts(retries, None).after(lost()) is not None


def test_each_retry_leaves_a_record_with_job_cause_and_delay(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, "gradwire"):
        attempts(gradwire.RetryPolicy()).after(lost(reason=Reason.DRAINING))
    (record,) = caplog.records
    assert record.name == "gradwire"
    assert record.levelno == logging.WARNING
    annotate = {
        name: vars(record)[name]
        for name in ("job_id", "attempt", "status", "reason", "delay_s")
    }
    assert annotate == {
        "job_id": "job-1",
        "attempt": 1,
        "status": "UNAVAILABLE",
        "reason": "DRAINING",
        "delay_s": 0.1,
    }
    assert "job job-1: attempt 1 failed with DRAINING" in record.getMessage()


def test_retries_can_be_switched_off() -> None:
    for off in (None, False):
        error = lost()
        assert attempts(parse_retries(off)).after(error) is None
        assert not hasattr(error, "__notes__")
    assert parse_retries(True) == gradwire.RetryPolicy()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attempts", 0),
        ("attempts", 1.5),
        ("attempts", True),
        ("initial_backoff_s", -1),
        ("multiplier", 0.5),
        ("max_backoff_s", "long"),
        ("budget", float("nan")),
        ("refund", -0.1),
        ("multiplier", float("inf")),
        ("budget", 10**400),
    ],
)
def test_a_policy_that_cannot_be_is_refused_by_its_field(
    field: str, value: Any
) -> None:
    with pytest.raises(gradwire.InputError, match=f"RetryPolicy's {field} is"):
        gradwire.RetryPolicy(**{field: value})


def test_what_is_no_policy_is_refused() -> None:
    with pytest.raises(gradwire.InputError, match="retries is 3: expected True, False"):
        gradwire.Client("gpu-node:50051", retries=3)  # type: ignore[arg-type]


def test_call_errors_count_their_attempts() -> None:
    assert CallError("once").attempts == 1
