"""The memory and jobs of a tenant, or of all tenants, and their limits."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.limits import MIB
from gradwire_server.admission.tenancy import Limits
from gradwire_server.errors import JobError
from gradwire_server.scheduling.device_selector import Load

CALL_BYTES = 4 * MIB
"""Bytes that an open call holds before its job is admitted: gRPC's receive window,
filled by the client while the server does not read."""

RETRY_AFTER_S = 1.0
"""Seconds after which a refused caller may try again: jobs come and go within
seconds."""


@dataclass(eq=False, slots=True)
class Waiting:
    """A waiting job."""

    quota: Quota
    """The quota of the job's tenant."""
    size_bytes: int
    load: Load
    since: float = field(default_factory=time.perf_counter)
    moved: asyncio.Event = field(default_factory=asyncio.Event)
    position: int | None = None
    """Position of the job's device; None until it is admitted."""
    refused: JobError | None = None


class Quota:
    """Used resources, and their limits.

    Open calls never hold so much that a waiting job could not run after all running
    jobs have ended. Otherwise the waiting calls would wait for each other.

    Args:
        limits: The limits.
        whose: Prefix of the limits' names: "tenant_", or empty.
        tenant: The tenant's name.
    """

    def __init__(self, limits: Limits, whose: str = "", tenant: str = "") -> None:
        self.tenant = tenant
        self.limits = limits
        self.whose = whose
        self.running = 0
        self.held_bytes = 0
        self.calls_bytes = 0
        """Part of `held_bytes` held by open calls."""
        self.waiting: list[Waiting] = []
        """Waiting jobs, in the order in which they came."""
        self.has_reserved_slot = False
        """Whether an open call uses the tenant's reserved slot."""

    @property
    def idle(self) -> bool:
        """Whether nothing is held and no job waits."""
        return not (
            self.running or self.held_bytes or self.waiting or self.has_reserved_slot
        )

    def check_job(self, size_bytes: int) -> JobError | None:
        """Return the refusal of a job too large to ever run, or None."""
        limit = self.limits.memory_limit
        if limit is None or size_bytes + CALL_BYTES <= limit:
            return None
        whose = "your tenant" if self.whose else "this server"
        return JobError(
            Reason.JOB_TOO_LARGE,
            f"the job would hold {size_bytes} bytes: {whose} has {limit}",
            field="job",
            metadata={"limit": f"{self.whose}memory_limit"},
        )

    def check_call(self, size_bytes: int) -> JobError | None:
        """Return the refusal of one more open call, or None if it fits."""
        limit = self.limits.memory_limit
        if limit is None:
            return None
        largest = 0
        if self.waiting:
            largest = max(waiting.size_bytes for waiting in self.waiting)
        if (
            self.held_bytes + size_bytes > limit
            or self.calls_bytes + size_bytes + largest > limit
        ):
            return self.no_memory()
        return None

    def check_wait(self, size_bytes: int) -> JobError | None:
        """Return the refusal of a job that open calls would block forever, or None."""
        limit = self.limits.memory_limit
        if limit is not None and self.calls_bytes + size_bytes > limit:
            return self.no_memory()
        return None

    @property
    def overfull(self) -> bool:
        """Whether more jobs wait than allowed."""
        max_queue = self.limits.max_queue
        return max_queue is not None and len(self.waiting) > max_queue

    def has_room(self, size_bytes: int) -> bool:
        """Return whether a job may run now."""
        jobs, limit = self.limits.max_jobs, self.limits.memory_limit
        return (jobs is None or self.running < jobs) and (
            limit is None or self.held_bytes + size_bytes <= limit
        )

    def no_memory(self) -> JobError:
        """Return the refusal for lack of memory."""
        return busy(
            f"open calls and running jobs{self._of_whom} hold {self.held_bytes} of "
            f"{self.limits.memory_limit} bytes, and {len(self.waiting)} jobs wait",
            f"{self.whose}memory_limit",
        )

    def queue_full(self) -> JobError:
        """Return the refusal for a full queue."""
        max_queue = self.limits.max_queue
        full = f"and {len(self.waiting) - 1} wait, of at most {max_queue}"
        limit = "max_queue"
        if not max_queue and self.running == self.limits.max_jobs:
            # Without a queue, the limit of running jobs is the cause.
            full, limit = f"of at most {self.running}, and none may wait", "max_jobs"
        return busy(
            f"{self.running} jobs{self._of_whom} run, {full}", f"{self.whose}{limit}"
        )

    @property
    def _of_whom(self) -> str:
        return " of your tenant" if self.whose else ""


def busy(why: str, limit: str) -> JobError:
    """Return the refusal for a resource that is taken now and may be free later.

    Args:
        why: The taken resource.
        limit: The setting that limits it.
    """
    return JobError(
        Reason.BUSY,
        f"the server is busy: {why} ({limit}); try again in {RETRY_AFTER_S:g} s",
        retry_after_s=RETRY_AFTER_S,
        metadata={"limit": limit},
    )


def draining() -> JobError:
    """Return the refusal while the server drains."""
    return JobError(
        Reason.DRAINING, "the server is about to stop and takes no new jobs"
    )
