"""What sessions may keep: accounts of host memory, and of each device's memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.limits import MAX_INT64
from gradwire_server.admission.controller import Admission
from gradwire_server.admission.quota import CALL_BYTES, busy
from gradwire_server.errors import JobError

MAX_SESSIONS = 256
"""Most sessions at once."""

_MAX_OF_TENANT = MAX_SESSIONS // 4
"""Most sessions of one tenant, with authentication and without a limit of its own."""

_SPARE_FRACTION = 1 / 8
"""Sessions leave at least one eighth of the memory for the jobs that use them."""

_TENANT_FRACTION = 1 / 2
"""Most of a device's memory that the sessions of one tenant take, with
authentication."""


class Accounts:
    """Reserves the memory of sessions, where their tensors lie.

    Args:
        admission: The admission control.
        keep_limit: Most bytes that all sessions of one device keep, or all together in
            host memory; None: half of the memory.
        device_bytes: Returns the bytes of its device's memory that a session takes.
    """

    def __init__(
        self,
        admission: Admission,
        keep_limit: int | None,
        device_bytes: Callable[[int], int],
    ) -> None:
        self._admission = admission
        self._keep_limit = keep_limit
        self._device_bytes = device_bytes
        self._sessions: Counter[str] = Counter()
        """Sessions of each tenant."""
        self._kept_bytes: Counter[int] = Counter()
        """Bytes that sessions keep, by the position of their device."""
        self._own_bytes: Counter[str] = Counter()
        """Bytes that the sessions of each tenant keep."""
        self._taken_bytes: Counter[tuple[str, int]] = Counter()
        """Bytes of a device's memory that a tenant's sessions take."""

    @property
    def kept_bytes(self) -> int:
        """Bytes that all sessions have reserved to keep."""
        return self._kept_bytes.total()

    def limit_bytes(self, devices: int) -> int:
        """Return the most bytes that sessions keep on so many devices together."""
        selector, host = self._admission.devices, self._admission.memory_limit
        limits = [selector.limit(position) for position in range(devices)]
        return sum(self._limit(each) for each in limits if each is not None) or (
            self._limit(host)
        )

    def max_keep_bytes(self, tenant: str, devices: int) -> int:
        """Return the most bytes that one session of a tenant keeps.

        Args:
            tenant: The tenant.
            devices: The devices of which one may have it.
        """
        positions = range(devices)
        most = max(self._most(tenant, position) for position in positions)
        own = self._own_limit(tenant)
        return max(most if own is None else min(most, own), 0)

    def max_sessions(self, tenant: str) -> int:
        """Return the most sessions of a tenant that are open at once."""
        own = self._admission.limits(tenant).max_sessions
        if own is None:
            return _MAX_OF_TENANT if tenant else MAX_SESSIONS
        return min(own, MAX_SESSIONS)

    def reserve(self, keep_bytes: int, tenant: str, position: int) -> ExitStack:
        """Reserve a session's memory until the returned stack is closed.

        Args:
            keep_bytes: Bytes for its tensors.
            tenant: Its owner.
            position: Position of its device.

        Raises:
            JobError: It does not fit, now or ever.
        """
        _check_number(keep_bytes)
        limit = self._admission.devices.limit(position)
        memory = "memory_limit" if limit is None else "device_memory_limit"
        self._check_size(keep_bytes, self._most(tenant, position), memory, tenant)
        if limit is None:
            hold = self._in_host_memory(keep_bytes, tenant)
            taken = 0
        else:
            taken = self._device_bytes(keep_bytes)
            hold = self._on_device(keep_bytes, taken, tenant, position, limit)
        self._check_count(tenant)
        held = ExitStack()
        held.enter_context(hold)
        self._count(tenant, position, keep_bytes, taken, 1)
        held.callback(self._count, tenant, position, -keep_bytes, -taken, -1)
        return held

    def _in_host_memory(
        self, keep_bytes: int, tenant: str
    ) -> AbstractContextManager[None]:
        limit = self._limit(self._admission.memory_limit)
        self._check_kept(keep_bytes, 0, limit, tenant)
        return self._admission.call(
            keep_bytes, tenant, spare_bytes=self._spare_bytes(tenant)
        )

    def _on_device(
        self, keep_bytes: int, taken: int, tenant: str, position: int, limit: int
    ) -> AbstractContextManager[None]:
        share = self._share(tenant, limit)
        self._check_kept(keep_bytes, position, self._limit(limit), tenant)
        own_bytes = self._taken_bytes[tenant, position]
        if tenant and own_bytes + taken > share:
            raise busy(
                f"sessions of your tenant take {own_bytes} bytes of a device's memory, "
                f"of at most {share}",
                "device_memory_limit",
            )
        return self._admission.kept(
            taken, position, spare_bytes=int(limit * _SPARE_FRACTION)
        )

    def _most(self, tenant: str, position: int) -> int:
        """Return the most bytes that a session on a device keeps, of its memory."""
        limit = self._admission.devices.limit(position)
        if limit is None:
            most = self._admission.max_calls_bytes(tenant)
            admissible = most - self._spare_bytes(tenant) - CALL_BYTES
            return min(self._limit(self._admission.memory_limit), admissible)
        share = int(self._share(tenant, limit) * (1 - _SPARE_FRACTION))
        return self._fitting(self._limit(limit), share)

    def _spare_bytes(self, tenant: str) -> int:
        """Return the bytes of host memory that sessions leave to a tenant's calls."""
        most = self._admission.max_calls_bytes(tenant)
        return max(CALL_BYTES, int(most * _SPARE_FRACTION))

    def _share(self, tenant: str, limit: int) -> int:
        """Return the bytes of a device's memory that a tenant's sessions may take."""
        if not tenant:
            return limit
        own = self._admission.own_limits(tenant).memory_limit
        return min(int(limit * _TENANT_FRACTION), limit if own is None else own)

    def _limit(self, memory_bytes: int) -> int:
        return memory_bytes // 2 if self._keep_limit is None else self._keep_limit

    def _fitting(self, keep_bytes: int, device_bytes: int) -> int:
        """Return the most bytes to keep that take at most so many on a device."""
        while (excess := self._device_bytes(keep_bytes) - device_bytes) > 0:
            keep_bytes -= excess
            if keep_bytes <= 0:
                return 0
        return keep_bytes

    def _check_kept(
        self, keep_bytes: int, position: int, limit: int, tenant: str
    ) -> None:
        kept = self._kept_bytes[position]
        if kept + keep_bytes > limit:
            raise busy(f"open sessions keep {kept} of {limit} bytes", "keep_limit")
        own, own_bytes = self._own_limit(tenant), self._own_bytes[tenant]
        if own is not None and own_bytes + keep_bytes > own:
            raise busy(
                f"open sessions of your tenant keep {own_bytes} of {own} bytes",
                "tenant_keep_limit",
            )

    def _own_limit(self, tenant: str) -> int | None:
        return self._admission.limits(tenant).keep_limit

    def _check_size(self, keep_bytes: int, most: int, memory: str, tenant: str) -> None:
        whose, limit = "this server", "keep_limit"
        settings = limit
        if self._keep_limit is None or most < self._keep_limit:
            settings = f"{limit}, {memory}"  # a part of the memory
        own = self._own_limit(tenant)
        if own is not None and own < most:
            most, whose, limit = own, "your tenant", "tenant_keep_limit"
            settings = limit
        if keep_bytes > most:
            raise JobError(
                Reason.JOB_TOO_LARGE,
                f"keep_bytes is {keep_bytes}: {whose} keeps at most {max(most, 0)} "
                f"({settings})",
                field="keep_bytes",
                metadata={"limit": limit},
            )

    def _check_count(self, tenant: str) -> None:
        count = self._sessions.total()
        if count >= MAX_SESSIONS:
            raise busy(
                f"{count} sessions are open, of at most {MAX_SESSIONS}", "sessions"
            )
        own, most = self._sessions[tenant], self.max_sessions(tenant)
        if own >= most:
            raise busy(
                f"{own} sessions of your tenant are open, of at most {most}",
                "tenant_max_sessions",
            )

    def _count(
        self, tenant: str, position: int, keep_bytes: int, taken: int, sessions: int
    ) -> None:
        self._sessions[tenant] += sessions
        self._kept_bytes[position] += keep_bytes
        self._own_bytes[tenant] += keep_bytes
        self._taken_bytes[tenant, position] += taken
        self._sessions += Counter()  # forgets tenants that have none
        self._own_bytes += Counter()
        self._taken_bytes += Counter()


def _check_number(keep_bytes: int) -> None:
    if not 0 < keep_bytes < MAX_INT64:
        raise JobError(
            Reason.OPTION_INVALID,
            f"keep_bytes is {keep_bytes}: expected at least 1",
            field="keep_bytes",
        )
