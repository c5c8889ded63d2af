"""What the calls of a server have done, counted as they end."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.limits import REPORTS
from gradwire_server.errors import JobError
from gradwire_server.observability.calls import Call, CallObserver
from gradwire_server.observability.figures import (
    BOUNDS_S,
    JOB_METHODS,
    Bytes,
    CallFigures,
    CallKey,
    Distribution,
    JobKey,
    StageTimes,
    TenantTotals,
    Way,
)

_USUAL = (
    ("Compute", "tcp"),
    ("Compute", "unix"),
    ("ComputeStream", "tcp"),
    ("ComputeStream", "unix"),
    ("ComputeStream", "direct"),
    ("ComputeStream", "shm"),
)
"""Methods and transports of jobs. They are counted from 0 on: Prometheus does not see
an increase where a series begins."""

_FAULTS = (Reason.UNFORESEEN, Reason.DEVICE_LOST, Reason.DEVICE_OUT_OF_MEMORY)
"""Reasons that are a fault of the server's, also counted from 0 on."""

_SAVING = ("Step", "SaveSession")
"""Methods that save a session's state."""

_SESSION_FAULTS = (
    *(
        (method, reason)
        for method in ("OpenSession", "PutTensor", "GetTensor", *_SAVING)
        for reason in _FAULTS
    ),
    *((method, Reason.STATE_NOT_SAVED) for method in _SAVING),
)
"""Outcomes of calls of sessions that an operator wants to know, counted from 0 on."""

_LIMITS = (
    *("max_jobs", "max_queue", "memory_limit", "keep_limit", "sessions", "regions"),
    *("tenant_max_jobs", "tenant_max_queue", "tenant_memory_limit"),
    *("tenant_keep_limit", "tenant_max_sessions", "device_memory_limit"),
)
"""Limits that calls can meet, counted from 0 on."""

MOST_TENANTS = 500
"""Tenants that are counted by name: an issuer of JWTs can have any number."""

OTHER_TENANTS = "(others)"
"""The name under which further tenants are counted."""


class Totals(CallObserver):
    """Counts calls.

    Args:
        tenants: Whether to count by tenant, too.
    """

    def __init__(self, *, tenants: bool = False) -> None:
        self._open: set[Call] = set()
        """Calls that have not ended."""
        self._ended: dict[tuple[str, str, Reason | None], _Ended] = {
            (method, transport, reason): _Ended()
            for method, transport in _USUAL
            for reason in (None, *_FAULTS)
        } | {(method, "tcp", reason): _Ended() for method, reason in _SESSION_FAULTS}
        """By method, transport and reason."""
        self._stages = {method: _Stages() for method in JOB_METHODS}
        self._resumed = 0
        self._handed_over = 0
        self._retries_asked = 0
        self._refusals: Counter[str] = Counter(dict.fromkeys(_LIMITS, 0))
        self._credentials_refused = 0
        self._reports = dict.fromkeys(REPORTS, 0)
        self._tenants: dict[str, _Tenant] | None = {} if tenants else None

    def began(self, call: Call) -> None:
        """Count what a call does from now on."""
        self._open.add(call)

    def ended(
        self, call: Call, reason: Reason | None, error: JobError | None = None
    ) -> None:
        """Count an ended call."""
        self._open.discard(call)
        key = call.method, call.transport, reason
        ended = self._ended.get(key)
        if ended is None:
            ended = self._ended[key] = _Ended()
        ended.add(call)
        if call.admitted:
            self._stages[call.method].add(call)
            self._resumed += call.resumed
            self._handed_over += call.progress.handed_over
        if error is not None:
            self._refused(error)
        if self._tenants is not None:
            is_job = call.method in JOB_METHODS
            _tenant(self._tenants, call.tenant).add(call, reason, is_job=is_job)

    def credentials_refused(self, method: str, peer: str, why: str) -> None:
        """Count a refused caller."""
        del method, peer, why
        self._credentials_refused += 1

    def reported(self, report: str, job_id: str, tenant: str) -> None:
        """Count a client's report."""
        del job_id, tenant
        self._reports[report] += 1

    def figures(self) -> CallFigures:
        """Return what calls have done until now."""
        jobs: dict[JobKey, int] = {}
        others: Counter[CallKey] = Counter()
        moved: dict[Way, Bytes] = {}
        for (method, transport, reason), ended in self._ended.items():
            if method in JOB_METHODS:
                jobs[JobKey(method, transport, reason)] = ended.count
            else:
                others[CallKey(method, reason)] += ended.count
            way = Way(method, transport)
            had = moved.get(way, _NO_BYTES)
            moved[way] = Bytes(had.received + ended.received, had.sent + ended.sent)
        for call in self._open:
            way = Way(call.method, call.transport)
            moved[way] = _sum(moved.get(way, _NO_BYTES), call)
        return CallFigures(
            jobs=jobs,
            others=dict(others),
            bytes=moved,
            stages={method: each.times() for method, each in self._stages.items()},
            resumed=self._resumed,
            handed_over=self._handed_over,
            retries_asked=self._retries_asked,
            refusals=dict(self._refusals),
            credentials_refused=self._credentials_refused,
            reports=dict(self._reports),
            tenants=None if self._tenants is None else self._of_tenants(self._tenants),
        )

    def _of_tenants(self, tenants: dict[str, _Tenant]) -> dict[str, TenantTotals]:
        found = {name: each.totals() for name, each in tenants.items()}
        for call in self._open:
            name = _name(found, call.tenant)
            had = found.get(name, TenantTotals(0, 0, _NO_BYTES, 0.0))
            found[name] = had._replace(
                bytes=_sum(had.bytes, call),
                computing_s=had.computing_s + call.progress.times.computing_s,
            )
        return found

    def _refused(self, error: JobError) -> None:
        if error.retry_after_s is not None:
            self._retries_asked += 1
        limit = error.metadata.get("limit")
        if limit is not None:
            self._refusals[limit] += 1


@dataclass(slots=True)
class _Ended:
    """Ended calls that are counted together."""

    count: int = 0
    received: int = 0
    sent: int = 0

    def add(self, call: Call) -> None:
        progress = call.progress
        self.count += 1
        self.received += progress.bytes_received
        self.sent += progress.bytes_sent


_NO_BYTES = Bytes(0, 0)


def _sum(moved: Bytes, call: Call) -> Bytes:
    progress = call.progress
    return Bytes(
        moved.received + progress.bytes_received, moved.sent + progress.bytes_sent
    )


class _Seconds:
    __slots__ = ("counts", "sum_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_S) + 1)
        self.sum_s = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.sum_s += seconds

    def distribution(self) -> Distribution:
        return Distribution(tuple(self.counts), self.sum_s)


@dataclass(slots=True)
class _Stages:
    wait: _Seconds = field(default_factory=_Seconds)
    receive: _Seconds = field(default_factory=_Seconds)
    compute: _Seconds = field(default_factory=_Seconds)
    send: _Seconds = field(default_factory=_Seconds)
    total: _Seconds = field(default_factory=_Seconds)

    def add(self, call: Call) -> None:
        self.wait.add(call.waited_s)
        self.receive.add(call.receiving_s)
        self.compute.add(call.progress.times.computing_s)
        self.send.add(call.sending_s)
        self.total.add(time.perf_counter() - call.started)

    def times(self) -> StageTimes:
        return StageTimes(
            wait=self.wait.distribution(),
            receive=self.receive.distribution(),
            compute=self.compute.distribution(),
            send=self.send.distribution(),
            total=self.total.distribution(),
        )


@dataclass(slots=True)
class _Tenant:
    succeeded: int = 0
    failed: int = 0
    received: int = 0
    sent: int = 0
    computing_s: float = 0.0

    def add(self, call: Call, reason: Reason | None, *, is_job: bool) -> None:
        progress = call.progress
        self.received += progress.bytes_received
        self.sent += progress.bytes_sent
        self.computing_s += progress.times.computing_s
        if is_job and reason is None:
            self.succeeded += 1
        elif is_job:
            self.failed += 1

    def totals(self) -> TenantTotals:
        moved = Bytes(self.received, self.sent)
        return TenantTotals(self.succeeded, self.failed, moved, self.computing_s)


def _name(tenants: Collection[str], tenant: str) -> str:
    """Return the name under which a tenant is counted."""
    if tenant in tenants or len(tenants) < MOST_TENANTS:
        return tenant
    return OTHER_TENANTS


def _tenant(tenants: dict[str, _Tenant], tenant: str) -> _Tenant:
    name = _name(tenants, tenant)
    found = tenants.get(name)
    if found is None:
        found = tenants[name] = _Tenant()
    return found
