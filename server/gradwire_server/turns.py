"""Whose turn it is: tenants in turn, and each tenant's jobs in turn.

Of T tenants and a tenant with J jobs that all have work, each tenant gets
every T-th piece, and each of those J jobs every T·J-th: how many jobs one
tenant has makes no difference to another.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Turns(Generic[T]):
    """Pieces of work that wait, each of a job of a tenant."""

    def __init__(self) -> None:
        self._tenants: OrderedDict[str, OrderedDict[Hashable, deque[T]]]
        self._tenants = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._tenants)

    def put(self, tenant: str, job: Hashable, piece: T) -> None:
        """A piece waits, behind the job's earlier ones."""
        jobs = self._tenants.setdefault(tenant, OrderedDict())
        jobs.setdefault(job, deque()).append(piece)

    def take(self) -> T:
        """The piece whose turn it is; there must be one."""
        tenant, jobs = next(iter(self._tenants.items()))
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

    def drop(self, tenant: str, job: Hashable) -> deque[T]:
        """The pieces of a job, which wait no longer."""
        jobs = self._tenants.get(tenant)
        if jobs is None:
            return deque()
        pieces = jobs.pop(job, deque())
        if not jobs:
            del self._tenants[tenant]
        return pieces
