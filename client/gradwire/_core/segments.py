"""Segments: the parts of a job that several servers compute, without I/O.

A segment is a fixed number of rows, whole row blocks. Its sums of dW and dB begin at
zero, and the sums of all segments are added in their order. So the last bits depend
neither on the number of servers nor on the order in which they finish.
"""

from __future__ import annotations

import math
import statistics
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np

from gradwire._api.types import Array
from gradwire._core.job_plan import Plan
from gradwire_protocol.dtypes import Dtype, rounded
from gradwire_protocol.limits import MIB
from gradwire_protocol.matrices import Matrix
from gradwire_protocol.row_blocks import rows_of_a_block, segment_rows

HELD_BYTES = 16 * MIB
"""Bytes of sums that may be held ahead in any case."""

AHEAD_BYTES = 16 * MIB
"""Bytes of the rows of the segments that a job has begun and not completed, but two to
`MOST_AHEAD` segments: while one is computed, the next ones are on their way."""

MOST_AHEAD = 8

JOB_S = 5.0
"""Seconds for which a job takes segments. A server that stops waits no longer for it,
and one that joins gets its share."""

JOBS_PER_DEVICE = 2
"""Jobs of one segment at the same time: while one is computed, the other is on its way.
A job that takes segments one by one overlaps both by itself."""

SLOW = 2.0
"""How many times as long as others a segment may take, before another server computes
it, too. The tail of a job is then at most so much longer: J. Dean and S. Ghemawat,
MapReduce, OSDI 2004, section 3.6."""

LEAST_SLOW_S = 0.2
"""Seconds that a segment may take in any case."""

RECENT = 32
"""Segments whose times count for `SLOW`."""

MOST_LATER = 16
"""Most additional jobs at the same time, on servers that join meanwhile."""

ASK_AGAIN_S = 1.0
"""Seconds after which a task that waits for work looks again, in any case: another
server may be there."""

Sums = Mapping[Matrix, Array]


@dataclass(frozen=True)
class Division:
    """The division of a job into segments."""

    m: int
    """Rows of the job."""

    segment_rows: int
    """Rows of a segment."""

    several: bool = False
    """Whether a job takes several segments, one by one; else, it has one."""

    @property
    def segments(self) -> int:
        """Number of segments, at least 1."""
        return max(1, -(-self.m // self.segment_rows))

    def rows_of(self, number: int) -> tuple[int, int]:
        """Return the first row of a segment, and the row after its last."""
        first = number * self.segment_rows
        return first, min(first + self.segment_rows, self.m)

    @property
    def jobs_per_device(self) -> int:
        """Jobs at the same time on a device."""
        return 1 if self.several else JOBS_PER_DEVICE


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


def divide(plan: Plan, row_block_bytes: int, *, several: bool = True) -> Division:
    """Divide a job.

    Args:
        plan: The job, with m.
        row_block_bytes: `ServerLimits.row_block_bytes`.
        several: Whether a job may take several segments.
    """
    block_rows = block_rows_of(plan, row_block_bytes)
    accumulator = accumulator_of(plan)
    rows = segment_rows(
        plan.n, plan.k, plan.dtype.itemsize, accumulator.itemsize, block_rows
    )
    division = Division(plan.m or 0, rows)
    # The results of each segment have to be checked alone. And without elements, nobody
    # learns of a segment before its job ends.
    several = several and not plan.options.verify and division.segments > 1
    several = several and plan.n > 0 and plan.k > 0
    return replace(division, several=several)


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


def segments_ahead(
    plan: Plan, segment_rows: int, left: int, jobs: int, idle: int
) -> int:
    """Return how many segments a job may have begun that are not complete.

    Near the end there are fewer, so that servers of any speed finish at about the same
    time: C. D. Polychronopoulos and D. J. Kuck, Guided Self-Scheduling, IEEE
    Transactions on Computers 36 (1987).

    Args:
        plan: The job.
        segment_rows: Rows of a segment.
        left: Segments that no job has begun.
        jobs: Jobs at the same time.
        idle: How many of those have none: the last segments are left to them.
    """
    if left <= idle:
        return 1
    rows_bytes = plan.upload_bytes(segment_rows) - plan.upload_bytes(0)
    most = min(AHEAD_BYTES // max(1, rows_bytes), MOST_AHEAD, left // max(1, jobs))
    return max(2, most)


def accumulator_of(plan: Plan) -> Dtype:
    """Return the dtype in which a job's dW and dB are summed."""
    return plan.options.dw_accumulator or plan.dtype.default_accumulator


def late_after_s(seconds: Collection[float]) -> float | None:
    """Return the seconds after which a segment is late; None: it is not known yet.

    Args:
        seconds: What the last ones took.
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

    def add(self, segment: int, sums: Sums) -> None:
        """Add the sums of a segment, now or after those before it.

        Args:
            segment: Number of the segment.
            sums: Its sums, in the accumulator's dtype. The arrays are changed.
        """
        with self._lock:
            self._held[segment] = sums
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
