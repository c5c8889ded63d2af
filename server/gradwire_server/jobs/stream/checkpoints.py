"""Sums of dW on their way to a client, so that a job can go on from there."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.job_spec import JobSpec
from gradwire_server.backends.base import Array
from gradwire_server.errors import JobError


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Says that the runs that follow are dW's sum over the first rows."""

    rows: int


@dataclass(frozen=True, slots=True)
class CheckpointReady:
    """dW's sum over the first rows, and when it is there."""

    rows: int
    dw: asyncio.Future[Array]


@dataclass(frozen=True, slots=True)
class DrainPoint:
    """The job ends here, with dW's sum over its first rows."""

    rows: int

    def error(self) -> JobError:
        """What it ends with."""
        return JobError(
            Reason.DRAINING,
            f"the server stops, and its grace period is over: the job was ended, and "
            f"can go on elsewhere from row {self.rows}",
        )


class Checkpoints:
    """When a job's checkpoints are due; there is room for one at a time.

    Args:
        spec: What was asked.

    Attributes:
        rows: Those of the last one, or those before the first row that is sent.
    """

    def __init__(self, spec: JobSpec) -> None:
        self.rows = spec.first_row
        self._apart = spec.checkpoint_rows or 0
        self._on_its_way = False

    def begin(self, rows: int) -> bool:
        """Whether one of so many rows is due, which has begun then."""
        if not self._apart or self._on_its_way or rows < self.rows + self._apart:
            return False
        self.rows = rows
        self._on_its_way = True
        return True

    def left(self) -> None:
        """The last one has left."""
        self._on_its_way = False
