"""Choice of a job's device, by remaining work and free memory.

A job goes to the device that will be free first among the devices with enough memory. A
device is free when the remaining operations of its jobs are done, at its measured rate.
Ties go to the device with the fewest jobs, then to the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from gradwire_protocol.job_spec import JobSpec
from gradwire_server.backends.row_blocks import RowBlockPlan
from gradwire_server.scheduling.job_progress import JobProgress


@dataclass(slots=True, eq=False)
class Load:
    """A job's load on its device.

    Operations are multiplications and additions.
    """

    row_operations: int
    """Operations per row."""
    block_rows: int
    m: int | None
    """Rows from `first_row` on; None while unknown."""
    device_bytes: int
    """Bytes that the job reserves of its device's memory."""
    progress: JobProgress
    """Counters that the job updates from any thread."""
    first_row: int = 0
    """First row that the client sends."""
    device: int | None = None
    """Position of the device that the job must have; None: any."""

    @property
    def done(self) -> int:
        """Operations done."""
        rows = self.progress.blocks * self.block_rows
        m = self.m
        if m is None and self.progress.ended:
            m = self.progress.m - self.first_row
        return self.row_operations * (rows if m is None else min(rows, m))

    @property
    def remaining_ops(self) -> int:
        """Operations still to do.

        While m is unknown, count the row blocks received so far and one more.
        """
        done = self.progress.blocks * self.block_rows
        if self.m is not None:
            rows = self.m
        elif self.progress.ended:
            rows = self.progress.m - self.first_row
        else:
            rows = (self.progress.blocks_received + 1) * self.block_rows
        return self.row_operations * max(rows - done, 0)


def make_load(
    spec: JobSpec,
    plan: RowBlockPlan,
    device_bytes: int,
    progress: JobProgress,
    device: int | None = None,
) -> Load:
    """Return a job's load."""
    return Load(
        row_operations=spec.row_operations,
        block_rows=plan.block_rows,
        m=None if spec.m is None else spec.m - spec.first_row,
        device_bytes=device_bytes,
        progress=progress,
        first_row=spec.first_row,
        device=device,
    )


@dataclass(slots=True, eq=False)
class _DeviceLoad:
    limit_bytes: int | None
    held_bytes: int = 0
    """Bytes of jobs and sessions."""
    kept_bytes: int = 0
    """Bytes of sessions."""
    jobs: list[Load] = field(default_factory=list)
    done: int = 0
    """Operations done by jobs that have left."""
    computing_s: float = 0.0
    """Computing time of the jobs that have left."""
    row_blocks: int = 0
    """Row blocks of the jobs that have left."""

    def has_room(self, size_bytes: int) -> bool:
        return self.limit_bytes is None or (
            self.held_bytes + size_bytes <= self.limit_bytes
        )

    def measured(self) -> tuple[int, float]:
        """Return the operations done on this device, and their seconds."""
        done, computing_s = self.done, self.computing_s
        for job in self.jobs:
            done += job.done
            computing_s += job.progress.times.computing_s
        return done, computing_s


class DeviceUse(NamedTuple):
    """A device's jobs, and what jobs have done on it from the start."""

    jobs: int
    operations: int
    """Multiplications and additions."""
    row_blocks: int
    held_bytes: int
    limit_bytes: int | None


class DeviceSelector:
    """The devices of a server, by position.

    Args:
        limits: Most bytes of each device's memory that jobs and sessions may hold; None
            for a device without its own memory.
    """

    def __init__(self, limits: Sequence[int | None] = (None,)) -> None:
        self._devices = [_DeviceLoad(limit) for limit in limits]

    @property
    def max_bytes(self) -> int | None:
        """Most device memory that one job can hold, in bytes; None: unlimited."""
        limits = [device.limit_bytes for device in self._devices]
        known = [limit for limit in limits if limit is not None]
        return max(known) if len(known) == len(limits) else None

    def limit(self, position: int) -> int | None:
        """Return the most bytes of a device's memory; None: it has none of its own."""
        return self._devices[position].limit_bytes

    def held_bytes(self, position: int) -> int:
        """Return the bytes that jobs and sessions hold of a device's memory."""
        return self._devices[position].held_bytes

    def use(self, position: int) -> DeviceUse:
        """Return what a device has done, and what jobs hold of it now."""
        device = self._devices[position]
        return DeviceUse(
            jobs=len(device.jobs),
            operations=device.measured()[0],
            row_blocks=device.row_blocks + sum(j.progress.blocks for j in device.jobs),
            held_bytes=device.held_bytes,
            limit_bytes=device.limit_bytes,
        )

    def kept_bytes(self, position: int) -> int:
        """Return the bytes that sessions hold of a device's memory."""
        return self._devices[position].kept_bytes

    def keep(self, size_bytes: int, position: int) -> None:
        """Count a session's bytes of a device's memory; negative: no longer."""
        self._devices[position].held_bytes += size_bytes
        self._devices[position].kept_bytes += size_bytes

    def can_run(self, job: Load, *, beside_sessions: bool) -> bool:
        """Return whether a device has the memory for a job once other jobs have ended.

        Args:
            job: The job.
            beside_sessions: Whether the open sessions stay.
        """
        return any(
            device.limit_bytes is None
            or job.device_bytes + beside_sessions * device.kept_bytes
            <= device.limit_bytes
            for position, device in enumerate(self._devices)
            if job.device in {None, position}
        )

    def assign(self, job: Load) -> int | None:
        """Choose a job's device and reserve the job's bytes there.

        Returns:
            The device's position, or None if no device has enough memory now.
        """
        position = self._first_free(job)
        if position is not None:
            device = self._devices[position]
            device.jobs.append(job)
            device.held_bytes += job.device_bytes
        return position

    def release(self, job: Load, position: int) -> None:
        """Remove a job from its device, and keep its work in the measured rate."""
        device = self._devices[position]
        device.jobs.remove(job)
        device.held_bytes -= job.device_bytes
        device.done += job.done
        device.computing_s += job.progress.times.computing_s
        device.row_blocks += job.progress.blocks

    def _first_free(self, job: Load) -> int | None:
        fitting = [
            position
            for position, device in enumerate(self._devices)
            if device.has_room(job.device_bytes) and job.device in {None, position}
        ]
        if len(fitting) < 2:
            return fitting[0] if fitting else None
        rates = self._rates()
        return min(fitting, key=lambda position: self._order(position, rates))

    def _order(self, position: int, rates: list[float]) -> tuple[float, int, int]:
        jobs = self._devices[position].jobs
        remaining_ops = sum(job.remaining_ops for job in jobs)
        return remaining_ops / rates[position], len(jobs), position

    def _rates(self) -> list[float]:
        """Return the operations per second of each device.

        A device without measurements gets the pooled rate of the others. Without any
        measurements all rates are equal.
        """
        measured = [device.measured() for device in self._devices]
        known = [(done, s) for done, s in measured if done and s > 0]
        usual = sum(d for d, _ in known) / sum(s for _, s in known) if known else 1.0
        return [done / s if done and s > 0 else usual for done, s in measured]
