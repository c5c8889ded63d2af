"""The waiting jobs: first come, first served per tenant, tenants in turn."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from gradwire_server.admission.quota import Quota, Waiting


class Queue:
    """The waiting jobs, and the order of tenants' turns.

    Args:
        everybody: The quota of all tenants together.
    """

    def __init__(self, everybody: Quota) -> None:
        self._all = everybody
        self._turns: OrderedDict[Quota, None] = OrderedDict()
        """Quotas of tenants with waiting jobs, in the order of their turns."""

    def __bool__(self) -> bool:
        return bool(self._turns)

    def __iter__(self) -> Iterator[Waiting]:
        """Iterate over all waiting jobs, in the order in which they came."""
        return iter(list(self._all.waiting))

    def __contains__(self, waiting: Waiting) -> bool:
        return waiting in self._all.waiting

    def firsts(self) -> Iterator[Waiting]:
        """Yield the first job of each tenant, in the order of their turns.

        Stop iterating after removing a job.
        """
        for quota in self._turns:
            yield quota.waiting[0]

    def add(self, waiting: Waiting) -> None:
        """Append a job to its tenant's queue."""
        for each in (waiting.quota, self._all):
            each.waiting.append(waiting)
        self._turns.setdefault(waiting.quota, None)

    def remove(self, waiting: Waiting) -> None:
        """Remove a job; the order of turns stays."""
        for each in (waiting.quota, self._all):
            each.waiting.remove(waiting)
        if not waiting.quota.waiting:
            del self._turns[waiting.quota]

    def take_turn(self, waiting: Waiting) -> None:
        """Remove a job; its tenant's next turn comes after all others'."""
        self._turns.move_to_end(waiting.quota)
        self.remove(waiting)

    def ahead_of(self, waiting: Waiting) -> int:
        """Return how many jobs have their turn before this one, if no more come."""
        place = waiting.quota.waiting.index(waiting)
        ahead, turns_before = place, place + 1
        for quota in self._turns:
            if quota is waiting.quota:
                turns_before = place
            else:
                ahead += min(len(quota.waiting), turns_before)
        return ahead

    def one_too_many(self) -> Waiting:
        """Return the job to drop from a full queue: the longest tenant queue's last.

        So one tenant's thousand jobs do not keep out another's one.
        """
        newest = self._all.waiting[-1].quota
        most = max(self._turns, key=lambda each: (len(each.waiting), each is newest))
        return most.waiting[-1]
