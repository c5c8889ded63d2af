"""A lane: one device, the one thread that talks to it, and fair turns.

The unit of scheduling is a row block, not a job: a lane takes one piece of
work from each tenant that has some, in turn, and from each of its jobs in
turn, so that a small job never waits for a large one to end, nor a tenant
with one job for another's thousand. Tenants whose pieces take longer have fewer
turns (`fair_queue`). It never waits for bytes or for a reader: only work whose
operands are complete is handed to it.

A device that works beside the lane's thread is given more row blocks while
it has some: the lane waits for the first of them when there is nothing more
to begin, or when the device has enough.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from gradwire_server.backends.base import Wait
from gradwire_server.scheduling.fair_queue import FairQueue

T = TypeVar("T")

_log = logging.getLogger("gradwire_server")


@dataclass(slots=True, eq=False)
class _Work:
    tenant: str
    job: Hashable
    run: Callable[[], Any]
    done: asyncio.Future[Any]
    loop: asyncio.AbstractEventLoop
    begins: bool
    """Whether `run` says what to wait for."""
    begun_at: float = 0.0


def _nothing() -> None:
    pass


class DeviceWorker:
    """A thread that does the work of many jobs, one piece of each in turn.

    Args:
        device: Number of the device of its backend.
        enter: What its thread does first.
        most_begun: Most pieces that have begun and were not waited for.

    Attributes:
        device: See there.
        most_begun: See there.
    """

    def __init__(
        self,
        device: int,
        enter: Callable[[], None] = _nothing,
        max_in_flight: int = 1,
    ) -> None:
        self.device = device
        self._enter = enter
        self.max_in_flight = max_in_flight
        self._queue: FairQueue[_Work] = FairQueue()
        self._doing: list[Hashable] = []
        """Jobs of the piece that is being done, and of those that have begun."""
        self._finished_at = 0.0
        """When the last piece was done: what began before began its work then."""
        self._closed = False
        self._entered: Future[None] = Future()
        self._changed = threading.Condition()
        self._thread = threading.Thread(
            target=self._serve, name=f"gradwire-lane-{device}", daemon=True
        )
        self._thread.start()

    async def entered(self) -> None:
        """Waits until the thread has begun.

        Raises:
            Exception: What `enter` raised; then the lane does no work.
        """
        await asyncio.wrap_future(self._entered)

    def of(self, tenant: str) -> TenantHandle:
        """The lane as the jobs of a tenant see it."""
        return TenantHandle(self, tenant)

    async def _discard(self, tenant: str, job: Hashable) -> None:
        with self._changed:
            for work in self._queue.drop(tenant, job):
                work.done.cancel()
            if job not in self._doing:
                return
        idle = asyncio.get_running_loop().run_in_executor(None, self._wait_idle, job)
        cancelled: asyncio.CancelledError | None = None
        while not idle.done():
            try:
                await asyncio.shield(idle)
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            raise cancelled

    def close(self) -> None:
        """Ends the thread after the work that it is doing."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _put(
        self, tenant: str, job: Hashable, run: Callable[[], Any], *, begins: bool
    ) -> asyncio.Future[Any]:
        loop = asyncio.get_running_loop()
        work = _Work(tenant, job, run, loop.create_future(), loop, begins)
        with self._changed:
            if self._closed:
                raise RuntimeError("the lane is closed")
            self._queue.put(tenant, job, work)
            self._changed.notify_all()
        return work.done

    def _wait_idle(self, job: Hashable) -> None:
        with self._changed:
            self._changed.wait_for(lambda: job not in self._doing)

    def _serve(self) -> None:
        try:
            self._enter()
        except Exception as error:  # noqa: BLE001 - told to who waits for it
            self._entered.set_exception(error)
            return
        self._entered.set_result(None)
        begun: deque[tuple[_Work, Wait]] = deque()
        while self._begin_next(begun) or begun:
            if begun and (len(begun) == self.max_in_flight or not self._queue):
                self._end(*begun.popleft())

    def _begin_next(self, begun: deque[tuple[_Work, Wait]]) -> bool:
        """Does the next piece, or begins it; whether there was one.

        Nothing here keeps the piece, which would hold a job's memory.
        """
        work = self._next(at_once=bool(begun))
        if work is None:
            return False
        wait = self._do(work)
        if wait is not None:
            begun.append((work, wait))
        return True

    def _next(self, *, at_once: bool) -> _Work | None:
        """The next piece; None: there is none now, or there will be none."""
        with self._changed:
            if not at_once:
                self._changed.wait_for(lambda: self._closed or self._queue)
            if self._closed or not self._queue:
                return None
            work = self._queue.take()
            work.begun_at = time.perf_counter()
            self._doing.append(work.job)
            return work

    def _do(self, work: _Work) -> Wait | None:
        """Does a piece.

        Returns:
            What is to be waited for; None: nothing is, and who waits for the
            piece was told.
        """
        try:
            result = work.run()
        except Exception as error:  # noqa: BLE001 - the job handles it
            self._settle(work, None, error)
            return None
        if work.begins and result is not None:
            wait: Wait = result
            return wait
        self._settle(work, result, None)
        return None

    def _end(self, work: _Work, wait: Wait) -> None:
        try:
            wait()
        except Exception as error:  # noqa: BLE001 - the job handles it
            self._settle(work, None, error)
        else:
            self._settle(work, None, None)

    def _settle(self, work: _Work, result: object, error: Exception | None) -> None:
        now = time.perf_counter()
        with self._changed:
            self._queue.charge(work.tenant, now - max(work.begun_at, self._finished_at))
            self._finished_at = now
            self._doing.remove(work.job)
            self._changed.notify_all()

        def settle() -> None:
            if work.done.done():
                return
            if error is not None:
                work.done.set_exception(error)
                # A job that an earlier piece has ended does not ask any more,
                # and asyncio would log that nobody did.
                work.done.exception()
            else:
                work.done.set_result(result)

        try:
            work.loop.call_soon_threadsafe(settle)
        except RuntimeError:
            _log.debug("a result came after its event loop was closed")


class TenantHandle:
    """A lane as the jobs of one tenant see it.

    Args:
        lane: The lane.
        tenant: Whose turn it is when its work is done.
    """

    def __init__(self, worker: DeviceWorker, tenant: str) -> None:
        self.device = worker.device
        self.max_in_flight = worker.max_in_flight
        self._worker = worker
        self._tenant = tenant

    def submit(self, job: Hashable, run: Callable[[], T]) -> asyncio.Future[T]:
        """Does `run` when it is the job's turn, after the job's earlier work.

        What that has begun need not be done by then.

        Returns:
            A future of the calling event loop with what `run` returns or
            raises.
        """
        return self._worker._put(self._tenant, job, run, begins=False)

    def begin(
        self, job: Hashable, run: Callable[[], Wait | None]
    ) -> asyncio.Future[None]:
        """As `submit`, for work that may only have begun when `run` returns.

        Returns:
            A future of the calling event loop, done when the work is, with
            what `run` or the wait that it returns raises.
        """
        return self._worker._put(self._tenant, job, run, begins=True)

    async def discard(self, job: Hashable) -> None:
        """Drops the job's waiting work and waits for what is being done.

        When this returns, the lane and its device touch nothing of the job
        any more. It takes at most as long as the pieces that have begun, and
        finishes even if the caller is cancelled meanwhile.
        """
        await self._worker._discard(self._tenant, job)
