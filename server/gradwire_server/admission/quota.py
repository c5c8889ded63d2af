"""What the jobs and open calls of a tenant, or of all tenants, hold at once."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.limits import MIB
from gradwire_server.admission.tenancy import Limits
from gradwire_server.errors import JobError
from gradwire_server.scheduling.device_selector import Load

CALL_BYTES = 4 * MIB
"""What an open call holds before its job is admitted: what gRPC takes in
from its client while nobody reads."""

RETRY_AFTER_S = 1.0
"""When a refused caller may try again: jobs come and go within seconds."""


@dataclass(eq=False, slots=True)
class Waiting:
    """A job that waits for its turn."""

    account: Quota
    """Its tenant's."""
    size_bytes: int
    load: Load
    moved: asyncio.Event = field(default_factory=asyncio.Event)
    position: int | None = None
    """Position of the lane that the job was given; None before it may run."""
    refused: JobError | None = None


class Quota:
    """What is held, of at most so much.

    Open calls never hold so much that a waiting job could not run when all
    running ones have ended: those who wait would wait for each other.

    Args:
        limits: How much that is.
        whose: What its limits are called in front: "tenant_", or nothing.
        tenant: The tenant's name.
    """

    def __init__(self, limits: Limits, whose: str = "", tenant: str = "") -> None:
        self.tenant = tenant
        self.limits = limits
        self.whose = whose
        self.running = 0
        self.held_bytes = 0
        self.calls_bytes = 0
        """Of these, what open calls hold."""
        self.waiting: list[Waiting] = []
        """In the order in which they came."""
        self.has_reserved_slot = False
        """Whether an open call has the place that is kept for it."""

    @property
    def idle(self) -> bool:
        """Whether nothing is held or waited for."""
        return not (
            self.running or self.held_bytes or self.waiting or self.has_reserved_slot
        )

    def check_job(self, size_bytes: int) -> JobError | None:
        """Why a job could not run if there were no other; None: it could."""
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
        """Why there is no place for one more open call; None where there is."""
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
        """Why a job would wait for ever beside the open calls; None: it would not."""
        limit = self.limits.memory_limit
        if limit is not None and self.calls_bytes + size_bytes > limit:
            return self.no_memory()
        return None

    @property
    def overfull(self) -> bool:
        """Whether more jobs wait than may."""
        places = self.limits.max_queue
        return places is not None and len(self.waiting) > places

    def has_room(self, size_bytes: int) -> bool:
        """Whether a job may run now."""
        jobs, limit = self.limits.max_jobs, self.limits.memory_limit
        return (jobs is None or self.running < jobs) and (
            limit is None or self.held_bytes + size_bytes <= limit
        )

    def no_memory(self) -> JobError:
        """The refusal of who finds the memory taken."""
        return busy(
            f"open calls and running jobs{self._of_whom} hold {self.held_bytes} of "
            f"{self.limits.memory_limit} bytes, and {len(self.waiting)} jobs wait",
            f"{self.whose}memory_limit",
        )

    def no_place(self) -> JobError:
        """The refusal of who is one too many in the queue."""
        places = self.limits.max_queue
        full = f"and {len(self.waiting) - 1} wait, of at most {places}"
        limit = "max_queue"
        if not places and self.running == self.limits.max_jobs:
            # Nobody may wait: what the job would have waited for says more.
            full, limit = f"of at most {self.running}, and none may wait", "max_jobs"
        return busy(
            f"{self.running} jobs{self._of_whom} run, {full}", f"{self.whose}{limit}"
        )

    @property
    def _of_whom(self) -> str:
        return " of your tenant" if self.whose else ""


def busy(why: str, limit: str) -> JobError:
    """The refusal of who finds what is limited taken; later it may be free.

    Args:
        why: What is taken.
        limit: The setting that limits it.
    """
    return JobError(
        Reason.BUSY,
        f"the server is busy: {why} ({limit}); try again in {RETRY_AFTER_S:g} s",
        retry_after_s=RETRY_AFTER_S,
        metadata={"limit": limit},
    )


def draining() -> JobError:
    """The refusal of who comes too late."""
    return JobError(
        Reason.DRAINING, "the server is about to stop and takes no new jobs"
    )
