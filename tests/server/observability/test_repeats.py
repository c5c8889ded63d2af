"""Of lines that repeat, the first ones are written, and the others counted."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
from collections.abc import Callable

import pytest

from gradwire_protocol.error_reasons import Reason
from gradwire_server.observability.access_log import AccessLog
from gradwire_server.observability.repeats import Repeats


class Clock:
    """A clock that a test turns, with an event loop's `call_later`."""

    def __init__(self) -> None:
        self.now = 0.0
        self._order = itertools.count()
        self._due: list[tuple[float, int, asyncio.TimerHandle]] = []

    def call_later(
        self, delay: float, callback: Callable[[], object]
    ) -> asyncio.TimerHandle:
        loop = asyncio.get_running_loop()
        timer = asyncio.TimerHandle(self.now + delay, callback, (), loop)
        heapq.heappush(self._due, (self.now + delay, next(self._order), timer))
        return timer

    def turn_to(self, now: float) -> None:
        while self._due and self._due[0][0] <= now:
            self.now, _, timer = heapq.heappop(self._due)
            if not timer.cancelled():
                timer._run()
        self.now = now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def told() -> list[tuple[str, int]]:
    return []


@pytest.fixture
def repeats(clock: Clock, told: list[tuple[str, int]]) -> Repeats[str]:
    made: Repeats[str] = Repeats(3, 10.0, clock.call_later)
    made.tell = lambda kind, count: told.append((kind, count))
    return made


async def test_the_first_of_a_window_are_allowed_and_the_others_told_at_its_end(
    repeats: Repeats[str], clock: Clock, told: list[tuple[str, int]]
) -> None:
    assert [repeats.allows("a") for _ in range(5)] == [True] * 3 + [False] * 2
    clock.turn_to(9.9)
    assert not repeats.allows("a")
    assert told == []
    clock.turn_to(10.0)
    assert told == [("a", 3)]
    clock.turn_to(25.0)
    assert [repeats.allows("a") for _ in range(4)] == [True] * 3 + [False]
    clock.turn_to(34.9)
    assert told == [("a", 3)]
    clock.turn_to(35.0)
    assert told == [("a", 3), ("a", 1)]


async def test_kinds_count_apart_and_a_few_are_not_told_of(
    repeats: Repeats[str], clock: Clock, told: list[tuple[str, int]]
) -> None:
    assert all(repeats.allows("b") for _ in range(3))
    clock.turn_to(5.0)
    assert [repeats.allows("a") for _ in range(4)] == [True] * 3 + [False]
    clock.turn_to(100.0)
    assert told == [("a", 1)]


async def test_closing_tells_what_no_window_has_told_yet(
    repeats: Repeats[str], clock: Clock, told: list[tuple[str, int]]
) -> None:
    for _ in range(7):
        repeats.allows("a")
    repeats.allows("b")
    repeats.close()
    assert told == [("a", 4)]
    clock.turn_to(100.0)
    assert told == [("a", 4)]


async def test_the_log_says_how_many_more_calls_ended_how(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    log = AccessLog(Repeats(2, 10.0, clock.call_later))
    for number in range(3592):
        log.credentials_refused(f"/method{number}", "ipv4:1", "no credentials")
    clock.turn_to(10.0)
    assert [record.getMessage() for record in caplog.records] == [
        "refused",
        "refused",
        "and 3,590 more calls ended with CREDENTIALS_INVALID in the last 10 s",
    ]
    last = vars(caplog.records[-1])
    assert last["levelno"] == logging.WARNING
    assert last["reason"] == Reason.CREDENTIALS_INVALID
    assert last["outcome"] == "UNAUTHENTICATED"
    assert last["more_calls"] == 3590
