"""A server's figures in Prometheus' format.

Names and units follow https://prometheus.io/docs/practices/naming/. A label has few
values: methods, transports, statuses, reasons, limits and devices. Tenants have
metrics of their own, which are left out unless they are counted.

Needs prometheus-client, of the extra `server`; imported where metrics are served.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from operator import add
from typing import TypeAlias

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from gradwire_protocol.error_reasons import Reason
from gradwire_server.observability.figures import (
    BOUNDS_S,
    JOB_METHODS,
    AdmissionFigures,
    CallFigures,
    DataSocketFigures,
    DeviceFigures,
    Distribution,
    Figures,
    TenantTotals,
    TenantUse,
)
from gradwire_server.observability.totals import OTHER_TENANTS

Labelled: TypeAlias = Iterable[tuple[tuple[str, ...], float]]
"""Values with the values of their labels."""


def render(figures: Figures, accept: str) -> tuple[bytes, str]:
    """Return the metrics' text and its content type.

    Args:
        figures: The figures.
        accept: The request's header "Accept", which chooses between Prometheus' format
            and OpenMetrics.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_FiguresCollector(figures))
    ProcessCollector(registry=registry)
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


class _FiguresCollector(Collector):
    def __init__(self, figures: Figures) -> None:
        self._figures = figures

    def collect(self) -> Iterator[Metric]:
        """Yield every metric."""
        figures = self._figures
        yield from _of_server(figures)
        yield from _of_calls(figures.calls)
        yield from _of_stages(figures.calls)
        yield from _of_admission(figures.admission)
        yield from _of_devices(figures.devices)
        yield from _of_memory_kept(figures)
        if figures.data_sockets is not None:
            yield _of_data_sockets(figures.data_sockets)
        if figures.calls.tenants is not None:
            yield from _of_tenants(figures.calls.tenants, figures.admission.tenants)


def _of_server(figures: Figures) -> Iterator[Metric]:
    libraries = {
        label_name(name): version for name, version in figures.libraries.items()
    }
    yield _gauge(
        "build_info",
        "Versions of the server and of what it computes with. Always 1.",
        [((figures.version, figures.python, figures.backend, *libraries.values()), 1)],
        "version", "python", "backend", *libraries,
    )  # fmt: skip
    yield _gauge(
        "draining",
        "Whether the server is about to stop and refuses new jobs.",
        _one(figures.admission.draining),
    )


def label_name(library: str) -> str:
    """Return a valid name of a label for the version of a library."""
    name = re.sub("[^A-Za-z0-9]+", "_", library).strip("_").lower()
    taken = {"", "version", "python", "backend"}
    return f"library_{name}" if name in taken or name[0].isdigit() else name


def _of_calls(calls: CallFigures) -> Iterator[Metric]:
    yield _counter(
        "jobs",
        "Ended jobs, by gRPC status (outcome) and gradwire's reason for it, which is "
        "empty for those that succeeded.",
        (
            ((key.method, key.transport, _outcome(key.reason), key.reason or ""), count)
            for key, count in calls.jobs.items()
        ),
        "method", "transport", "outcome", "reason",
    )  # fmt: skip
    for name, what, sessions in (
        ("session_calls", "calls of sessions", True),
        ("region_calls", "calls that open shared memory, which end when it is closed",
         False),
    ):  # fmt: skip
        yield _counter(
            name,
            f"Ended {what}, by gRPC status (outcome) and gradwire's reason for it.",
            (
                ((key.method, _outcome(key.reason), key.reason or ""), count)
                for key, count in calls.others.items()
                if (key.method != "OpenRegion") is sessions
            ),
            "method", "outcome", "reason",
        )  # fmt: skip
    for position, name, what, method in (
        (0, "received_bytes", "operands and tensors received", "PutTensor"),
        (1, "sent_bytes", "results and tensors sent", "GetTensor"),
    ):
        yield _counter(
            name,
            f"Bytes of the elements of {what}, by method and transport. Bytes in "
            "shared memory count, too.",
            (
                (tuple(way), moved[position])
                for way, moved in calls.bytes.items()
                if way.method in {*JOB_METHODS, method}
            ),
            "method", "transport",
        )  # fmt: skip
    yield _counter(
        "resumed_jobs",
        "Ended jobs that went on where another one was cut off.",
        _one(calls.resumed),
    )
    yield _counter(
        "handed_over_jobs",
        "Jobs that ended with a checkpoint because the server stops.",
        _one(calls.handed_over),
    )
    yield _counter(
        "retries_asked",
        "Refused calls whose clients were told when to try again.",
        _one(calls.retries_asked),
    )
    yield _counter(
        "refusals",
        "Calls that were refused because a limit was met, by the limit.",
        (((limit,), count) for limit, count in calls.refusals.items()),
        "limit",
    )
    yield _counter(
        "auth_failures",
        "Calls that were refused for missing or wrong credentials.",
        _one(calls.credentials_refused),
    )
    yield _counter(
        "checksum_failures",
        "Calls that ended because an element was damaged on its way to the server.",
        _one(_with_reason(calls, Reason.CHECKSUM_MISMATCH)),
    )
    yield _counter(
        "reported_failures",
        "Failures of results that clients found and reported: damaged on the way, or "
        "wrong.",
        (((report,), count) for report, count in calls.reports.items()),
        "failure",
    )


def _of_stages(calls: CallFigures) -> Iterator[Metric]:
    for stage, name, what in (
        ("wait", "wait", "waited for memory and their turn"),
        ("receive", "receive", "waited for and read their clients' messages"),
        ("compute", "compute", "were computed on their device"),
        ("send", "send", "sent results and waited for their clients to read"),
        ("total", "duration", "took from the first message to the last"),
    ):
        histogram = HistogramMetricFamily(
            f"gradwire_job_{name}_seconds",
            f"Seconds that admitted jobs {what}, counted when they end.",
            labels=["method"],
        )
        for method, times in calls.stages.items():
            distribution: Distribution = getattr(times, stage)
            histogram.add_metric(
                [method], _buckets(distribution), sum_value=distribution.sum_s
            )
        yield histogram


def _of_admission(admission: AdmissionFigures) -> Iterator[Metric]:
    for name, what, value in (
        ("running_jobs", "Jobs that run now.", admission.running_jobs),
        ("running_jobs_limit", "Most jobs that run at once.", admission.max_jobs),
        ("queued_jobs", "Jobs that wait for their turn.", admission.waiting_jobs),
        ("queued_jobs_limit", "Most jobs that wait at once.", admission.max_queue),
        (
            "queue_oldest_wait_seconds",
            "Seconds that the job which waits longest has waited; 0 if none waits.",
            admission.oldest_wait_s,
        ),
        (
            "memory_held_bytes",
            "Host memory held by jobs, open calls, sessions and shared memory.",
            admission.held_bytes,
        ),
        (
            "memory_limit_bytes",
            "Most host memory that may be held at once.",
            admission.limit_bytes,
        ),
    ):
        yield _gauge(name, what, _one(value))


def _of_devices(devices: tuple[DeviceFigures, ...]) -> Iterator[Metric]:
    def each(field: str) -> Labelled:
        for device in devices:
            value = getattr(device, field)
            if value is not None:
                yield (str(device.index),), value

    yield _gauge(
        "device_info",
        "The devices that compute. Always 1.",
        (
            ((str(d.index), d.name, d.backend, d.compute_capability), 1)
            for d in devices
        ),
        "device", "name", "backend", "compute_capability",
    )  # fmt: skip
    yield _gauge(
        "device_running_jobs", "Jobs that run on the device now.",
        each("running_jobs"), "device",
    )  # fmt: skip
    yield _gauge(
        "device_busy", "Whether the device's worker thread has work now.",
        each("busy"), "device",
    )  # fmt: skip
    yield _counter(
        "device_busy_seconds",
        "Seconds that the device's worker thread had work. Small calls are computed "
        "beside it.",
        each("busy_s"), "device",
    )  # fmt: skip
    yield _counter("row_blocks", "Row blocks computed.", each("row_blocks"), "device")
    yield _counter(
        "floating_point_operations",
        "Multiplications and additions of the products computed.",
        each("operations"), "device",
    )  # fmt: skip
    yield _gauge(
        "device_memory_held_bytes", "The device's own memory held by jobs.",
        each("held_bytes"), "device",
    )  # fmt: skip
    yield _gauge(
        "device_memory_limit_bytes",
        "Most of the device's own memory that jobs may hold at once. A processor has "
        "none.",
        each("limit_bytes"), "device",
    )  # fmt: skip


def _of_memory_kept(figures: Figures) -> Iterator[Metric]:
    sessions, regions = figures.sessions, figures.regions
    for name, what, value in (
        ("sessions", "Open sessions.", sessions.open),
        (
            "session_reserved_bytes",
            "Memory reserved by sessions, used or not.",
            sessions.reserved_bytes,
        ),
        (
            "session_used_bytes",
            "Memory used by the tensors of sessions.",
            sessions.used_bytes,
        ),
        (
            "session_limit_bytes",
            "Most memory that sessions may reserve together.",
            sessions.limit_bytes,
        ),
        ("regions", "Open regions of shared memory.", regions.open),
        ("region_bytes", "Size of the open regions.", regions.size_bytes),
    ):
        yield _gauge(name, what, _one(value))
    yield _counter(
        "sessions_expired",
        "Sessions that were closed because no call came within their lease.",
        _one(sessions.expired),
    )


def _of_data_sockets(sockets: DataSocketFigures) -> Metric:
    return _gauge(
        "data_sockets",
        "Open sockets of direct connections: attached to a job, idle until the next "
        "one, or pending before their first.",
        (((state,), count) for state, count in sockets._asdict().items()),
        "state",
    )


def _of_tenants(
    totals: Mapping[str, TenantTotals], use: tuple[TenantUse, ...]
) -> Iterator[Metric]:
    yield _counter(
        "tenant_jobs",
        "Ended jobs of each tenant.",
        (
            ((tenant, outcome), count)
            for tenant, each in totals.items()
            for outcome, count in (("ok", each.succeeded), ("failed", each.failed))
        ),
        "tenant", "outcome",
    )  # fmt: skip
    for name, what, position in (
        ("tenant_received_bytes", "received from", 0),
        ("tenant_sent_bytes", "sent to", 1),
    ):
        yield _counter(
            name,
            f"Bytes of elements {what} each tenant.",
            (((tenant,), each.bytes[position]) for tenant, each in totals.items()),
            "tenant",
        )
    yield _counter(
        "tenant_compute_seconds",
        "Seconds that devices computed for each tenant.",
        (((tenant,), each.computing_s) for tenant, each in totals.items()),
        "tenant",
    )
    held: dict[str, tuple[int, ...]] = {}
    for each in use:
        name = each.tenant if each.tenant in totals else OTHER_TENANTS
        had = held.get(name, (0, 0, 0))
        now = (each.running_jobs, each.waiting_jobs, each.held_bytes)
        held[name] = tuple(map(add, had, now))
    for position, name, what in (
        (0, "tenant_running_jobs", "Running jobs of each tenant."),
        (1, "tenant_queued_jobs", "Waiting jobs of each tenant."),
        (2, "tenant_memory_held_bytes", "Memory held by each tenant."),
    ):
        yield _gauge(
            name,
            what,
            (((tenant,), each[position]) for tenant, each in held.items()),
            "tenant",
        )


def _gauge(name: str, what: str, values: Labelled, *labels: str) -> Metric:
    family = GaugeMetricFamily(f"gradwire_{name}", what, labels=labels)
    for of, value in values:
        family.add_metric(of, float(value))
    return family


def _counter(name: str, what: str, values: Labelled, *labels: str) -> Metric:
    family = CounterMetricFamily(f"gradwire_{name}", what, labels=labels)
    for of, value in values:
        family.add_metric(of, float(value))
    return family


def _one(value: float) -> Labelled:
    return [((), value)]


def _buckets(distribution: Distribution) -> list[tuple[str, float]]:
    bounds = [*(f"{bound:g}" for bound in BOUNDS_S), "+Inf"]
    buckets, reached = [], 0
    for bound, count in zip(bounds, distribution.counts, strict=True):
        reached += count
        buckets.append((bound, float(reached)))
    return buckets


def _outcome(reason: Reason | None) -> str:
    return "OK" if reason is None else reason.status.name


def _with_reason(calls: CallFigures, reason: Reason) -> int:
    jobs = sum(n for key, n in calls.jobs.items() if key.reason is reason)
    return jobs + sum(n for key, n in calls.others.items() if key.reason is reason)
