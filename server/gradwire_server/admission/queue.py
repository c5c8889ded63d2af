"""The jobs that wait: each tenant's in the order they came, tenants in turn."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from gradwire_server.admission.quota import Quota, Waiting


class Queue:
    """Who waits, and whose turn it is.

    Args:
        everybody: The account of all tenants together.
    """

    def __init__(self, everybody: Quota) -> None:
        self._all = everybody
        self._turns: OrderedDict[Quota, None] = OrderedDict()
        """Accounts of tenants whose jobs wait, in the order of their turns."""

    def __bool__(self) -> bool:
        return bool(self._turns)

    def __iter__(self) -> Iterator[Waiting]:
        """All of them, in the order in which they came."""
        return iter(list(self._all.waiting))

    def __contains__(self, waiting: Waiting) -> bool:
        return waiting in self._all.waiting

    def firsts(self) -> Iterator[Waiting]:
        """The first of each tenant, in the order of their turns.

        Who takes one out must not ask for the next.
        """
        for account in self._turns:
            yield account.waiting[0]

    def add(self, waiting: Waiting) -> None:
        """One more waits, the last of its tenant."""
        for each in (waiting.account, self._all):
            each.waiting.append(waiting)
        self._turns.setdefault(waiting.account, None)

    def remove(self, waiting: Waiting) -> None:
        """It waits no longer; whose turn it is stays as it was."""
        for each in (waiting.account, self._all):
            each.waiting.remove(waiting)
        if not waiting.account.waiting:
            del self._turns[waiting.account]

    def take_turn(self, waiting: Waiting) -> None:
        """It waits no longer; its tenant's next turn comes after all others'."""
        self._turns.move_to_end(waiting.account)
        self.remove(waiting)

    def ahead_of(self, waiting: Waiting) -> int:
        """How many have their turn before one, if no other comes meanwhile."""
        place = waiting.account.waiting.index(waiting)
        ahead, turns_before = place, place + 1
        for account in self._turns:
            if account is waiting.account:
                turns_before = place
            else:
                ahead += min(len(account.waiting), turns_before)
        return ahead

    def one_too_many(self) -> Waiting:
        """Who leaves a queue that is full: the last of the tenant with most in it.

        So one tenant's thousand jobs do not keep another's one out.
        """
        newest = self._all.waiting[-1].account
        most = max(self._turns, key=lambda each: (len(each.waiting), each is newest))
        return most.waiting[-1]
