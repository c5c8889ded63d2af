"""Which of several servers the next job goes to, without any."""

from __future__ import annotations

from typing import Any

import pytest
from grpc import StatusCode

import gradwire
from gradwire._resilience.load_balancer import (
    FIRST_OUT_S,
    MOST_OUT_S,
    RESOLVED_S,
    SOON_S,
    WRONG_OUT_S,
    Lease,
    LoadBalancer,
    none_left,
    overtaken_error,
)
from gradwire._resilience.retry import Attempts, Retries, RetryPolicy
from gradwire._transport.address import addresses_of, parse_addresses
from gradwire_protocol.error_details import ErrorDetails

LOST = gradwire.ConnectionLostError("broke", status=StatusCode.UNAVAILABLE)
BUSY = gradwire.ServerBusyError(
    "busy",
    status=StatusCode.RESOURCE_EXHAUSTED,
    attached=ErrorDetails(retry_after_s=3.0),
)
WRONG = gradwire.VerificationError("wrong")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def servers(clock: Clock, *addresses: str, names: Any = ()) -> LoadBalancer[str]:
    made: LoadBalancer[str] = LoadBalancer(
        lambda address, name: f"client of {address}",
        addresses,
        names,
        clock=clock,
        draw=lambda _, most: most,
    )
    return made


def chosen(some: LoadBalancer[str], **options: Any) -> str:
    """Where the next job goes, which is over at once."""
    member = some.choose(**options)
    assert member is not None
    some.release(member)
    return member.address


def test_equals_take_turns_and_the_least_busy_comes_first(clock: Clock) -> None:
    some = servers(clock, "a", "b", "c")
    assert [chosen(some) for _ in range(6)] == ["a", "b", "c", "a", "b", "c"]
    busy = some.choose()
    assert busy is not None
    assert [chosen(some) for _ in range(4)] == ["b", "c", "b", "c"]
    some.release(busy)
    assert chosen(some) == "a"


def test_one_where_the_call_has_failed_comes_last(clock: Clock) -> None:
    some = servers(clock, "a", "b")
    assert [chosen(some, avoid={"a"}) for _ in range(3)] == ["b", "b", "b"]
    assert chosen(some, avoid={"a", "b"}) == "a"
    assert some.choose(unusable={"a", "b"}) is None


def test_one_that_cannot_be_had_is_left_out_for_longer_each_time(clock: Clock) -> None:
    some = servers(clock, "a", "b")
    (a, _) = some.members
    out_s = FIRST_OUT_S
    for _ in range(8):
        some.record_failure(a, LOST)
        assert a.needs_probe
        assert [chosen(some) for _ in range(2)] == ["b", "b"]
        clock.now += out_s - 0.01
        assert [chosen(some) for _ in range(2)] == ["b", "b"]
        clock.now += 0.02
        # It is asked by one, while the others go on without it.
        asked = some.choose()
        assert asked is a
        assert [chosen(some) for _ in range(2)] == ["b", "b"]
        some.release(asked)
        out_s = min(MOST_OUT_S, 2 * out_s)
    some.mark_healthy(a)
    assert not a.needs_probe
    assert {chosen(some) for _ in range(2)} == {"a", "b"}


@pytest.mark.parametrize(("error", "out_s"), [(BUSY, 3.0), (WRONG, WRONG_OUT_S)])
def test_one_that_is_busy_or_wrong_is_left_out_and_need_not_be_asked(
    clock: Clock, error: gradwire.GradwireError, out_s: float
) -> None:
    some = servers(clock, "a", "b")
    some.record_failure(some.members[0], error)
    clock.now += out_s - 0.01
    assert [chosen(some) for _ in range(2)] == ["b", "b"]
    clock.now += 0.02
    assert {chosen(some) for _ in range(2)} == {"a", "b"}
    assert not some.members[0].needs_probe


def test_a_callers_own_mistake_is_not_the_servers(clock: Clock) -> None:
    some = servers(clock, "a", "b")
    some.record_failure(some.members[0], gradwire.RequestError("no"))
    some.record_failure(some.members[1], gradwire.DeadlineError("late"))
    assert {chosen(some) for _ in range(2)} == {"a", "b"}


def test_where_all_are_left_out_any_will_do(clock: Clock) -> None:
    some = servers(clock, "a", "b")
    for member in some.members:
        some.record_failure(member, LOST)
    assert {chosen(some) for _ in range(2)} == {"a", "b"}


@pytest.mark.parametrize(
    ("error", "alone", "with_another"),
    [(BUSY, 3.0, 0.0), (WRONG, None, 0.0), (LOST, 0.0, 0.0)],
)
def test_a_call_is_made_again_at_once_where_there_is_another_server(
    clock: Clock,
    error: gradwire.GradwireError,
    alone: float | None,
    with_another: float | None,
) -> None:
    for names, delay_s in ((("a",), alone), (("a", "b"), with_another)):
        some = servers(clock, *names)
        attempts = Attempts(
            Retries(RetryPolicy(), draw=lambda least, _: least, clock=clock), None
        )
        member = some.choose()
        assert member is not None
        lease = Lease(member.engine, some, member, attempts)
        lease.ended(error)
        lease.ended(None)  # no matter
        assert member.running == 0
        assert attempts.after(error) == delay_s
        assert attempts.avoid == {"a"}


def test_a_name_is_looked_up_now_and_then_and_soon_after_a_failure(
    clock: Clock,
) -> None:
    some = servers(clock, "a", names=("host:1",))
    assert some.names_due() == ("host:1",)
    assert some.names_due() == ()
    some.resolved("host:1", ["b", "c"])
    assert some.idle_gone() == []
    assert [member.address for member in some.members] == ["a", "b", "c"]
    running = some.choose(unusable={"a", "b"})
    assert running is not None
    # One that is gone is given no jobs, and closed when it has none.
    some.resolved("host:1", ["b", "d"])
    assert some.idle_gone() == []
    assert [member.address for member in some.members] == ["a", "b", "d"]
    some.release(running)
    some.resolved("host:1", ["d"])
    assert some.idle_gone() == ["client of b", "client of c"]
    clock.now += RESOLVED_S - 5
    assert some.names_due() == ()
    some.record_failure(some.members[0], LOST)
    clock.now += SOON_S
    assert some.names_due() == ("host:1",)
    some.not_resolved("host:1", OSError(1, "nobody knows"))
    assert [member.address for member in some.members] == ["a", "d"]
    assert "nobody knows" in str(some.unresolved()["host:1"])


def test_the_error_of_none_names_each_and_passes_if_one_does() -> None:
    final = gradwire.ContractError("another contract")
    error = none_left({"a": LOST, "b": final})
    assert (
        str(error)
        == "none of the 2 servers is available: a: broke; b: another contract"
    )
    assert error.status is StatusCode.UNAVAILABLE
    error = none_left({"b": final})
    assert str(error) == "the server is not available: b: another contract"
    assert error.status is None


def test_addresses_are_taken_apart() -> None:
    parsed = parse_addresses(["a:1", "dns:///b:2", "a:1", "unix:/c"])
    assert parsed.known == ("a:1", "unix:/c")
    assert parsed.names == ("b:2",)
    assert not parse_addresses("a:1").several
    assert parse_addresses("dns:///a:1").several
    found: Any = [(0, 0, 0, "", ("::1", 7, 0, 0)), (0, 0, 0, "", ("1.2.3.4", 7))] * 2
    assert addresses_of(7, found) == ["[::1]:7", "1.2.3.4:7"]


def test_jobs_of_late_servers_go_on_elsewhere_at_once_and_without_budget() -> None:
    attempts = Attempts(Retries(RetryPolicy(attempts=1, budget=0)), None)
    assert attempts.after(overtaken_error("a")) == 0
    assert attempts.after(overtaken_error("b")) == 0
