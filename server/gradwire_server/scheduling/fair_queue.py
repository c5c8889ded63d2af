"""Fair queueing: tenants take turns, and so do each tenant's jobs.

If T tenants have work, each gets every T-th piece; each of a tenant's J jobs gets every
T·J-th. A tenant's number of jobs therefore does not affect other tenants. Neither does
the duration of its pieces: a row block of a wide product may take a thousand times as
long as another. A tenant that has used more device time than the others is skipped
until they catch up.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T")

MAX_LEAD_S = 0.1
"""Seconds of device time by which a tenant may lead and still have its turn: among
pieces of milliseconds, equal turns are fair."""

_MAX_REMEMBERED = 64


class FairQueue(Generic[T]):
    """Queued pieces of work, by tenant and job."""

    def __init__(self) -> None:
        self._tenants: OrderedDict[str, OrderedDict[Hashable, deque[T]]]
        self._tenants = OrderedDict()
        self._usage_s: dict[str, float] = {}
        """Device time of each tenant. A tenant that was idle is raised to the minimum
        of the others when it has work again."""
        self._min_usage_s = 0.0
        """Smallest usage of a queued tenant at the last `take`."""

    def __bool__(self) -> bool:
        return bool(self._tenants)

    def put(self, tenant: str, job: Hashable, piece: T) -> None:
        """Queue a piece behind the job's earlier ones."""
        if tenant not in self._tenants:
            self._activate(tenant)
        jobs = self._tenants.setdefault(tenant, OrderedDict())
        jobs.setdefault(job, deque()).append(piece)

    def take(self) -> T:
        """Remove and return the next piece; the queue must not be empty."""
        self._min_usage_s = min(self._usage_s[tenant] for tenant in self._tenants)
        tenant, jobs = next(
            (tenant, jobs)
            for tenant, jobs in self._tenants.items()
            if self._usage_s[tenant] <= self._min_usage_s + MAX_LEAD_S
        )
        job, pieces = next(iter(jobs.items()))
        piece = pieces.popleft()
        if pieces:
            jobs.move_to_end(job)
        else:
            del jobs[job]
        if jobs:
            self._tenants.move_to_end(tenant)
        else:
            del self._tenants[tenant]
        return piece

    def charge(self, tenant: str, seconds: float) -> None:
        """Add the duration of a finished piece to its tenant's usage."""
        self._usage_s[tenant] = self._usage_s.get(tenant, self._min_usage_s) + seconds

    def drop(self, tenant: str, job: Hashable) -> deque[T]:
        """Remove and return a job's queued pieces."""
        jobs = self._tenants.get(tenant)
        if jobs is None:
            return deque()
        pieces = jobs.pop(job, deque())
        if not jobs:
            del self._tenants[tenant]
        return pieces

    def clear(self) -> list[T]:
        """Remove and return all queued pieces."""
        dropped = [
            piece
            for jobs in self._tenants.values()
            for pieces in jobs.values()
            for piece in pieces
        ]
        self._tenants.clear()
        return dropped

    def _activate(self, tenant: str) -> None:
        """Admit a tenant that has work again, without credit for its idle time."""
        usage_s = self._usage_s.get(tenant, 0.0)
        self._usage_s[tenant] = max(usage_s, self._min_usage_s)
        if len(self._usage_s) > _MAX_REMEMBERED + len(self._tenants):
            self._usage_s = {
                each: seconds
                for each, seconds in self._usage_s.items()
                if seconds > self._min_usage_s
                or each in self._tenants
                or each == tenant
            }
