"""Which device a job runs on: bookkeeping of what each has to do and to hold.

A job goes to the lane that will be free first, of those whose device has the
memory for it. A lane will be free when the operations are done that its jobs
still have to do, at the rate that it has shown. Of lanes that will be free at
the same time the one with the fewest jobs is taken, and of those the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from gradwire_protocol.job_spec import JobSpec
from gradwire_server.backends.row_blocks import Plan
from gradwire_server.scheduling.job_progress import JobProgress


@dataclass(slots=True, eq=False)
class Load:
    """What a job is for the lane that it runs on.

    Operations are multiplications and additions.
    """

    row_operations: int
    """Operations of a row."""
    block_rows: int
    m: int | None
    """Rows of the job; None while nobody knows. Those before the first that is
    sent do not count."""
    device_bytes: int
    """What it holds of its device's memory."""
    progress: JobProgress
    """Told by the job how far it has come, in whatever thread."""
    first_row: int = 0
    """The first row that is sent."""

    @property
    def done(self) -> int:
        """Operations that are done."""
        rows = self.progress.blocks * self.block_rows
        return self.row_operations * (rows if self.m is None else min(rows, self.m))

    @property
    def remaining_ops(self) -> int:
        """Operations that are not.

        Where m is open: those of the row blocks that have come, and of one
        more, because there is no telling.
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
    spec: JobSpec, plan: Plan, device_bytes: int, progress: JobProgress
) -> Load:
    """The load that a job is."""
    return Load(
        row_operations=2 * len(spec.results) * spec.n * spec.k,
        block_rows=plan.block_rows,
        m=None if spec.m is None else spec.m - spec.first_row,
        device_bytes=device_bytes,
        progress=progress,
        first_row=spec.first_row,
    )


@dataclass(slots=True, eq=False)
class _DeviceLoad:
    limit_bytes: int | None
    held_bytes: int = 0
    jobs: list[Load] = field(default_factory=list)
    done: int = 0
    """Operations of jobs that have left."""
    computing_s: float = 0.0
    """How long those took."""

    def holds(self, size_bytes: int) -> bool:
        return self.limit_bytes is None or (
            self.held_bytes + size_bytes <= self.limit_bytes
        )

    def shown(self) -> tuple[int, float]:
        """Operations that were done here, and the seconds that they took."""
        done, computing_s = self.done, self.computing_s
        for job in self.jobs:
            done += job.done
            computing_s += job.progress.times.computing_s
        return done, computing_s


class DeviceSelector:
    """The lanes of a server, by their position.

    Args:
        limits: Most bytes of each one's device that jobs may hold; None where
            the device has no memory of its own.
    """

    def __init__(self, limits: Sequence[int | None] = (None,)) -> None:
        self._devices = [_DeviceLoad(limit) for limit in limits]

    @property
    def max_bytes(self) -> int | None:
        """What a job may hold of a device at most; None: any amount."""
        limits = [lane.limit_bytes for lane in self._devices]
        known = [limit for limit in limits if limit is not None]
        return max(known) if len(known) == len(limits) else None

    def held_bytes(self, position: int) -> int:
        """What jobs hold of a lane's device."""
        return self._devices[position].held_bytes

    def assign(self, job: Load) -> int | None:
        """Gives a job its lane, and its bytes there.

        Returns:
            The lane's position; None: no device has the memory now.
        """
        position = self._first_free(job.device_bytes)
        if position is not None:
            lane = self._devices[position]
            lane.jobs.append(job)
            lane.held_bytes += job.device_bytes
        return position

    def release(self, job: Load, position: int) -> None:
        """The job has left its lane; how fast it was is remembered."""
        lane = self._devices[position]
        lane.jobs.remove(job)
        lane.held_bytes -= job.device_bytes
        lane.done += job.done
        lane.computing_s += job.progress.times.computing_s

    def _first_free(self, size_bytes: int) -> int | None:
        fitting = [
            position
            for position, lane in enumerate(self._devices)
            if lane.holds(size_bytes)
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
        """Operations a second of each lane.

        One that has shown none counts as the others together have shown; all
        are equal before any has.
        """
        shown = [lane.shown() for lane in self._devices]
        known = [(done, s) for done, s in shown if done and s > 0]
        usual = sum(d for d, _ in known) / sum(s for _, s in known) if known else 1.0
        return [done / s if done and s > 0 else usual for done, s in shown]
