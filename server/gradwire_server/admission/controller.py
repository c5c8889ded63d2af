"""Admission control: jobs by their reserved bytes, tenants in turn."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from gradwire_protocol import limits
from gradwire_protocol.error_reasons import Reason
from gradwire_server.admission.ledger import Ledger
from gradwire_server.admission.queue import Queue
from gradwire_server.admission.quota import (
    CALL_BYTES,
    RETRY_AFTER_S,
    Quota,
    Waiting,
    busy,
    draining,
)
from gradwire_server.admission.tenancy import Limits
from gradwire_server.errors import JobError
from gradwire_server.observability.figures import AdmissionFigures, TenantUse
from gradwire_server.scheduling.device_selector import DeviceSelector, Load

__all__ = ["CALL_BYTES", "RETRY_AFTER_S", "Admission", "heartbeat_s"]


def heartbeat_s() -> float:
    """Return after how many seconds a waiting job is told its place again.

    Proxies end calls without messages, many after 50 or 60 s. A busy server may be late
    by a third of the promised time.
    """
    return limits.QUEUED_EVERY_S * 2 / 3


class Admission:
    """The memory and the turns of one server.

    A tenant's jobs are admitted first come, first served, and tenants take turns. A job
    that waits for memory blocks later jobs (no starvation). A job blocked only by its
    tenant's quota does not.

    Args:
        memory_limit: Most bytes that jobs and open calls may hold.
        max_jobs: Most jobs that run at once.
        max_queue: Most jobs that wait.
        devices: The devices to run jobs on.
        limits_of: Returns a tenant's limits; None: all callers are one tenant, without
            limits of its own.
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
        """Number of running jobs."""
        return self._all.running

    @property
    def waiting(self) -> int:
        """Number of waiting jobs."""
        return len(self._all.waiting)

    @property
    def held_bytes(self) -> int:
        """Bytes held by jobs and open calls."""
        return self._ledger.held_bytes

    @property
    def draining(self) -> bool:
        """Whether new jobs are refused for good."""
        return self._draining

    def figures(self) -> AdmissionFigures:
        """Return what is held and who waits now."""
        limits, waiting = self._all.limits, self._all.waiting
        oldest = min((each.since for each in waiting), default=None)
        return AdmissionFigures(
            running_jobs=self.running,
            max_jobs=limits.max_jobs or 0,
            waiting_jobs=len(waiting),
            max_queue=limits.max_queue or 0,
            oldest_wait_s=0.0 if oldest is None else time.perf_counter() - oldest,
            held_bytes=self.held_bytes,
            limit_bytes=self.memory_limit,
            draining=self._draining,
            tenants=tuple(
                TenantUse(each.tenant, each.running, len(each.waiting), each.held_bytes)
                for each in self._ledger.quotas
            ),
        )

    def limits(self, tenant: str = "") -> Limits:
        """Return a tenant's limits on this server."""
        return self._ledger.limits(tenant)

    def own_limits(self, tenant: str) -> Limits:
        """Return the limits that a tenant has of its own."""
        return self._ledger.own_limits(tenant)

    def max_calls_bytes(self, tenant: str = "") -> int:
        """Return the most bytes that a tenant's open calls can hold."""
        return self._ledger.max_calls_bytes(tenant)

    def drain(self) -> None:
        """Refuse all waiting and future jobs."""
        self._draining = True
        for waiting in self._queue:
            self._refuse(waiting, draining())

    async def wait_idle(self) -> None:
        """Wait until no job runs."""
        await self._idle.wait()

    @contextmanager
    def call(
        self,
        size_bytes: int = CALL_BYTES,
        tenant: str = "",
        *,
        spare_bytes: int = 0,
        while_draining: bool = False,
    ) -> Iterator[None]:
        """Reserve memory for an open call within this context.

        Args:
            size_bytes: Bytes to reserve: gRPC's receive window, or a shared region.
            tenant: The call's tenant.
            spare_bytes: Bytes that must be free in addition.
            while_draining: Whether the call is served while the server drains.

        Raises:
            JobError: The server drains, or has no memory for one more call.
        """
        quota = self._ledger.open(tenant)
        refusal = None
        if self._draining and not while_draining:
            refusal = draining()
        refusal = refusal or self._ledger.check_call(size_bytes + spare_bytes, quota)
        if refusal is not None:
            self._ledger.close(quota)
            raise refusal
        holders = self._ledger.hold_call(size_bytes, quota)
        try:
            yield
        finally:
            self._release_call(size_bytes, quota, holders)

    @contextmanager
    def kept(
        self, size_bytes: int, position: int, *, spare_bytes: int = 0
    ) -> Iterator[None]:
        """Reserve a device's memory for a session within this context.

        Args:
            size_bytes: Bytes to reserve.
            position: Position of the device.
            spare_bytes: Bytes that sessions must leave in addition. They always leave
                enough for every waiting job.

        Raises:
            JobError: The server drains, or the device has no memory for the session.
        """
        if self._draining:
            raise draining()
        self._check_kept(size_bytes, position, spare_bytes)
        self.devices.keep(size_bytes, position)
        try:
            yield
        finally:
            self.devices.keep(-size_bytes, position)
            self._admit_waiting()

    @asynccontextmanager
    async def job(
        self,
        size_bytes: int,
        load: Load,
        on_wait: Callable[[int], Awaitable[None]],
        tenant: str = "",
    ) -> AsyncIterator[int]:
        """Wait for a job's turn, and hold its memory while it runs.

        A job has its turn when it is the first of its tenant, it is the tenant's turn,
        and there are memory, a free job slot, and a device with enough memory.

        Args:
            size_bytes: Host memory to reserve, in bytes.
            load: The job's load on its device.
            on_wait: Called with the number of jobs ahead: first, at each change, and
                again after `heartbeat_s`.
            tenant: The job's tenant.

        Yields:
            The position of the job's device.

        Raises:
            JobError: The job is larger than this server or its tenant can ever hold,
                the queue is full, or the server drains.
        """
        waiting = Waiting(self._ledger.open(tenant), size_bytes, load)
        try:
            position = await self._admit(waiting, on_wait)
            try:
                yield position
            finally:
                self._leave(waiting, position)
        finally:
            self._ledger.close(waiting.quota)

    def _release_call(
        self, size_bytes: int, quota: Quota, holders: tuple[Quota, ...]
    ) -> None:
        self._ledger.release_call(size_bytes, quota, holders)
        self._admit_waiting()

    async def _admit(
        self, waiting: Waiting, on_wait: Callable[[int], Awaitable[None]]
    ) -> int:
        quota = waiting.quota
        for each in (self._all, quota):
            refusal = each.check_job(waiting.size_bytes)
            if refusal is not None:
                raise refusal
        self._require_device(waiting.load)
        if self._draining:
            raise draining()
        self._queue.add(waiting)
        self._admit_waiting()
        if waiting.position is not None:
            return waiting.position
        for each in (quota, self._all):
            refusal = each.check_wait(waiting.size_bytes)
            if refusal is not None:
                self._queue.remove(waiting)
                raise refusal
        if not self.devices.can_run(waiting.load, beside_sessions=True):
            self._queue.remove(waiting)
            raise busy(
                f"open sessions leave less than the {waiting.load.device_bytes} bytes "
                f"of a device's memory that the job takes",
                "device_memory_limit",
            )
        if quota.overfull:
            self._refuse(waiting, quota.queue_full())
        elif self._all.overfull:
            self._refuse(self._queue.one_too_many(), self._all.queue_full())
        try:
            return await self._wait_turn(waiting, on_wait)
        except BaseException:
            self._withdraw(waiting)
            raise

    def _require_device(self, load: Load) -> None:
        if not self.devices.can_run(load, beside_sessions=False):
            most = self.devices.max_bytes
            if load.device is not None:
                most = self.devices.limit(load.device)
            raise JobError(
                Reason.JOB_TOO_LARGE,
                f"the job would hold {load.device_bytes} bytes of a device's memory: "
                f"this server has a device that allows {most}, and none that allows "
                f"more",
                field="job",
            )

    def _check_kept(self, size_bytes: int, position: int, spare_bytes: int) -> None:
        """Check that a device has room for a session, and for jobs beside it."""
        devices, limit = self.devices, self.devices.limit(position)
        if limit is None:
            return
        waiting = (
            each.load.device_bytes
            for each in self._queue
            if each.load.device in {None, position}
        )
        spare_bytes = max(spare_bytes, *waiting, 0)
        held, kept = devices.held_bytes(position), devices.kept_bytes(position)
        if max(held, kept + spare_bytes) + size_bytes > limit:
            raise busy(
                f"open sessions take {kept} of {limit} bytes of a device's memory, and "
                f"running jobs {held - kept}",
                "device_memory_limit",
            )

    async def _wait_turn(
        self, waiting: Waiting, on_wait: Callable[[int], Awaitable[None]]
    ) -> int:
        told: int | None = None
        while waiting.position is None:
            if waiting.refused is not None:
                raise waiting.refused
            waiting.moved.clear()
            ahead = self.running + self._queue.ahead_of(waiting)
            if ahead != told:
                told = ahead
                await on_wait(ahead)
                continue
            try:
                async with asyncio.timeout(heartbeat_s()):
                    await waiting.moved.wait()
            except TimeoutError:
                told = None
        return waiting.position

    def _refuse(self, waiting: Waiting, refusal: JobError) -> None:
        self._queue.remove(waiting)
        waiting.refused = refusal
        waiting.moved.set()

    def _withdraw(self, waiting: Waiting) -> None:
        """Remove a job that will not run from the queue, or release its admission."""
        if waiting.position is not None:
            self._leave(waiting, waiting.position)
        elif waiting in self._queue:
            self._queue.remove(waiting)
            self._admit_waiting()

    def _leave(self, waiting: Waiting, position: int) -> None:
        self.devices.release(waiting.load, position)
        for each in (waiting.quota, self._all):
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
        """Admit the next job in turn; return whether there may be another."""
        for first in self._queue.firsts():
            quota = first.quota
            self._ledger.renew(quota)
            too_large = quota.check_job(first.size_bytes)
            if too_large is not None:  # its tenant's limit was lowered
                self._refuse(first, too_large)
                return True
            if not quota.has_room(first.size_bytes):
                continue  # blocked only by its tenant's quota
            if not self._all.has_room(first.size_bytes):
                return False
            first.position = self.devices.assign(first.load)
            if first.position is None:
                return False
            self._queue.take_turn(first)
            for each in (quota, self._all):
                each.held_bytes += first.size_bytes
                each.running += 1
            self._idle.clear()
            first.moved.set()
            return True
        return False
