"""Checkpoints: partial sums sent to a client, from which a job can resume."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.job_spec import JobSpec
from gradwire_server.backends.base import Sums
from gradwire_server.errors import JobError


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Announces that the next chunks are the sums over the first `rows` rows."""

    rows: int


@dataclass(frozen=True, slots=True)
class CheckpointReady:
    """A future of the sums over the first `rows` rows."""

    rows: int
    sums: asyncio.Future[Sums]


@dataclass(frozen=True, slots=True)
class DrainPoint:
    """The job's end, with the sums over the first `rows` rows."""

    rows: int

    def error(self) -> JobError:
        """Return the error that ends the job."""
        return JobError(
            Reason.DRAINING,
            f"the server stops, and its grace period is over: the job was ended, and "
            f"can go on elsewhere from row {self.rows}",
        )


class Checkpoints:
    """Decides when a job's checkpoints are due, one at a time.

    There is memory for one.

    Args:
        spec: The job's specification.
        segment_rows: Rows of a segment; checkpoints are due at the ends of segments.

    Attributes:
        rows: Rows of the last checkpoint; at first, the rows before `first_row`.
    """

    def __init__(self, spec: JobSpec, segment_rows: int) -> None:
        self._segment_rows = segment_rows
        self.rows = spec.first_row
        self._interval = spec.checkpoint_rows or 0
        self._in_flight = False

    def begin(self, rows: int) -> bool:
        """Begin a checkpoint of `rows` rows if one is due; return whether it is."""
        if not self._interval or self._in_flight or rows < self.rows + self._interval:
            return False
        if rows % self._segment_rows:
            return False
        self.rows = rows
        self._in_flight = True
        return True

    def left(self) -> None:
        """Mark the current checkpoint as sent."""
        self._in_flight = False

    def last_rows(self, rows: int) -> int:
        """Return the rows of a last checkpoint, when `rows` rows were submitted."""
        return rows // self._segment_rows * self._segment_rows
