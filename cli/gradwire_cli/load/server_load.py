"""What a server does: the difference between two readings of its metrics."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from gradwire_cli.load.metrics_page import MetricsPage


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory in bytes."""

    held: int
    limit: int


@dataclass(frozen=True, slots=True)
class Jobs:
    """Jobs now, and those that ended between the readings."""

    running: int
    running_limit: int
    queued: int
    queued_limit: int
    oldest_wait_s: float
    """How long the job that waits longest has waited; 0 if none waits."""
    ended_per_s: float
    """Jobs that succeeded, each second."""
    failed_per_s: float
    mean_wait_s: float | None
    """Mean wait of the admitted jobs that ended; None: none ended."""
    mean_duration_s: float | None


@dataclass(frozen=True, slots=True)
class DeviceLoad:
    """One device."""

    index: int
    name: str
    backend: str
    running_jobs: int
    busy: float
    """Share of the time in which its worker thread computed, 0 to 1."""
    row_blocks_per_s: float
    flop_per_s: float
    """Multiplications and additions each second."""
    memory: Memory | None
    """Memory of its own; None if it computes in host memory."""


@dataclass(frozen=True, slots=True)
class SessionLoad:
    """The sessions. All sizes are in bytes."""

    open: int
    used: int
    reserved: int
    limit: int


@dataclass(frozen=True, slots=True)
class TenantLoad:
    """One tenant."""

    tenant: str
    running: int
    queued: int
    held: int
    """Memory in bytes."""
    received_per_s: float
    """Bytes of elements each second."""
    sent_per_s: float


@dataclass(frozen=True, slots=True)
class ServerLoad:
    """A server's load."""

    url: str
    version: str
    backend: str
    draining: bool
    interval_s: float
    """Time between the readings."""
    jobs: Jobs
    received_per_s: float
    """Bytes of operands each second, over every transport."""
    sent_per_s: float
    """Bytes of results each second."""
    flop_per_s: float
    """Multiplications and additions each second, on all devices."""
    memory: Memory
    """Host memory."""
    devices: tuple[DeviceLoad, ...]
    sessions: SessionLoad
    tenants: tuple[TenantLoad, ...] | None
    """None: the server counts no tenants (``--metrics-tenants``)."""


def load_between(url: str, first: MetricsPage, last: MetricsPage) -> ServerLoad:
    """Return a server's load between two readings of its metrics."""
    change = _Change(first, last)
    (build, _), *_ = last.each("build_info")
    return ServerLoad(
        url=url,
        version=build["version"],
        backend=build["backend"],
        draining=bool(last.sum("draining")),
        interval_s=change.seconds,
        jobs=_jobs(change),
        received_per_s=change.per_s("received_bytes_total"),
        sent_per_s=change.per_s("sent_bytes_total"),
        flop_per_s=change.per_s("floating_point_operations_total"),
        memory=Memory(
            int(last.sum("memory_held_bytes")), int(last.sum("memory_limit_bytes"))
        ),
        devices=_devices(change),
        sessions=SessionLoad(
            open=int(last.sum("sessions")),
            used=int(last.sum("session_used_bytes")),
            reserved=int(last.sum("session_reserved_bytes")),
            limit=int(last.sum("session_limit_bytes")),
        ),
        tenants=_tenants(change),
    )


class _Change:
    """The change of a server's metrics."""

    def __init__(self, first: MetricsPage, last: MetricsPage) -> None:
        self.first, self.last = first, last
        self.seconds = max(last.read_at - first.read_at, 1e-9)

    def of(self, name: str, **labels: str) -> float:
        """Return by how much the sum of counters has grown."""
        return _grown(self.last.sum(name, **labels), self.first.sum(name, **labels))

    def per_s(self, name: str, **labels: str) -> float:
        """Return the growth each second."""
        return self.of(name, **labels) / self.seconds

    def each_per_s(self, name: str, label: str) -> dict[str, float]:
        """Return the growth each second for each value of a label."""
        before = self.first.by(name, label)
        return {
            of: _grown(now, before.get(of, 0.0)) / self.seconds
            for of, now in self.last.by(name, label).items()
        }

    def mean(self, histogram: str) -> float | None:
        """Return the mean of what was added to a histogram; None: nothing was."""
        count = self.of(f"{histogram}_count")
        return self.of(f"{histogram}_sum") / count if count else None


def _grown(now: float, before: float) -> float:
    """Return by how much a counter has grown.

    One that fell began at 0 in between, because the server was started anew.
    """
    return now - before if now >= before else now


def _jobs(change: _Change) -> Jobs:
    last = change.last
    succeeded = change.per_s("jobs_total", outcome="OK")
    return Jobs(
        running=int(last.sum("running_jobs")),
        running_limit=int(last.sum("running_jobs_limit")),
        queued=int(last.sum("queued_jobs")),
        queued_limit=int(last.sum("queued_jobs_limit")),
        oldest_wait_s=last.sum("queue_oldest_wait_seconds"),
        ended_per_s=succeeded,
        failed_per_s=max(change.per_s("jobs_total") - succeeded, 0.0),
        mean_wait_s=change.mean("job_wait_seconds"),
        mean_duration_s=change.mean("job_duration_seconds"),
    )


def _devices(change: _Change) -> tuple[DeviceLoad, ...]:
    now = partial(change.last.by, label="device")
    per_s = partial(change.each_per_s, label="device")
    running, busy = now("device_running_jobs"), per_s("device_busy_seconds_total")
    blocks = per_s("row_blocks_total")
    operations = per_s("floating_point_operations_total")
    held, limits = now("device_memory_held_bytes"), now("device_memory_limit_bytes")
    return tuple(
        DeviceLoad(
            index=int(index),
            name=labels["name"],
            backend=labels["backend"],
            running_jobs=int(running.get(index, 0)),
            busy=min(busy.get(index, 0.0), 1.0),
            row_blocks_per_s=blocks.get(index, 0.0),
            flop_per_s=operations.get(index, 0.0),
            memory=(
                Memory(int(held.get(index, 0)), int(limits[index]))
                if limits.get(index)
                else None
            ),
        )
        for labels, _ in change.last.each("device_info")
        for index in (labels["device"],)
    )


def _tenants(change: _Change) -> tuple[TenantLoad, ...] | None:
    last = change.last
    if "tenant_jobs_total" not in last.samples:
        return None
    now = partial(last.by, label="tenant")
    running, queued = now("tenant_running_jobs"), now("tenant_queued_jobs")
    held = now("tenant_memory_held_bytes")
    received = change.each_per_s("tenant_received_bytes_total", "tenant")
    sent = change.each_per_s("tenant_sent_bytes_total", "tenant")
    return tuple(
        TenantLoad(
            tenant=name,
            running=int(running.get(name, 0)),
            queued=int(queued.get(name, 0)),
            held=int(held.get(name, 0)),
            received_per_s=received.get(name, 0.0),
            sent_per_s=sent.get(name, 0.0),
        )
        for name in sorted(now("tenant_jobs_total"))
    )
