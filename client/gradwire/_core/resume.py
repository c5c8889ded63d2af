"""The point at which an interrupted job resumes.

Every row block counts exactly once in dW. The server sends checkpoints: the sum of dW
over the first rows. A resumed job starts at the last usable checkpoint. Without one it
starts at row 0, and rows whose Y and dX were received are sent for their share of dW
only. Y and dX resume at the first row block that was not received.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from gradwire._api.errors import CallError, GradwireError, ProtocolError
from gradwire._api.types import Array
from gradwire._arrays.buffer_pool import ResultPool
from gradwire._core.job_plan import Plan
from gradwire._core.receiver import check_crc32c
from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.framing import Chunk
from gradwire_protocol.job_spec import Fingerprint, Resume
from gradwire_protocol.matrices import PARTIAL_SUMS, Matrix
from gradwire_protocol.v1.job_pb2 import Accepted, NumericsFingerprint


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The sums over a job's first rows, in the accumulator's dtype."""

    rows: int
    sums: Mapping[Matrix, Array]


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """The point at which a job resumes, on the row blocks of its first server."""

    fingerprint: NumericsFingerprint
    """Fingerprint of the interrupted job."""
    first_row: int
    """The first row to send."""
    results_from_row: int
    """The first row with Y and dX wanted."""
    checkpoint: Checkpoint | None
    """The sums over the rows before the first; None where there are none."""

    @property
    def resume(self) -> Resume:
        """The field `resume` of the job's header."""
        fingerprint = Fingerprint.from_message(self.fingerprint)
        return Resume(self.first_row, self.results_from_row, fingerprint)


def point_after(
    plan: Plan,
    accepted: Accepted,
    results_row: int | None,
    checkpoint: Checkpoint | None,
) -> ResumePoint | None:
    """Return where an interrupted job resumes; None: at its start.

    Args:
        plan: The job.
        accepted: What the server had said of it.
        results_row: Rows of which Y and dX are here, from the first on; None
            where sums alone are wanted.
        checkpoint: The last one over no more rows than those.
    """
    size = accepted.block_rows
    if plan.sums:
        first = 0 if checkpoint is None else checkpoint.rows
        here = first if results_row is None else results_row
    else:
        here = results_row or 0
        first = here - here % size
        checkpoint = None
    results_from = max(-(-here // size) * size, first)
    if not results_from:
        return None
    return ResumePoint(accepted.fingerprint, first, results_from, checkpoint)


def made_progress(now: ResumePoint | None, before: ResumePoint | None) -> bool:
    """Return whether a job made progress between two failures."""
    if now is None or before is None:
        return now is not None
    return (now.first_row, now.results_from_row) > (
        before.first_row,
        before.results_from_row,
    )


def resume_refused(error: GradwireError) -> bool:
    """Return whether the server refused to resume but would accept a fresh start."""
    return isinstance(error, CallError) and error.reason in {
        Reason.RESUME_MISMATCH,
        Reason.FEATURE_UNKNOWN,
    }


def was_too_early(error: GradwireError) -> bool:
    """Return whether the server has smaller row blocks than it had, or than another.

    Rows that are sent before it accepts the job rely on what it said of itself.
    """
    return isinstance(error, CallError) and error.reason is Reason.LEAD_EXCEEDED


def needs_no_checkpoints(plan: Plan, error: GradwireError) -> bool:
    """Return whether the server cannot send checkpoints, and none were requested.

    Servers of several versions may be behind one address.
    """
    unknown = isinstance(error, CallError) and error.reason is Reason.FEATURE_UNKNOWN
    return unknown and plan.options.checkpoint_rows is None


class Checkpoints:
    """Receives the checkpoints of one job.

    At most two complete checkpoints are kept: the last one whose rows all have their
    results, and a later one with results still missing.

    Args:
        plan: The job.
        begins_with: The checkpoint from which the job resumes.
        sums: The sums that it has; None: those that the job receives at its end.
        memory: Allocates them.
    """

    def __init__(
        self,
        plan: Plan,
        begins_with: Checkpoint | None = None,
        sums: tuple[Matrix, ...] | None = None,
        memory: ResultPool | None = None,
    ) -> None:
        self._plan = plan
        self._memory = memory or ResultPool(0)
        self._wanted = plan.sums if sums is None else sums
        self._sure = begins_with
        self._last: Checkpoint | None = None
        self._coming: Checkpoint | None = None
        self._missing: deque[Matrix] = deque()
        """Of the one that is coming: the sums that are not complete, in order."""
        self._filled = 0
        self._dtype = Dtype.FLOAT32

    @property
    def coming(self) -> bool:
        """Whether a checkpoint has started and is not complete."""
        return self._coming is not None

    @property
    def unsure(self) -> bool:
        """Whether results may be missing for the last checkpoint."""
        return self._last is not None

    @property
    def committed_rows(self) -> int:
        """Rows of the last checkpoint without missing results; 0 if there is none."""
        return self._sure.rows if self._sure else 0

    def accept(self, accepted: Accepted) -> None:
        """Use the dtype in which the server sums dW.

        Raises:
            ProtocolError: The dtype is unknown, or differs from the sum so far.
        """
        if not self._wanted:
            return
        number = int(accepted.effective_job.numerics.dw_accumulator)
        try:
            self._dtype = Dtype(number)
        except ValueError:
            raise ProtocolError(
                f"the server would sum in the unknown dtype {number}"
            ) from None
        for matrix, before in self._sure.sums.items() if self._sure else ():
            if self._dtype.numpy != before.dtype:
                raise ProtocolError(
                    f"the server would sum {matrix.label} in {self._dtype.label}, and"
                    f" the sum so far is {before.dtype}"
                )

    def begin(
        self, rows: int, rows_sent: int, block_rows: int, m: int | None = None
    ) -> None:
        """Start an announced checkpoint.

        Args:
            rows: The number of its rows.
            rows_sent: Rows that were sent.
            block_rows: Rows of a row block.
            m: Number of all rows, if it is known.

        Raises:
            ProtocolError: The checkpoint has an impossible number of rows.
        """
        del m
        last = max((each.rows for each in (self._sure, self._last) if each), default=0)
        if not last < rows <= rows_sent or rows % block_rows:
            raise ProtocolError(
                f"the server sent a checkpoint of {rows} rows after one of {last},"
                f" when {rows_sent} were sent in blocks of {block_rows}"
            )
        self._announce(rows)

    def _announce(self, rows: int) -> None:
        sums = {
            matrix: self._memory.empty(self._plan.shape(matrix, 0), self._dtype.numpy)
            for matrix in self._wanted
        }
        self._coming = Checkpoint(rows, sums)
        self._missing.extend(sums)
        self._complete()

    def take(self, chunk: Chunk) -> None:
        """Store elements of the current checkpoint.

        Raises:
            ProtocolError: The elements are not the next ones.
            ChecksumError: The elements were damaged in transit.
        """
        coming, payload, itemsize = self._coming, chunk.payload, self._dtype.itemsize
        matrix = PARTIAL_SUMS[Matrix(chunk.matrix)]
        if coming is None or not payload or matrix is not self._missing[0]:
            raise ProtocolError(
                f"the server sent a sum of {matrix.label} that it did not announce"
            )
        check_crc32c(self._plan.options, matrix.partial, chunk.crc32c, payload)
        room = coming.sums[matrix].reshape(-1).view(np.uint8)
        end = self._filled + len(payload)
        if (
            chunk.index * itemsize != self._filled
            or len(payload) % itemsize
            or end > room.size
        ):
            raise ProtocolError(
                f"the server sent {len(payload)} bytes of a sum of {matrix.label} from"
                f" element {chunk.index} on, after {self._filled} of {room.size} bytes"
            )
        room[self._filled : end] = np.frombuffer(payload, np.uint8)
        self._filled = end
        self._complete()

    def within(self, results_row: int | None) -> Checkpoint | None:
        """Return the last checkpoint of at most `results_row` rows (None: any)."""
        last = self._last
        if last is not None and (results_row is None or last.rows <= results_row):
            self._sure, self._last = last, None
        return self._sure

    def _complete(self) -> None:
        coming = self._coming
        if coming is None:
            return
        while self._missing and self._filled == coming.sums[self._missing[0]].nbytes:
            self._missing.popleft()
            self._filled = 0
        if not self._missing:
            self._coming = None
            self._keep(coming)

    def _keep(self, complete: Checkpoint) -> None:
        # The older of two that are not sure will be so first.
        self._last = self._last or complete


class SegmentSums(Checkpoints):
    """Receives the sums of a job's segments, each in the form of a checkpoint.

    Args:
        plan: The job.
        into: Receives the sums of each segment, in order.
        memory: Allocates them.
    """

    def __init__(
        self,
        plan: Plan,
        into: list[Mapping[Matrix, Array]],
        memory: ResultPool | None = None,
    ) -> None:
        super().__init__(plan, sums=plan.sums_of_segments, memory=memory)
        self._into = into

    def begin(
        self, rows: int, rows_sent: int, block_rows: int, m: int | None = None
    ) -> None:
        """Start the sums of the next segment.

        Args:
            rows: The row after the segment's last.
            rows_sent: Rows that were sent.
            block_rows: Rows of a row block.
            m: Number of all rows, if it is known.

        Raises:
            ProtocolError: The segment does not end there.
        """
        del block_rows
        due = (len(self._into) + 1) * self._plan.segment_rows
        due = due if m is None else min(due, m)
        if rows != due or rows > rows_sent:
            raise ProtocolError(
                f"the server sent the sums of a segment up to row {rows}, when"
                f" {rows_sent} rows were sent: expected row {due}"
            )
        self._announce(rows)

    @property
    def count(self) -> int:
        """Segments whose sums were received."""
        return len(self._into)

    def require_all(self, m: int) -> None:
        """Check that the sums of all segments were received.

        Args:
            m: Number of all rows.

        Raises:
            ProtocolError: Some are missing.
        """
        count = -(-m // self._plan.segment_rows)
        if len(self._into) != count:
            raise ProtocolError(
                f"the server sent the sums of {len(self._into)} segments: expected"
                f" {count}"
            )

    def _keep(self, complete: Checkpoint) -> None:
        self._into.append(complete.sums)
