"""Who may run: jobs by the bytes that they reserve, in the order they came."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from gradwire.wire.limits import MIB
from gradwire.wire.reasons import Reason
from gradwire_server.errors import JobError
from gradwire_server.lanes import Lanes, Load

CALL_BYTES = 2 * MIB
"""What an open call holds before its job is admitted: what gRPC takes in
from its client while nobody reads."""

RETRY_AFTER_S = 1.0
"""When a refused caller may try again: jobs come and go within seconds."""


@dataclass(eq=False, slots=True)
class _Waiting:
    size_bytes: int
    load: Load
    moved: asyncio.Event = field(default_factory=asyncio.Event)
    lane: int | None = None
    """Position of the lane that the job was given; None before it may run."""
    refused: JobError | None = None


class Admission:
    """The memory and the turns of one server.

    Jobs are admitted first come, first served: a large job that waits for
    memory is not overtaken for ever by small ones that would fit. Open calls
    never hold so much that a waiting job could not run when all running ones
    have ended: those who wait would wait for each other.

    Args:
        memory_limit: Most bytes that jobs and open calls may hold.
        max_jobs: Most jobs that run at once.
        max_queue: Most jobs that wait.
        lanes: Where they run.
    """

    def __init__(
        self, memory_limit: int, max_jobs: int, max_queue: int, lanes: Lanes
    ) -> None:
        self.lanes = lanes
        self.memory_limit = memory_limit
        self.max_jobs = max_jobs
        self.max_queue = max_queue
        self.running = 0
        self.held_bytes = 0
        """What jobs and open calls hold."""
        self._calls_bytes = 0
        self._joins = 0
        self._guests = 0
        self._queue: deque[_Waiting] = deque()
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def draining(self) -> bool:
        """Whether new jobs are refused for good."""
        return self._draining

    def drain(self) -> None:
        """Refuses every job that is not running, now and from now on."""
        self._draining = True
        while self._queue:
            waiting = self._queue.popleft()
            waiting.refused = _draining()
            waiting.moved.set()

    async def wait_idle(self) -> None:
        """Waits until no job runs."""
        await self._idle.wait()

    @contextmanager
    def joins(self, count: int) -> Iterator[None]:
        """Within this context so many calls may come that join a running job.

        The job has reserved what they take.
        """
        self._joins += count
        try:
            yield
        finally:
            self._joins -= count

    @contextmanager
    def call(self, size_bytes: int = CALL_BYTES) -> Iterator[None]:
        """Holds what an open call takes, whatever it will ask for.

        Args:
            size_bytes: That, or what the call holds for its client beside it.

        Raises:
            JobError: The server drains, or has no memory for one more call.
        """
        refusal = self._refusal(size_bytes)
        if refusal is not None:
            raise refusal
        self._calls_bytes += size_bytes
        self.held_bytes += size_bytes
        try:
            yield
        finally:
            self._calls_bytes -= size_bytes
            self._give_back(size_bytes)

    @contextmanager
    def call_that_may_join(self) -> Iterator[JobError | None]:
        """As `call`, for one whose first message may say that it joins a job.

        Yields:
            None, or why there is no place for the call unless it does join
            one: no more are let in to say so than running jobs expect.

        Raises:
            JobError: There is no place for the call, and none is expected.
        """
        refusal = self._refusal(CALL_BYTES)
        if refusal is None:
            with self.call():
                yield None
            return
        if self._guests >= self._joins:
            raise refusal
        self._guests += 1
        try:
            yield refusal
        finally:
            self._guests -= 1

    def _refusal(self, size_bytes: int) -> JobError | None:
        if self._draining:
            return _draining()
        largest = max((waiting.size_bytes for waiting in self._queue), default=0)
        if (
            self.held_bytes + size_bytes > self.memory_limit
            or self._calls_bytes + size_bytes + largest > self.memory_limit
        ):
            return self._no_memory()
        return None

    @asynccontextmanager
    async def job(
        self, size_bytes: int, load: Load, on_wait: Callable[[int], Awaitable[None]]
    ) -> AsyncIterator[int]:
        """Waits for a job's turn and holds its memory while it runs.

        Its turn has come when it is first in the queue, and there are memory,
        a place, and a lane whose device has memory for it.

        Args:
            size_bytes: What the job reserves of the host's memory.
            load: What it is for the lane that it will run on.
            on_wait: Told how many jobs are ahead, first and at each change.

        Yields:
            The position of its lane.

        Raises:
            JobError: The job is larger than this server can ever hold, the
                queue is full, or the server drains.
        """
        lane = await self._admit(size_bytes, load, on_wait)
        try:
            yield lane
        finally:
            self._leave(size_bytes, load, lane)

    async def _admit(
        self, size_bytes: int, load: Load, on_wait: Callable[[int], Awaitable[None]]
    ) -> int:
        if size_bytes + CALL_BYTES > self.memory_limit:
            raise JobError(
                Reason.JOB_TOO_LARGE,
                f"the job would hold {size_bytes} bytes: this server has "
                f"{self.memory_limit}",
                field="job",
            )
        most = self.lanes.most_bytes
        if most is not None and load.device_bytes > most:
            raise JobError(
                Reason.JOB_TOO_LARGE,
                f"the job would hold {load.device_bytes} bytes of a device's memory: "
                f"this server has a device that allows {most}, and none that allows "
                f"more",
                field="job",
            )
        if self._draining:
            raise _draining()
        waiting = _Waiting(size_bytes, load)
        self._queue.append(waiting)
        self._admit_waiting()
        if waiting.lane is not None:
            return waiting.lane
        if self._calls_bytes + size_bytes > self.memory_limit:
            self._queue.remove(waiting)
            raise self._no_memory()
        if len(self._queue) > self.max_queue:
            self._queue.remove(waiting)
            raise _busy(
                f"{self.running} jobs run and {len(self._queue)} wait, of at most "
                f"{self.max_queue}"
            )
        try:
            return await self._wait_turn(waiting, on_wait)
        except BaseException:
            self._withdraw(waiting)
            raise

    async def _wait_turn(
        self, waiting: _Waiting, on_wait: Callable[[int], Awaitable[None]]
    ) -> int:
        told = -1
        while waiting.lane is None:
            if waiting.refused is not None:
                raise waiting.refused
            waiting.moved.clear()
            ahead = self.running + self._queue.index(waiting)
            if ahead != told:
                told = ahead
                await on_wait(ahead)
            else:
                await waiting.moved.wait()
        return waiting.lane

    def _withdraw(self, waiting: _Waiting) -> None:
        """Takes a job that will not run out of the queue, or out of its place."""
        if waiting.lane is not None:
            self._leave(waiting.size_bytes, waiting.load, waiting.lane)
        elif waiting in self._queue:
            self._queue.remove(waiting)
            self._admit_waiting()

    def _leave(self, size_bytes: int, load: Load, lane: int) -> None:
        self.lanes.take_away(load, lane)
        self.running -= 1
        if not self.running:
            self._idle.set()
        self._give_back(size_bytes)

    def _give_back(self, size_bytes: int) -> None:
        self.held_bytes -= size_bytes
        self._admit_waiting()

    def _admit_waiting(self) -> None:
        while self._queue and self._fits(self._queue[0].size_bytes):
            first = self._queue[0]
            first.lane = self.lanes.put(first.load)
            if first.lane is None:
                break
            self._queue.popleft()
            self.held_bytes += first.size_bytes
            self.running += 1
            self._idle.clear()
            first.moved.set()
        for waiting in self._queue:
            waiting.moved.set()

    def _no_memory(self) -> JobError:
        return _busy(
            f"open calls and running jobs hold {self.held_bytes} of "
            f"{self.memory_limit} bytes, and {len(self._queue)} jobs wait"
        )

    def _fits(self, size_bytes: int) -> bool:
        return (
            self.running < self.max_jobs
            and self.held_bytes + size_bytes <= self.memory_limit
        )


def _busy(why: str) -> JobError:
    return JobError(
        Reason.BUSY,
        f"the server is busy: {why}; try again in {RETRY_AFTER_S:g} s",
        retry_after_s=RETRY_AFTER_S,
    )


def _draining() -> JobError:
    return JobError(
        Reason.DRAINING, "the server is about to stop and takes no new jobs"
    )
