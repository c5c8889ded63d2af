"""The state of one call, from its first byte to its log line."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gradwire_protocol.v1 import job_pb2
from gradwire_server.jobs.header.cache import Header
from gradwire_server.observability.calls import Metadata
from gradwire_server.scheduling.job_progress import JobProgress


def never_busy() -> float:
    """Idle-since clock of a call without a job: always idle."""
    return 0.0


@dataclass(slots=True, eq=False)
class CallState:
    """State of a call that holds memory: of a job, a region or a session."""

    method: str
    transport: str
    tenant: str = ""
    """The caller's tenant; empty without authentication."""
    job_id: str = ""
    session: str = ""
    """The name for people of the session that the call uses; empty: none. It is no
    secret, unlike the session's token."""
    read: Header | None = None
    """The job's header, once parsed."""
    admitted: bool = False
    complete: bool = False
    """Whether the call was answered completely."""
    reserved_bytes: int = 0
    announced: job_pb2.Accepted | None = None
    """The job's Accepted message, once admitted."""
    started: float = field(default_factory=time.perf_counter)
    asked_at: float = 0.0
    """When the job asked for its turn; 0: it did not."""
    queued_s: float = 0.0
    """From the start to the job's admission."""
    waited_s: float = 0.0
    """The part of it that the job waited for its turn."""
    ends_by_cancelling: bool = False
    """Whether the client normally ends the call by cancelling it."""
    receiving_s: float = 0.0
    sending_s: float = 0.0
    progress: JobProgress = field(default_factory=JobProgress)
    applied: list[job_pb2.Applied] = field(default_factory=list)
    """The job's contributions to kept gradients."""
    opening: asyncio.Task[None] | None = None
    """Passes the first message to gRPC, with the initial metadata; None: none was sent.
    Until it is done, gRPC can send no status: it would send the metadata twice."""
    idle_since: Callable[[], float] = never_busy
    """Returns since when the server has owed the client nothing; event loop's clock."""
    metadata: Callable[[], Metadata | None] = tuple
    """Returns the metadata that the client has sent."""
    trace_ids: Mapping[str, str] | None = None
    """Fields of log lines: the call's trace and span. None if it is not traced."""

    @property
    def accepted(self) -> job_pb2.Accepted:
        """The job's Accepted message; the job must be admitted."""
        if self.announced is None:
            raise RuntimeError("the job was not admitted")
        return self.announced

    @property
    def header(self) -> Header:
        """The job's header; it must be parsed."""
        if self.read is None:
            raise RuntimeError("the job's header was not read")
        return self.read

    @property
    def resumed(self) -> bool:
        """Whether the call goes on with a job that was cut off."""
        return self.read is not None and self.read.spec.resume is not None

    def log_fields(self) -> dict[str, Any]:
        """Return the fields of the call's log line, but for its outcome."""
        fields: dict[str, Any] = {
            "job_id": self.job_id,
            **(self.trace_ids or {}),
            **({"tenant": self.tenant} if self.tenant else {}),
            **({"session": self.session} if self.session else {}),
            "method": self.method,
            "transport": self.transport,
            "total_s": round(time.perf_counter() - self.started, 6),
        }
        if self.read is not None:
            spec = self.read.spec
            fields |= {
                "m": spec.m,
                "n": spec.n,
                "k": spec.k,
                "dtype": spec.dtype.label,
                "results": ",".join(result.label for result in spec.results),
                "reserved_bytes": self.reserved_bytes,
                "queued_s": round(self.queued_s, 6),
            }
        if self.admitted:
            progress = self.progress
            fields |= {
                "m": progress.m or fields["m"],
                "blocks": progress.blocks,
                "bytes_received": progress.bytes_received,
                "bytes_sent": progress.bytes_sent,
                "device": self.accepted.device.index,
                "receiving_s": round(self.receiving_s, 6),
                "computing_s": round(progress.times.computing_s, 6),
                "sending_s": round(self.sending_s, 6),
            }
        return fields
