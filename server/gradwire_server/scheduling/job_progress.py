"""What a job has done so far."""

from __future__ import annotations

from dataclasses import dataclass, field

from gradwire_server.backends.base import Times


@dataclass(slots=True)
class JobProgress:
    """What a job has done so far, told in whatever thread does it."""

    m: int = 0
    """Rows of the job, once they are all there."""
    ended: bool = False
    """Whether they are, in a stream."""
    blocks_received: int = 0
    """Row blocks of a stream whose operands have come."""
    blocks: int = 0
    """Row blocks computed."""
    bytes_received: int = 0
    bytes_sent: int = 0
    times: Times = field(default_factory=Times)
