"""One call: what is known of it, from its first byte to its log line."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from gradwire_protocol.v1 import job_pb2
from gradwire_server.backends.base import Times
from gradwire_server.jobs.header.cache import Header


@dataclass(slots=True)
class Counts:
    """What a job has done so far."""

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


def owes_nothing() -> float:
    """Since when a server that runs no job owes nothing: ever since."""
    return 0.0


@dataclass(slots=True, eq=False)
class Call:
    """One call of a method that computes."""

    method: str
    transport: str
    tenant: str = ""
    """On whose behalf; empty where nobody is asked."""
    job_id: str = ""
    read: Header | None = None
    """Its job's header, once it was read."""
    admitted: bool = False
    complete: bool = False
    """Whether everything was answered."""
    reserved_bytes: int = 0
    announced: job_pb2.Accepted | None = None
    """What is said of its job where that runs, once it was admitted."""
    started: float = field(default_factory=time.perf_counter)
    queued_s: float = 0.0
    ends_by_cancelling: bool = False
    """Whether its client ends it so, and nothing is wrong then."""
    receiving_s: float = 0.0
    sending_s: float = 0.0
    counts: Counts = field(default_factory=Counts)
    idle_since: Callable[[], float] = owes_nothing
    """Since when the server has owed the client nothing; event loop's clock."""

    @property
    def accepted(self) -> job_pb2.Accepted:
        """What is said of its job, which was admitted."""
        if self.announced is None:
            raise RuntimeError("the job was not admitted")
        return self.announced

    @property
    def header(self) -> Header:
        """Its job's header, which was read."""
        if self.read is None:
            raise RuntimeError("the job's header was not read")
        return self.read
