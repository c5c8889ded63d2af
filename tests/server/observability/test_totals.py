"""Counts of calls, where no client can tell them."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import textwrap

import pytest

from gradwire_protocol.error_reasons import Reason
from gradwire_server.api.call_state import CallState
from gradwire_server.errors import ListenError
from gradwire_server.observability.figures import BOUNDS_S, CallKey, JobKey
from gradwire_server.observability.totals import MOST_TENANTS, OTHER_TENANTS, Totals
from gradwire_server.settings import Settings


def call(tenant: str = "", received: int = 0, **fields: object) -> CallState:
    made = CallState("Compute", "tcp", tenant=tenant)
    made.progress.bytes_received = received
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def test_any_number_of_tenants_has_a_bounded_number_of_series() -> None:
    totals = Totals(tenants=True)
    for number in range(MOST_TENANTS + 10):
        one = call(f"tenant-{number}", received=3)
        totals.began(one)
        totals.ended(one, None)
    still_open = call("one more", received=4)
    totals.began(still_open)
    found = totals.figures().tenants
    assert found is not None
    assert len(found) == MOST_TENANTS + 1
    assert found["tenant-0"].bytes.received == 3
    assert found[OTHER_TENANTS].succeeded == 10
    assert found[OTHER_TENANTS].bytes.received == 10 * 3 + 4


def test_calls_that_run_add_no_more_series_than_those_that_have_ended() -> None:
    totals = Totals(tenants=True)
    for number in range(MOST_TENANTS + 10):
        totals.began(call(f"tenant-{number}", received=3))
    found = totals.figures().tenants
    assert found is not None
    assert len(found) == MOST_TENANTS + 1
    assert sum(each.bytes.received for each in found.values()) == 3 * (
        MOST_TENANTS + 10
    )


def test_every_limit_of_the_settings_is_counted_from_0_on() -> None:
    of_calls = ("max_jobs", "max_queue", "memory_limit", "keep_limit", "max_sessions")
    limits = {
        each.name
        for each in dataclasses.fields(Settings)
        if each.name.removeprefix("tenant_") in of_calls
    }
    assert "tenant_max_sessions" in limits
    limits |= {"device_memory_limit", "sessions", "regions"}
    assert limits <= set(Totals().figures().refusals)


def test_sessions_that_fail_by_the_servers_fault_are_counted_from_0_on() -> None:
    found = Totals().figures().others
    for method in ("Step", "SaveSession"):
        assert found[CallKey(method, Reason.STATE_NOT_SAVED)] == 0
        assert found[CallKey(method, Reason.UNFORESEEN)] == 0


def test_what_a_call_has_moved_counts_once_before_its_end_and_after() -> None:
    totals = Totals()
    one, other = call(received=5), call(received=7)
    for each in (one, other):
        totals.began(each)
    for reason in (None, Reason.JOB_CANCELLED):
        assert sum(b.received for b in totals.figures().bytes.values()) == 12
        totals.ended(one if reason is None else other, reason)
    figures = totals.figures()
    assert sum(b.received for b in figures.bytes.values()) == 12
    assert figures.jobs[JobKey("Compute", "tcp", Reason.JOB_CANCELLED)] == 1


@pytest.mark.parametrize("position", range(len(BOUNDS_S)))
def test_a_time_counts_up_to_and_with_the_bound_that_it_reaches(position: int) -> None:
    totals = Totals()
    bound = BOUNDS_S[position]
    for waited_s in (bound, bound * 1.0001):
        totals.ended(call(admitted=True, waited_s=waited_s), None)
    wait = totals.figures().stages["Compute"].wait
    assert wait.counts[position : position + 2] == (1, 1)
    assert sum(wait.counts) == 2


def test_a_server_without_metrics_does_not_import_prometheus_client() -> None:
    script = """
        import sys
        from gradwire_server import ListenError, Settings, start_in_thread
        assert "prometheus_client" not in sys.modules
        settings = {"listen": ("127.0.0.1:0",), "backend": "numpy"}
        with start_in_thread(Settings(**settings)):
            assert "prometheus_client" not in sys.modules
        sys.modules["prometheus_client"] = None  # as if it were not installed
        try:
            with start_in_thread(Settings(**settings, metrics_listen="0")):
                pass
        except ListenError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "metrics_listen is set, and prometheus-client cannot be" in done.stdout
    assert "install gradwire[server]" in done.stdout, done.stderr
    assert issubclass(ListenError, OSError)
