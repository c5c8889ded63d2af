"""One call: what is known of it, from its first byte to its log line."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from gradwire_protocol.v1 import job_pb2
from gradwire_server.jobs.header.cache import Header
from gradwire_server.scheduling.job_progress import JobProgress


def never_busy() -> float:
    """Idle-since clock of a call without a job: always idle."""
    return 0.0


@dataclass(slots=True, eq=False)
class CallState:
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
    progress: JobProgress = field(default_factory=JobProgress)
    idle_since: Callable[[], float] = never_busy
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
