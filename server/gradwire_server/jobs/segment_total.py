"""The sums of a job over its complete segments, in host memory.

A backend sums the row blocks of one segment. The segments' sums are added here:
additions are rounded in the same way everywhere, so that a client that adds the sums of
segments gets the same bits.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from gradwire_protocol.job_spec import JobSpec
from gradwire_server.backends.base import BackendJob, Sums, Times
from gradwire_server.backends.row_blocks import RowBlockPlan


class SegmentTotal:
    """The sums over complete segments.

    Methods are called in the thread of a device worker, between row blocks. A segment
    is added when its sums are needed: a job that ends after one has nothing to add.

    Args:
        spec: The job's specification.
        plan: Its row blocks and segments.
        memory: `plan.total_bytes` of host memory.
        times: Counts the times of the job's stages.
    """

    def __init__(
        self,
        spec: JobSpec,
        plan: RowBlockPlan,
        memory: npt.NDArray[np.uint8],
        times: Times,
    ) -> None:
        self._segment_rows = plan.segment_rows
        self._times = times
        half = plan.total_bytes // 2
        self._total = _sums_in(spec, memory[:half])
        self._part = _sums_in(spec, memory[half:])
        self._begun = False
        """Whether the total has segments, of this job or of its earlier attempt."""
        self._row = 0
        """The first row after the open segment's row blocks."""
        self._open = False
        """Whether the backend has sums that are not in the total."""

    def take(self, sums: Sums) -> None:
        """Continue the sums of earlier segments, before any row block."""
        for result, own in self._total.items():
            np.copyto(own, sums[result])
        self._begun = True

    def begin_block(self, job: BackendJob, first_row: int, rows: int) -> None:
        """Prepare for a row block: add the segment before it, if it begins one."""
        self._end_complete(job)
        self._open = True
        self._row = first_row + rows

    def copy(self, job: BackendJob, out: Sums) -> None:
        """Copy the sums over the complete segments."""
        self._end_complete(job)
        for result, own in self._total.items():
            if self._begun:
                np.copyto(out[result], own)
            else:
                out[result].fill(0)

    def finish(self, job: BackendJob) -> None:
        """Make the total the job's sums, after the last row block."""
        if not self._begun:  # there is one segment at most
            return
        if self._open:
            self._add(job)
        job.take_sums(self._total)

    def _end_complete(self, job: BackendJob) -> None:
        if self._open and not self._row % self._segment_rows:
            self._add(job)
            job.restart_sums()

    def _add(self, job: BackendJob) -> None:
        """Add the sums of the job's open segment."""
        self._open = False
        if not self._begun:
            job.copy_sums(self._total)
            self._begun = True
            return
        job.copy_sums(self._part)
        with self._times.computing(), np.errstate(all="ignore"):
            for result, own in self._total.items():
                np.add(own, self._part[result], out=own)


def _sums_in(spec: JobSpec, memory: npt.NDArray[np.uint8]) -> Sums:
    """Return arrays for a job's sums, in the accumulator's dtype."""
    sums, dtype, start = {}, spec.accumulator.numpy, 0
    for result in spec.sums:
        shape = result.shape(0, spec.n, spec.k)
        end = start + math.prod(shape) * dtype.itemsize
        sums[result] = memory[start:end].view(dtype).reshape(shape)
        start = end
    return sums
