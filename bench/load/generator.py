"""Load generator: concurrent calls and their outcomes.

In a closed loop, a fixed number of callers call again as soon as they have an answer.
It measures a server's capacity, but not how long users wait, because a slow server
receives fewer calls. In an open loop, calls start by the clock (a Poisson process),
regardless of earlier calls, and are timed from their due time: delays behind a slow
call count.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

import gradwire

OK = "OK"
PERCENTILES = (50.0, 90.0, 99.0, 99.9)

Call: TypeAlias = Callable[[], Awaitable[object]]


@dataclass(frozen=True)
class Kind:
    """One kind of call.

    Attributes:
        name: Name in tables.
        weight: Relative frequency.
        call: Makes one call.
    """

    name: str
    weight: float
    call: Call


@dataclass(frozen=True, slots=True)
class Made:
    """A finished call; times are seconds since the start of the load."""

    kind: str
    due_s: float
    """When the call was due."""
    began_s: float
    """When the call started: later than due if this process was busy."""
    ended_s: float
    status: str = OK
    reason: str = ""
    """Why the call failed: the server's reason, or else the exception."""
    retry_after_s: float | None = None
    """The server's retry time in seconds."""

    @property
    def latency_s(self) -> float:
        """The user's waiting time, from the call's due time."""
        return self.ended_s - self.due_s


class Load:
    """Makes calls of a mix of kinds.

    Args:
        mix: The kinds.
        seed: Seed for the kind and the due time of each call.
        most_outstanding: Most concurrent calls. Further due calls are skipped and
            counted in `left_out`: an unlimited load would measure its own memory.
    """

    def __init__(
        self, mix: Sequence[Kind], *, seed: int = 0, most_outstanding: int = 2000
    ) -> None:
        self._mix = mix
        self._random = np.random.default_rng(seed)
        total = sum(kind.weight for kind in mix)
        self._odds = [kind.weight / total for kind in mix]
        self._most_outstanding = most_outstanding
        self.left_out = 0

    async def closed(self, callers: int, seconds: float) -> list[Made]:
        """Run a closed loop of `callers` callers for `seconds`."""
        start = time.perf_counter()
        made: list[Made] = []

        async def ask() -> None:
            while (now := time.perf_counter() - start) < seconds:
                made.append(await _make(self._pick(), now, start))

        async with asyncio.TaskGroup() as group:
            for _ in range(callers):
                group.create_task(ask())
        return made

    async def open(self, rate: float, seconds: float) -> list[Made]:
        """Run an open loop of `rate` calls a second; return when all have ended."""
        start = time.perf_counter()
        made: list[Made] = []
        outstanding: set[asyncio.Task[Made]] = set()

        def ended(task: asyncio.Task[Made]) -> None:
            outstanding.discard(task)
            if not task.cancelled() and task.exception() is None:
                made.append(task.result())

        async with asyncio.TaskGroup() as group:
            for due in self._arrivals(rate, seconds):
                await asyncio.sleep(due - (time.perf_counter() - start))
                if len(outstanding) >= self._most_outstanding:
                    self.left_out += 1
                    continue
                task = group.create_task(_make(self._pick(), due, start))
                outstanding.add(task)
                task.add_done_callback(ended)
        return made

    def _pick(self) -> Kind:
        return self._mix[self._random.choice(len(self._mix), p=self._odds)]

    def _arrivals(self, rate: float, seconds: float) -> Iterator[float]:
        due = 0.0
        while (due := due + self._random.exponential(1 / rate)) < seconds:
            yield due


async def _make(kind: Kind, due: float, start: float) -> Made:
    began = time.perf_counter() - start
    status, reason, retry_after_s = OK, "", None
    try:
        await kind.call()
    except gradwire.GradwireError as error:
        status = error.status.name if error.status else "NONE"
        reason = error.reason or type(error).__name__
        retry_after_s = error.retry_after_s
    ended = time.perf_counter() - start
    return Made(kind.name, due, began, ended, status, reason, retry_after_s)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The calls of one kind with the same outcome. Times are in seconds."""

    call: str
    status: str
    reason: str
    count: int
    percentiles_s: dict[str, float]
    """Latencies from the due time, by percentile."""
    max_s: float


def outcomes(made: Sequence[Made]) -> list[Outcome]:
    """Outcomes of calls, by kind and in total."""
    groups: dict[tuple[str, str, str], list[float]] = {}
    for one in made:
        for call in (one.kind, "all"):
            groups.setdefault((call, one.status, one.reason), []).append(one.latency_s)
    return [
        Outcome(
            *key,
            count=len(latencies),
            percentiles_s={
                f"p{percentile:g}": float(value)
                for percentile, value in zip(
                    PERCENTILES, np.percentile(latencies, PERCENTILES), strict=True
                )
            },
            max_s=max(latencies),
        )
        for key, latencies in sorted(groups.items())
    ]


def endings(made: Sequence[Made]) -> Counter[str]:
    """Number of calls by status and reason: ``OK``, ``X/BUSY``."""
    return Counter(f"{m.status}/{m.reason}" if m.reason else m.status for m in made)


def rate_of(made: Sequence[Made]) -> float:
    """Successful calls a second."""
    done = [one.ended_s for one in made if one.status == OK]
    return len(done) / max(done) if done else 0.0
