"""A job's progress counters."""

from __future__ import annotations

from dataclasses import dataclass, field

from gradwire_server.backends.base import Times
from gradwire_server.observability.stages import StageIntervals


@dataclass(slots=True)
class JobProgress:
    """A job's progress, updated from any thread."""

    m: int = 0
    """Rows of the job; 0 until all have arrived."""
    ended: bool = False
    """Whether all rows of a stream have arrived."""
    blocks_received: int = 0
    """Row blocks of a stream with complete operands."""
    blocks: int = 0
    """Row blocks computed."""
    bytes_received: int = 0
    bytes_sent: int = 0
    handed_over: bool = False
    """Whether the job ended with a checkpoint because the server stops."""
    times: Times = field(default_factory=Times)
    stages: StageIntervals | None = None
    """When its stages began and ended; None unless the call is traced."""
