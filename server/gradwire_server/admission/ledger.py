"""The accounts of a server: of all tenants together, and of each."""

from __future__ import annotations

from collections.abc import Callable

from gradwire_server.admission.quota import CALL_BYTES, Quota, busy
from gradwire_server.admission.tenancy import Limits
from gradwire_server.errors import JobError

RESERVED_FRACTION = 16
"""Which part of the memory is kept for the first open call of each tenant: what
others hold must not keep a tenant from asking for its turn."""

_CALLS_SHARE = 2
"""Which part of the memory the open calls of one tenant may hold: those that do
nothing must not keep the jobs of others from running."""


class Ledger:
    """Who holds what.

    Args:
        limits: What all tenants together may have.
        memory_limit: What of it is memory.
        limits_of: What a tenant may have of all this; None where all callers
            are one tenant, who may have it all.

    Attributes:
        everybody: The account of all together, beside what is kept for first
            calls.
    """

    def __init__(
        self,
        limits: Limits,
        memory_limit: int,
        limits_of: Callable[[str], Limits] | None,
    ) -> None:
        self._kept_bytes = 0 if limits_of is None else memory_limit // RESERVED_FRACTION
        self._kept_taken = 0
        shared = memory_limit - self._kept_bytes
        self.everybody = Quota(limits.within(Limits(memory_limit=shared)))
        self._calls_limit = shared if limits_of is None else shared // _CALLS_SHARE
        self._limits_of = limits_of
        self._accounts: dict[str, Quota] = {}

    @property
    def held_bytes(self) -> int:
        """What all jobs and open calls hold."""
        return self.everybody.held_bytes + self._kept_taken * CALL_BYTES

    @property
    def tenants(self) -> int:
        """How many have an account."""
        return len(self._accounts)

    def limits(self, tenant: str) -> Limits:
        """The most that a tenant can have."""
        own = Limits() if self._limits_of is None else self._limits_of(tenant)
        return self.everybody.limits.within(own)

    def max_calls_bytes(self, tenant: str) -> int:
        """The most bytes that a tenant's open calls can hold."""
        return min(self.limits(tenant).memory_limit or 0, self._calls_limit)

    def open(self, tenant: str) -> Quota:
        """A tenant's account; who takes it gives it to `close` in the end."""
        account = self._accounts.get(tenant)
        if account is None:
            account = self._accounts[tenant] = Quota(Limits(), "tenant_", tenant)
        self.renew(account)
        return account

    def renew(self, account: Quota) -> None:
        """Takes up what its tenant may have by now."""
        if self._limits_of is not None:
            account.limits = self._limits_of(account.tenant)

    def close(self, account: Quota) -> None:
        """Forgets an account if there is nothing in it.

        Those who call themselves whatever an issuer says are many.
        """
        if account.idle and self._accounts.get(account.tenant) is account:
            del self._accounts[account.tenant]

    def check_call(self, size_bytes: int, account: Quota) -> JobError | None:
        """Why there is no place for one more open call; None where there is."""
        refusal = account.check_call(size_bytes)
        if refusal is not None or self._is_kept_for(account, size_bytes):
            return refusal
        if account.calls_bytes + size_bytes > self._calls_limit < self._shared_bytes:
            return busy(
                f"open calls of your tenant hold {account.calls_bytes} bytes, of at "
                f"most {self._calls_limit}, a part of the memory",
                "memory_limit",
            )
        return self.everybody.check_call(size_bytes)

    def hold_call(self, size_bytes: int, account: Quota) -> tuple[Quota, ...]:
        """Counts an open call that has a place.

        Returns:
            The accounts in which it counts.
        """
        holders: tuple[Quota, ...] = (account, self.everybody)
        if self._is_kept_for(account, size_bytes):
            account.has_reserved_slot = True
            self._kept_taken += 1
            holders = (account,)
        for each in holders:
            each.calls_bytes += size_bytes
            each.held_bytes += size_bytes
        return holders

    def release_call(
        self, size_bytes: int, account: Quota, holders: tuple[Quota, ...]
    ) -> None:
        """Counts it no longer."""
        for each in holders:
            each.calls_bytes -= size_bytes
            each.held_bytes -= size_bytes
        if self.everybody not in holders:
            account.has_reserved_slot = False
            self._kept_taken -= 1
        self.close(account)

    @property
    def _shared_bytes(self) -> int:
        return self.everybody.limits.memory_limit or 0

    def _is_kept_for(self, account: Quota, size_bytes: int) -> bool:
        """Whether a call can have the place that is kept for its tenant."""
        return (
            not account.has_reserved_slot
            and size_bytes == CALL_BYTES
            and (self._kept_taken + 1) * CALL_BYTES <= self._kept_bytes
        )
