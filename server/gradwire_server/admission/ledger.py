"""The quotas of a server: one of all tenants together, and one of each."""

from __future__ import annotations

from collections.abc import Callable

from gradwire_server.admission.quota import CALL_BYTES, Quota, busy
from gradwire_server.admission.tenancy import Limits
from gradwire_server.errors import JobError

RESERVED_FRACTION = 1 / 16
"""One sixteenth of memory is reserved so that every tenant can always open one call."""

_MAX_CALLS_FRACTION = 1 / 2
"""One tenant's open calls may hold half of the memory, so that idle calls do not keep
other tenants' jobs from running."""


class Ledger:
    """The memory and jobs of each tenant.

    Args:
        limits: Limits of all tenants together.
        memory_limit: Memory of all tenants together, in bytes.
        limits_of: Returns a tenant's limits; None: all callers are one tenant, without
            limits of its own.

    Attributes:
        everybody: The quota of all tenants together, without the memory reserved for
            first calls.
    """

    def __init__(
        self,
        limits: Limits,
        memory_limit: int,
        limits_of: Callable[[str], Limits] | None,
    ) -> None:
        per_tenant = limits_of is not None
        self._reserved_bytes = (
            int(memory_limit * RESERVED_FRACTION) if per_tenant else 0
        )
        self._reserved_calls = 0
        shared = memory_limit - self._reserved_bytes
        self.everybody = Quota(limits.within(Limits(memory_limit=shared)))
        self._calls_limit = int(shared * _MAX_CALLS_FRACTION) if per_tenant else shared
        self._limits_of = limits_of
        self._quotas: dict[str, Quota] = {}

    @property
    def held_bytes(self) -> int:
        """Bytes held by all jobs and open calls."""
        return self.everybody.held_bytes + self._reserved_calls * CALL_BYTES

    @property
    def quotas(self) -> list[Quota]:
        """The quotas of tenants with jobs or open calls."""
        return list(self._quotas.values())

    @property
    def tenants(self) -> int:
        """Number of tenants with a quota."""
        return len(self._quotas)

    def limits(self, tenant: str) -> Limits:
        """Return a tenant's limits on this server."""
        return self.everybody.limits.within(self.own_limits(tenant))

    def own_limits(self, tenant: str) -> Limits:
        """Return the limits that a tenant has of its own."""
        return Limits() if self._limits_of is None else self._limits_of(tenant)

    def max_calls_bytes(self, tenant: str) -> int:
        """Return the most bytes that a tenant's open calls can hold."""
        return min(self.limits(tenant).memory_limit or 0, self._calls_limit)

    def open(self, tenant: str) -> Quota:
        """Return a tenant's quota, to be passed to `close` in the end."""
        quota = self._quotas.get(tenant)
        if quota is None:
            quota = self._quotas[tenant] = Quota(Limits(), "tenant_", tenant)
        self.renew(quota)
        return quota

    def renew(self, quota: Quota) -> None:
        """Update a quota to its tenant's current limits."""
        if self._limits_of is not None:
            quota.limits = self._limits_of(quota.tenant)

    def close(self, quota: Quota) -> None:
        """Forget a quota that is not in use.

        The number of tenants is unbounded, because an issuer chooses their names.
        """
        if quota.idle and self._quotas.get(quota.tenant) is quota:
            del self._quotas[quota.tenant]

    def check_call(self, size_bytes: int, quota: Quota) -> JobError | None:
        """Return the refusal of one more open call, or None if it fits."""
        refusal = quota.check_call(size_bytes)
        if refusal is not None or self._can_use_reserved(quota, size_bytes):
            return refusal
        if quota.calls_bytes + size_bytes > self._calls_limit < self._shared_bytes:
            return busy(
                f"open calls of your tenant hold {quota.calls_bytes} bytes, of at "
                f"most {self._calls_limit}, a part of the memory",
                "memory_limit",
            )
        return self.everybody.check_call(size_bytes)

    def hold_call(self, size_bytes: int, quota: Quota) -> tuple[Quota, ...]:
        """Count an open call.

        Returns:
            The quotas that count it.
        """
        holders: tuple[Quota, ...] = (quota, self.everybody)
        if self._can_use_reserved(quota, size_bytes):
            quota.has_reserved_slot = True
            self._reserved_calls += 1
            holders = (quota,)
        for each in holders:
            each.calls_bytes += size_bytes
            each.held_bytes += size_bytes
        return holders

    def release_call(
        self, size_bytes: int, quota: Quota, holders: tuple[Quota, ...]
    ) -> None:
        """Stop counting an open call."""
        for each in holders:
            each.calls_bytes -= size_bytes
            each.held_bytes -= size_bytes
        if self.everybody not in holders:
            quota.has_reserved_slot = False
            self._reserved_calls -= 1
        self.close(quota)

    @property
    def _shared_bytes(self) -> int:
        return self.everybody.limits.memory_limit or 0

    def _can_use_reserved(self, quota: Quota, size_bytes: int) -> bool:
        """Return whether a call can use its tenant's reserved slot."""
        return (
            not quota.has_reserved_slot
            and size_bytes == CALL_BYTES
            and (self._reserved_calls + 1) * CALL_BYTES <= self._reserved_bytes
        )
