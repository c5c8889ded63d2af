"""Whose turn it is: tenants in turn, and each tenant's jobs in turn.

Of T tenants and a tenant with J jobs that all have work, each tenant gets
every T-th piece, and each of those J jobs every T·J-th: how many jobs one
tenant has makes no difference to another. Nor does how long its pieces take: a
row block of a wide product may take a thousand times as long as another's, and
a tenant that has had more of the lane's time than others lets those by.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T")

MAX_LEAD_S = 0.1
"""Seconds of work that a tenant may be ahead of others and still have its turn:
among pieces of milliseconds, turns are what is fair."""

_MAX_REMEMBERED = 64


class FairQueue(Generic[T]):
    """Pieces of work that wait, each of a job of a tenant."""

    def __init__(self) -> None:
        self._tenants: OrderedDict[str, OrderedDict[Hashable, deque[T]]]
        self._tenants = OrderedDict()
        self._usage_s: dict[str, float] = {}
        """How much each tenant has had, counted as if it had always had as much
        as the others while it wanted nothing."""
        self._min_usage_s = 0.0
        """The least that a tenant had had when a piece was last taken."""

    def __bool__(self) -> bool:
        return bool(self._tenants)

    def put(self, tenant: str, job: Hashable, piece: T) -> None:
        """A piece waits, behind the job's earlier ones."""
        if tenant not in self._tenants:
            self._activate(tenant)
        jobs = self._tenants.setdefault(tenant, OrderedDict())
        jobs.setdefault(job, deque()).append(piece)

    def take(self) -> T:
        """The piece whose turn it is; there must be one."""
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
        """A piece of a tenant's is done, and has taken so long."""
        self._usage_s[tenant] = self._usage_s.get(tenant, self._min_usage_s) + seconds

    def drop(self, tenant: str, job: Hashable) -> deque[T]:
        """The pieces of a job, which wait no longer."""
        jobs = self._tenants.get(tenant)
        if jobs is None:
            return deque()
        pieces = jobs.pop(job, deque())
        if not jobs:
            del self._tenants[tenant]
        return pieces

    def _activate(self, tenant: str) -> None:
        """A tenant wants work again; what it did not want is not made up for."""
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
