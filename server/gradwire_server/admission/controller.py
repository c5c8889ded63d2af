"""Who may run: jobs by the bytes that they reserve, tenants in turn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from gradwire_protocol.error_reasons import Reason
from gradwire_server.admission.ledger import Ledger
from gradwire_server.admission.queue import Queue
from gradwire_server.admission.quota import (
    CALL_BYTES,
    RETRY_AFTER_S,
    Quota,
    Waiting,
    draining,
)
from gradwire_server.admission.tenancy import Limits
from gradwire_server.errors import JobError
from gradwire_server.scheduling.device_selector import DeviceSelector, Load

__all__ = ["CALL_BYTES", "RETRY_AFTER_S", "Admission"]


class Admission:
    """The memory and the turns of one server.

    A tenant's jobs are admitted first come, first served, and tenants in turn.
    A large job whose turn has come and that waits for memory is not overtaken
    for ever by small ones that would fit; one that waits because its tenant
    has all that it may have lets other tenants by.

    Args:
        memory_limit: Most bytes that jobs and open calls may hold.
        max_jobs: Most jobs that run at once.
        max_queue: Most jobs that wait.
        lanes: Where they run.
        limits_of: What a tenant may have of all this; None where all callers
            are one tenant, who may have it all.
    """

    def __init__(
        self,
        memory_limit: int,
        max_jobs: int,
        max_queue: int,
        devices: DeviceSelector,
        limits_of: Callable[[str], Limits] | None = None,
    ) -> None:
        self.devices = devices
        self.memory_limit = memory_limit
        self._ledger = Ledger(
            Limits(max_jobs, None, max_queue), memory_limit, limits_of
        )
        self._all = self._ledger.everybody
        self._queue = Queue(self._all)
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def running(self) -> int:
        """Jobs that run."""
        return self._all.running

    @property
    def held_bytes(self) -> int:
        """What jobs and open calls hold."""
        return self._ledger.held_bytes

    @property
    def draining(self) -> bool:
        """Whether new jobs are refused for good."""
        return self._draining

    def limits(self, tenant: str = "") -> Limits:
        """The most that a tenant can have of this server."""
        return self._ledger.limits(tenant)

    def max_calls_bytes(self, tenant: str = "") -> int:
        """The most bytes that a tenant's open calls can hold."""
        return self._ledger.max_calls_bytes(tenant)

    def drain(self) -> None:
        """Refuses every job that is not running, now and from now on."""
        self._draining = True
        for waiting in self._queue:
            self._refuse(waiting, draining())

    async def wait_idle(self) -> None:
        """Waits until no job runs."""
        await self._idle.wait()

    @contextmanager
    def call(
        self, size_bytes: int = CALL_BYTES, tenant: str = "", *, spare_bytes: int = 0
    ) -> Iterator[None]:
        """Holds what an open call takes, whatever it will ask for.

        Args:
            size_bytes: That, or what the call holds for its client beside it.
            tenant: Whose it is.
            spare_bytes: What must be left beside it.

        Raises:
            JobError: The server drains, or has no memory for one more call.
        """
        account = self._ledger.open(tenant)
        refusal = self._refusal_of_call(size_bytes + spare_bytes, account)
        if refusal is not None:
            self._ledger.close(account)
            raise refusal
        holders = self._ledger.hold_call(size_bytes, account)
        try:
            yield
        finally:
            self._release_call(size_bytes, account, holders)

    @asynccontextmanager
    async def job(
        self,
        size_bytes: int,
        load: Load,
        on_wait: Callable[[int], Awaitable[None]],
        tenant: str = "",
    ) -> AsyncIterator[int]:
        """Waits for a job's turn and holds its memory while it runs.

        Its turn has come when it is the first of its tenant, it is the
        tenant's turn, and there are memory, a place, and a lane whose device
        has memory for it.

        Args:
            size_bytes: What the job reserves of the host's memory.
            load: What it is for the lane that it will run on.
            on_wait: Told how many jobs are ahead, first and at each change.
            tenant: Whose it is.

        Yields:
            The position of its lane.

        Raises:
            JobError: The job is larger than this server or its tenant can
                ever hold, the queue is full, or the server drains.
        """
        waiting = Waiting(self._ledger.open(tenant), size_bytes, load)
        try:
            position = await self._admit(waiting, on_wait)
            try:
                yield position
            finally:
                self._leave(waiting, position)
        finally:
            self._ledger.close(waiting.account)

    def _refusal_of_call(self, size_bytes: int, account: Quota) -> JobError | None:
        if self._draining:
            return draining()
        return self._ledger.check_call(size_bytes, account)

    def _release_call(
        self, size_bytes: int, account: Quota, holders: tuple[Quota, ...]
    ) -> None:
        self._ledger.release_call(size_bytes, account, holders)
        self._admit_waiting()

    async def _admit(
        self, waiting: Waiting, on_wait: Callable[[int], Awaitable[None]]
    ) -> int:
        account = waiting.account
        for each in (self._all, account):
            refusal = each.check_job(waiting.size_bytes)
            if refusal is not None:
                raise refusal
        self._require_device(waiting.load.device_bytes)
        if self._draining:
            raise draining()
        self._queue.add(waiting)
        self._admit_waiting()
        if waiting.position is not None:
            return waiting.position
        for each in (account, self._all):
            refusal = each.check_wait(waiting.size_bytes)
            if refusal is not None:
                self._queue.remove(waiting)
                raise refusal
        if account.overfull:
            self._refuse(waiting, account.no_place())
        elif self._all.overfull:
            self._refuse(self._queue.one_too_many(), self._all.no_place())
        try:
            return await self._wait_turn(waiting, on_wait)
        except BaseException:
            self._withdraw(waiting)
            raise

    def _require_device(self, size_bytes: int) -> None:
        most = self.devices.max_bytes
        if most is not None and size_bytes > most:
            raise JobError(
                Reason.JOB_TOO_LARGE,
                f"the job would hold {size_bytes} bytes of a device's memory: this "
                f"server has a device that allows {most}, and none that allows more",
                field="job",
            )

    async def _wait_turn(
        self, waiting: Waiting, on_wait: Callable[[int], Awaitable[None]]
    ) -> int:
        told = -1
        while waiting.position is None:
            if waiting.refused is not None:
                raise waiting.refused
            waiting.moved.clear()
            ahead = self.running + self._queue.ahead_of(waiting)
            if ahead != told:
                told = ahead
                await on_wait(ahead)
            else:
                await waiting.moved.wait()
        return waiting.position

    def _refuse(self, waiting: Waiting, refusal: JobError) -> None:
        self._queue.remove(waiting)
        waiting.refused = refusal
        waiting.moved.set()

    def _withdraw(self, waiting: Waiting) -> None:
        """Takes a job that will not run out of the queue, or out of its place."""
        if waiting.position is not None:
            self._leave(waiting, waiting.position)
        elif waiting in self._queue:
            self._queue.remove(waiting)
            self._admit_waiting()

    def _leave(self, waiting: Waiting, position: int) -> None:
        self.devices.release(waiting.load, position)
        for each in (waiting.account, self._all):
            each.running -= 1
            each.held_bytes -= waiting.size_bytes
        if not self.running:
            self._idle.set()
        self._admit_waiting()

    def _admit_waiting(self) -> None:
        if not self._queue:
            return
        while self._admit_next():
            pass
        for waiting in self._queue:
            waiting.moved.set()

    def _admit_next(self) -> bool:
        """Lets the job whose turn it is run; whether there may be another."""
        for first in self._queue.firsts():
            account = first.account
            self._ledger.renew(account)
            too_large = account.check_job(first.size_bytes)
            if too_large is not None:  # since its tenant was given less
                self._refuse(first, too_large)
                return True
            if not account.has_room(first.size_bytes):
                continue  # nobody but its own tenant stands in its way
            if not self._all.has_room(first.size_bytes):
                return False
            first.position = self.devices.assign(first.load)
            if first.position is None:
                return False
            self._queue.take_turn(first)
            for each in (account, self._all):
                each.held_bytes += first.size_bytes
                each.running += 1
            self._idle.clear()
            first.moved.set()
            return True
        return False
