"""One device, the single thread that drives it, and fair scheduling of its work.

The unit of scheduling is a row block, not a job. The worker takes one piece of work
from each tenant in turn, and from each of a tenant's jobs in turn. A small job
therefore never waits for a large one to end, and a tenant with one job never waits for
another tenant's thousand. Tenants with longer pieces get fewer turns (`fair_queue`).
The worker never waits for bytes or for a reader: it receives only work with complete
operands.

An asynchronous device gets more row blocks while it is busy. The worker waits for the
oldest one when no work is queued or when enough is in flight.
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
from typing import Any, Protocol, TypeAlias, TypeVar

from gradwire_server.backends.base import Wait
from gradwire_server.scheduling.fair_queue import FairQueue

T = TypeVar("T")

_log = logging.getLogger("gradwire_server")


class _Outcome(Protocol):
    """Receives the result of a piece of work."""

    def settle(self, result: object, error: Exception | None) -> None:
        """Take the result or the error; called in the worker's thread."""

    def cancel(self) -> None:
        """Take that the work was dropped; called in the event loop."""


class _Future:
    """Settles a future in its event loop, unless it is cancelled by then."""

    __slots__ = ("_loop", "future")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Any] = self._loop.create_future()

    def settle(self, result: object, error: Exception | None) -> None:
        try:
            self._loop.call_soon_threadsafe(self._settle, result, error)
        except RuntimeError:
            _log.debug("a result came after its event loop was closed")

    def cancel(self) -> None:
        self.future.cancel()

    def _settle(self, result: object, error: Exception | None) -> None:
        future = self.future
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
            # Marks the error as retrieved: a job ended by an earlier error does not
            # await this future, and asyncio would log that.
            future.exception()
        else:
            future.set_result(result)


Then: TypeAlias = Callable[[Any, Exception | None], object]
"""Called with a result, or with an error, in the worker's thread. It must not raise."""


class _Callback:
    """Calls a function in the worker's thread."""

    __slots__ = ("_then",)

    def __init__(self, then: Then) -> None:
        self._then = then

    def settle(self, result: object, error: Exception | None) -> None:
        self._then(result, error)

    def cancel(self) -> None:
        """Call nothing."""


@dataclass(slots=True, eq=False)
class _Work:
    tenant: str
    job: Hashable
    run: Callable[[], Any]
    outcome: _Outcome
    begins: bool
    """Whether `run` may return a wait for asynchronous work."""
    begun_at: float = 0.0


def _closed_error() -> RuntimeError:
    return RuntimeError("the device worker is closed")


def _nothing() -> None:
    pass


class DeviceWorker:
    """A thread that runs the work of many jobs, one piece of each in turn.

    Args:
        device: Number of the device in its backend.
        enter: Called first in the thread.
        max_in_flight: Most pieces begun and not yet waited for.

    Attributes:
        device: Number of the device in its backend.
        max_in_flight: Most pieces begun and not yet waited for.
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
        """Jobs of the current piece and of the pieces in flight."""
        self.busy_s = 0.0
        """Seconds that it has worked: pieces in flight at once count once."""
        self._finished_at = 0.0
        """When the last piece finished. The time of a piece begun earlier counts from
        then."""
        self._closed = False
        self._entered: Future[None] = Future()
        self._changed = threading.Condition()
        self._thread = threading.Thread(
            target=self._serve, name=f"gradwire-device-{device}", daemon=True
        )
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether it works now."""
        return bool(self._doing)

    async def entered(self) -> None:
        """Wait until the thread has started.

        Raises:
            Exception: The error of `enter`. The worker is then closed.
        """
        await asyncio.wrap_future(self._entered)

    def of(self, tenant: str) -> TenantHandle:
        """Return a tenant's view of the worker."""
        return TenantHandle(self, tenant)

    async def _discard(self, tenant: str, job: Hashable) -> None:
        with self._changed:
            for work in self._queue.drop(tenant, job):
                work.outcome.cancel()
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
        """Finish the work in progress, fail the queued work, and end the thread."""
        self._refuse_work()
        self._thread.join()

    def _refuse_work(self) -> None:
        with self._changed:
            self._closed = True
            queued = self._queue.clear()
            self._changed.notify_all()
        for work in queued:
            work.outcome.settle(None, _closed_error())

    def _put(self, work: _Work) -> None:
        with self._changed:
            if self._closed:
                raise _closed_error()
            self._queue.put(work.tenant, work.job, work)
            self._changed.notify_all()

    def _wait_idle(self, job: Hashable) -> None:
        with self._changed:
            self._changed.wait_for(lambda: job not in self._doing)

    def _serve(self) -> None:
        try:
            self._enter()
        except Exception as error:  # noqa: BLE001 - `entered` raises it
            self._refuse_work()
            self._entered.set_exception(error)
            return
        self._entered.set_result(None)
        begun: deque[tuple[_Work, Wait]] = deque()
        while self._begin_next(begun) or begun:
            if begun and (len(begun) == self.max_in_flight or not self._queue):
                self._end(*begun.popleft())

    def _begin_next(self, begun: deque[tuple[_Work, Wait]]) -> bool:
        """Run or begin the next piece; return whether there was one.

        A method of its own, so that no local variable of the loop keeps a piece and its
        job's memory.
        """
        work = self._next(at_once=bool(begun))
        if work is None:
            return False
        wait = self._do(work)
        if wait is not None:
            begun.append((work, wait))
        return True

    def _next(self, *, at_once: bool) -> _Work | None:
        """Return the next piece; None if there is none now or the worker is closed."""
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
        """Run a piece.

        Returns:
            The wait for asynchronous work, or None if the piece is finished and its
            future is settled.
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
            took_s = now - max(work.begun_at, self._finished_at)
            self._queue.charge(work.tenant, took_s)
            self.busy_s += took_s
            self._finished_at = now
            self._doing.remove(work.job)
            self._changed.notify_all()
        work.outcome.settle(result, error)


class TenantHandle:
    """A device worker as seen by the jobs of one tenant.

    Args:
        worker: The device worker.
        tenant: The tenant charged for the work.
    """

    def __init__(self, worker: DeviceWorker, tenant: str) -> None:
        self.device = worker.device
        self.max_in_flight = worker.max_in_flight
        self._worker = worker
        self._tenant = tenant

    def submit(self, job: Hashable, run: Callable[[], T]) -> asyncio.Future[T]:
        """Run `run` when it is the job's turn, after the job's earlier work.

        Asynchronous work begun earlier may still be in flight then.

        Returns:
            A future of the calling event loop with the result or error of `run`.
        """
        outcome = _Future()
        self._put(job, run, outcome, begins=False)
        return outcome.future

    def begin(
        self, job: Hashable, run: Callable[[], Wait | None]
    ) -> asyncio.Future[None]:
        """Run `run` as `submit` does, for work still in flight when `run` returns.

        Returns:
            A future of the calling event loop, done when the work is. It raises the
            error of `run` or of the returned wait.
        """
        outcome = _Future()
        self._put(job, run, outcome, begins=True)
        return outcome.future

    def submit_then(self, job: Hashable, run: Callable[[], T], then: Then) -> None:
        """Run `run` as `submit` does, from any thread, and then call `then`."""
        self._put(job, run, _Callback(then), begins=False)

    def begin_then(
        self, job: Hashable, run: Callable[[], Wait | None], then: Then
    ) -> None:
        """Run `run` as `begin` does, from any thread, and then call `then`.

        `then` is called once the work is done, with no result.
        """
        self._put(job, run, _Callback(then), begins=True)

    async def discard(self, job: Hashable) -> None:
        """Drop the job's queued work and wait for its work in progress.

        Afterwards the worker and its device touch no memory of the job. The wait takes
        at most as long as the pieces in flight, and finishes even if the caller is
        cancelled.
        """
        await self._worker._discard(self._tenant, job)

    def _put(
        self,
        job: Hashable,
        run: Callable[[], Any],
        outcome: _Outcome,
        *,
        begins: bool,
    ) -> None:
        self._worker._put(_Work(self._tenant, job, run, outcome, begins))
