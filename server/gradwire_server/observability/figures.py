"""The figures of a server at one moment: what it does, holds and has done.

Metrics and other views of a server are made of them. Figures of what has been done
only grow, from the server's start; they include what running jobs have done so far.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from gradwire_protocol.error_reasons import Reason

JOB_METHODS = ("Compute", "ComputeStream")
"""The methods whose calls are jobs."""


class TenantUse(NamedTuple):
    """What a tenant has now."""

    tenant: str
    running_jobs: int
    waiting_jobs: int
    held_bytes: int
    """Memory held by its jobs, open calls, sessions and regions."""


class AdmissionFigures(NamedTuple):
    """Jobs and host memory, with their limits."""

    running_jobs: int
    max_jobs: int
    waiting_jobs: int
    max_queue: int
    oldest_wait_s: float
    """How long the job that waits longest has waited; 0 if none waits."""
    held_bytes: int
    limit_bytes: int
    draining: bool
    tenants: tuple[TenantUse, ...]


@dataclass(frozen=True, slots=True)
class DeviceFigures:
    """One device."""

    index: int
    name: str
    backend: str
    compute_capability: str
    running_jobs: int
    busy: bool
    """Whether its worker thread computes now."""
    busy_s: float
    """Seconds that its worker thread has computed."""
    row_blocks: int
    operations: int
    """Multiplications and additions done."""
    held_bytes: int
    """Memory of its own held by jobs."""
    limit_bytes: int | None
    """None if it computes in host memory."""


class SessionFigures(NamedTuple):
    """The sessions."""

    open: int
    reserved_bytes: int
    used_bytes: int
    """The part of `reserved_bytes` that their tensors use."""
    limit_bytes: int
    expired: int


class RegionFigures(NamedTuple):
    """Memory shared with clients."""

    open: int
    size_bytes: int


class DataSocketFigures(NamedTuple):
    """Open sockets of direct connections."""

    pending: int
    idle: int
    attached: int


class JobKey(NamedTuple):
    """Jobs that are counted together."""

    method: str
    transport: str
    reason: Reason | None
    """None: the job succeeded."""


class CallKey(NamedTuple):
    """Calls other than jobs that are counted together."""

    method: str
    reason: Reason | None


class Way(NamedTuple):
    """How elements travel."""

    method: str
    transport: str


class Bytes(NamedTuple):
    """Bytes of elements."""

    received: int
    sent: int


class Distribution(NamedTuple):
    """Seconds of many jobs."""

    counts: tuple[int, ...]
    """Number of jobs up to each of `BOUNDS_S` and above the bound before, and of those
    above the last."""
    sum_s: float


class StageTimes(NamedTuple):
    """Seconds of the admitted jobs of one method, in each stage. Stages overlap."""

    wait: Distribution
    """For memory and their turn."""
    receive: Distribution
    compute: Distribution
    send: Distribution
    total: Distribution


class TenantTotals(NamedTuple):
    """What the jobs of one tenant have done."""

    succeeded: int
    failed: int
    bytes: Bytes
    computing_s: float


BOUNDS_S = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5,
    1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
)  # fmt: skip
"""Bounds of distributions: from the smallest call to a job of some minutes."""


@dataclass(frozen=True, slots=True)
class CallFigures:
    """What calls have done."""

    jobs: Mapping[JobKey, int]
    others: Mapping[CallKey, int]
    """Calls that are no jobs: of sessions and of shared memory."""
    bytes: Mapping[Way, Bytes]
    stages: Mapping[str, StageTimes]
    """By method."""
    resumed: int
    """Jobs that went on where another one was cut off."""
    handed_over: int
    """Jobs that ended with a checkpoint because the server stops."""
    retries_asked: int
    """Calls whose clients were told when to try again."""
    refusals: Mapping[str, int]
    """Refused calls, by the limit that was met."""
    credentials_refused: int
    reports: Mapping[str, int]
    """Failures that clients found, by what they report."""
    tenants: Mapping[str, TenantTotals] | None
    """By tenant; None if they are not counted."""


@dataclass(frozen=True, slots=True)
class Figures:
    """All figures of a server."""

    version: str
    python: str
    backend: str
    libraries: Mapping[str, str]
    """Versions of the libraries, by name."""
    admission: AdmissionFigures
    devices: tuple[DeviceFigures, ...]
    sessions: SessionFigures
    regions: RegionFigures
    data_sockets: DataSocketFigures | None
    """None if there are no direct connections."""
    calls: CallFigures
