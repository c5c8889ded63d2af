"""Clocks that jump: what is measured here is measured by clocks that do not.

Waits, deadlines and idle times are asyncio's and gRPC's, which go by the
monotonic clock, and what is told in seconds by `time.perf_counter`.
"""

from __future__ import annotations

import ast
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import gradwire
from tests.thorough.faults.conftest import Watched, connected, watched_server
from tests.thorough.faults.jobs import JOBS, W, bits, compute, parts
from tests.thorough.faults.table import FAULTS

ROOT = Path(__file__).parents[3]
IDLE_S = 0.5
WALL_CLOCKS = {
    *(f"time.{name}" for name in ("time", "time_ns", "localtime", "gmtime")),
    *(f"datetime.datetime.{name}" for name in ("now", "utcnow", "today")),
    "datetime.date.today",
}
MAY_READ_THE_CALENDAR = {
    "cli/gradwire_cli/commands/token.py",  # when a token was made
    "cli/gradwire_cli/certificate_authority.py",  # from when a certificate is good
    "client/gradwire/_transport/grpc/grpc_errors.py",  # whether one is good already
    "server/gradwire_server/observability/call_spans.py",  # spans have dates
    "server/gradwire_server/sessions/state_files.py",  # how old a file is
}


@pytest.fixture(scope="module")
def jumping() -> Iterator[Watched]:
    with watched_server(clock_jumps=True, idle_timeout=IDLE_S) as one:
        yield one


def test_nothing_but_dates_of_credentials_is_read_off_a_wall_clock() -> None:
    readers = set()
    for root in ("cli", "client", "protos", "server"):
        for path in (ROOT / root).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and ast.unparse(node) in WALL_CLOCKS:
                    readers.add(str(path.relative_to(ROOT)))
    assert readers == MAY_READ_THE_CALENDAR


def test_jobs_have_the_same_bits_while_the_servers_clock_jumps(
    jumping: Watched, watched: Watched
) -> None:
    with (
        connected(jumping.process.address, timeout_s=20) as client,
        connected(watched.process.address) as other,
    ):
        for job in FAULTS["clock-jumps"].cases(list(JOBS), "every"):
            assert bits(compute(client, job), job) == bits(compute(other, job), job)
    jumping.assert_clean()


def test_a_client_is_idle_after_the_idle_time_and_no_sooner(jumping: Watched) -> None:
    def slow():
        yield next(parts())
        time.sleep(20 * IDLE_S)

    with connected(jumping.process.address) as client:
        began = time.monotonic()
        with (
            pytest.raises(gradwire.ClientIdleError),
            client.stream(slow(), W) as stream,
        ):
            list(stream)
        assert IDLE_S <= time.monotonic() - began < 10 * IDLE_S
    jumping.assert_clean()


def test_a_deadline_passes_when_it_should(jumping: Watched) -> None:
    def endless():
        while True:
            yield next(parts())
            time.sleep(IDLE_S / 10)

    with connected(jumping.process.address) as client:
        began = time.monotonic()
        with (
            pytest.raises(gradwire.DeadlineError),
            client.stream(endless(), W, timeout_s=1) as stream,
        ):
            list(stream)
        assert 0.9 < time.monotonic() - began < 10
    jumping.assert_clean()
