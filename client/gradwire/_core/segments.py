"""Segments: the parts of a job that several servers compute, without I/O.

A segment is a fixed number of rows, whole row blocks. Its sums of dW and dB begin at
zero, and the sums of all segments are added in their order. So the last bits depend
neither on the number of servers nor on the order in which they finish.
"""

from __future__ import annotations

import itertools
import math
import statistics
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from gradwire._api.types import Array
from gradwire._core.job_plan import Plan
from gradwire_protocol.dtypes import Dtype, rounded
from gradwire_protocol.limits import MIB
from gradwire_protocol.matrices import Matrix
from gradwire_protocol.row_blocks import rows_of_a_block, segment_rows

RUN_BYTES = 64 * MIB
"""Bytes of operands of a job of several segments: a job costs some 10 ms of processor
time at both ends together, however small it is."""

HELD_BYTES = 16 * MIB
"""Bytes of sums that may be held ahead in any case."""

JOBS_PER_DEVICE = 2
"""Jobs of one segment at the same time: while one is computed, the other is on its way.
A job of several segments overlaps both by itself."""

SLOW = 2.0
"""How many times as long as the others a run may take, before another server computes
it, too. The tail of a job is then at most so much longer: J. Dean and S. Ghemawat,
MapReduce, OSDI 2004, section 3.6."""

LEAST_SLOW_S = 0.2
"""Seconds by which a run may be late in any case."""

RECENT = 32
"""Runs whose times count for `SLOW`."""

MOST_LATER = 16
"""Most additional jobs at the same time, on servers that join meanwhile."""

ASK_AGAIN_S = 1.0
"""Seconds after which a task that waits for work looks again, in any case: another
server may be there."""

Sums = Mapping[Matrix, Array]


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive segments that travel in one job."""

    number: int
    """Number of the run, from 0."""

    first_segment: int
    """Number of its first segment."""

    segments: int
    """Number of its segments."""

    first_row: int
    """The first row."""

    rows: int
    """Number of rows. The last segment may be short, or empty."""


@dataclass(frozen=True)
class Division:
    """The division of a job into segments, and of those into runs."""

    m: int
    """Rows of the job."""

    segment_rows: int
    """Rows of a segment."""

    lengths: tuple[int, ...] = ()
    """Segments of each run; empty: one."""

    @property
    def segments(self) -> int:
        """Number of segments, at least 1."""
        return max(1, -(-self.m // self.segment_rows))

    @property
    def run_count(self) -> int:
        """Number of runs."""
        return len(self.lengths) or self.segments

    def run(self, number: int) -> Run:
        """Return a run."""
        first, segments = number, 1
        if self.lengths:
            first, segments = self._starts[number], self.lengths[number]
        first_row = first * self.segment_rows
        rows = min(segments * self.segment_rows, self.m - first_row)
        return Run(number, first, segments, first_row, rows)

    def runs(self) -> Iterator[Run]:
        """Yield the runs in order."""
        return map(self.run, range(self.run_count))

    @property
    def jobs_per_device(self) -> int:
        """Jobs at the same time on a device."""
        return 1 if self.lengths else JOBS_PER_DEVICE

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *itertools.accumulate(self.lengths)]


def block_rows_of(plan: Plan, row_block_bytes: int) -> int:
    """Return the rows of a row block of a spread job.

    ``block_rows="auto"`` is the server's own number here: segments do not depend on m.

    Args:
        plan: The job.
        row_block_bytes: `ServerLimits.row_block_bytes`.
    """
    own = rows_of_a_block(plan.n, plan.k, plan.dtype.itemsize, row_block_bytes)
    wanted = plan.options.block_rows
    return min(own, wanted) if isinstance(wanted, int) and wanted else own


def divide(
    plan: Plan, row_block_bytes: int, jobs: int, *, runs: bool = True
) -> Division:
    """Divide a job.

    Args:
        plan: The job, with m.
        row_block_bytes: `ServerLimits.row_block_bytes`.
        jobs: Jobs at the same time. Only the runs depend on it.
        runs: Whether a job may have several segments.
    """
    block_rows = block_rows_of(plan, row_block_bytes)
    accumulator = accumulator_of(plan)
    rows = segment_rows(
        plan.n, plan.k, plan.dtype.itemsize, accumulator.itemsize, block_rows
    )
    division = Division(plan.m or 0, rows)
    # Each segment's sum has to be checked alone.
    if not runs or (plan.options.verify and plan.sums):
        return division
    sent = plan.upload_bytes(rows) - plan.upload_bytes(0)
    most = min(RUN_BYTES // max(1, sent), held_segments(plan) // jobs)
    if most <= 1:
        return division
    return replace(division, lengths=run_lengths(division.segments, jobs, most))


def run_lengths(segments: int, jobs: int, most: int) -> tuple[int, ...]:
    """Return the number of segments of each run.

    The first runs are long, and the last ones short, so that servers of any speed
    finish at about the same time: C. D. Polychronopoulos and D. J. Kuck, Guided
    Self-Scheduling, IEEE Transactions on Computers 36 (1987).

    Args:
        segments: The number of all segments.
        jobs: Jobs at the same time.
        most: Most segments of a run.
    """
    lengths = []
    while segments > 0:
        lengths.append(max(1, min(most, -(-segments // jobs))))
        segments -= lengths[-1]
    return tuple(lengths)


def held_segments(plan: Plan) -> int:
    """Return the number of segments whose sums have `HELD_BYTES`."""
    elements = sum(math.prod(plan.shape(each, 0)) for each in plan.sums)
    return HELD_BYTES // max(1, elements * accumulator_of(plan).itemsize)


def segment_bytes(plan: Plan, segment_rows: int) -> int:
    """Return the bytes of the operands and results of a segment's rows."""
    rows, none = (
        plan.upload_bytes(m) + plan.download_bytes(m) for m in (segment_rows, 0)
    )
    return rows - none


def accumulator_of(plan: Plan) -> Dtype:
    """Return the dtype in which a job's dW and dB are summed."""
    return plan.options.dw_accumulator or plan.dtype.default_accumulator


def late_after_s(seconds: Collection[float]) -> float | None:
    """Return the seconds after which a run is late; None: it is not known yet.

    Args:
        seconds: What the last runs took.
    """
    return max(LEAST_SLOW_S, SLOW * statistics.median(seconds)) if seconds else None


class OrderedSums:
    """Adds the sums of segments in the order of the segments. Thread-safe.

    Args:
        plan: The job.

    Attributes:
        added: Number of segments added so far: all before that one.
    """

    def __init__(self, plan: Plan) -> None:
        self.added = 0
        self._plan = plan
        self._held: dict[int, Sums] = {}
        self._total: dict[Matrix, Array] = {}
        self._adding = False
        self._lock = threading.Lock()

    def add(self, first_segment: int, sums: Sequence[Sums]) -> None:
        """Add the sums of consecutive segments, now or after those before them.

        Args:
            first_segment: Number of the first segment.
            sums: Its sums and those of the next ones, in the accumulator's dtype.
                The arrays are changed.
        """
        with self._lock:
            self._held.update(enumerate(sums, first_segment))
            if self._adding:
                return  # the thread that adds takes these, too
            self._adding = True
        while (next_one := self._next()) is not None:
            with np.errstate(all="ignore"):  # of overflow: Inf is a result
                for matrix, array in next_one.items():
                    if matrix in self._total:
                        np.add(self._total[matrix], array, out=self._total[matrix])
                    else:
                        self._total[matrix] = array
            with self._lock:
                self.added += 1

    def _next(self) -> Sums | None:
        with self._lock:
            found = self._held.pop(self.added, None)
            self._adding = found is not None
            return found

    def write(self, results: Mapping[Matrix, Array]) -> None:
        """Round each total once, as the server does, and store it.

        Args:
            results: The arrays for dW and dB.
        """
        with np.errstate(all="ignore"):
            for matrix, total in self._total.items():
                out = results[matrix]
                dtype = self._plan.result_dtype(matrix)
                sent = rounded(total.reshape(out.shape), dtype)
                np.copyto(out, sent, casting="unsafe")
