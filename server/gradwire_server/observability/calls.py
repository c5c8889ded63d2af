"""What observers are told of calls: log lines and metrics have the same events."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeAlias

from gradwire_protocol.error_reasons import Reason
from gradwire_server.errors import JobError
from gradwire_server.observability.stages import StageIntervals

Metadata: TypeAlias = Iterable[tuple[str, str | bytes]]
"""The metadata that a client sends with a call."""


class Times(Protocol):
    """Seconds of a job's stages on its device."""

    computing_s: float


class Progress(Protocol):
    """What a call has done so far; worker threads update it."""

    blocks: int
    bytes_received: int
    bytes_sent: int
    handed_over: bool
    stages: StageIntervals | None

    @property
    def times(self) -> Times:
        """The device's part."""


class Call(Protocol):
    """One call of gradwire's methods, as far as observers read it."""

    method: str
    transport: str
    tenant: str
    admitted: bool
    started: float
    asked_at: float
    queued_s: float
    waited_s: float
    receiving_s: float
    sending_s: float
    ends_by_cancelling: bool
    trace_ids: Mapping[str, str] | None

    @property
    def progress(self) -> Progress:
        """What the call has done so far."""

    @property
    def metadata(self) -> Callable[[], Metadata | None]:
        """Returns the metadata that the client has sent."""

    @property
    def resumed(self) -> bool:
        """Whether the call goes on with a job that was cut off."""

    def log_fields(self) -> dict[str, Any]:
        """Return the fields of the call's log line, but for its outcome."""


class CallObserver:
    """Is told of every call; this one ignores it.

    Methods are called in the event loop's thread, and must be quick.
    """

    def began(self, call: Call) -> None:
        """A call began."""

    def ended(
        self, call: Call, reason: Reason | None, error: JobError | None = None
    ) -> None:
        """A call ended, and changes no more.

        Args:
            call: The call.
            reason: Why it failed or was cancelled; None: it was answered completely.
            error: The error that its client is told; None if there is none, or nobody
                to tell it.
        """

    def credentials_refused(self, method: str, peer: str, why: str) -> None:
        """A call was refused for its credentials, and did not begin.

        Args:
            method: The method's name, as the caller gave it.
            peer: The caller's address.
            why: The cause, without any part of the credentials.
        """

    def reported(self, report: str, job_id: str, tenant: str) -> None:
        """A client has reported a failure that it found.

        Args:
            report: One of `gradwire_protocol.limits.REPORTS`.
            job_id: The job's id, as the client gives it.
            tenant: The client's tenant.
        """

    def close(self) -> None:
        """The server has ended all calls."""


class Observers(CallObserver):
    """Passes what it is told to several others.

    Args:
        observers: The others.
    """

    def __init__(self, observers: Iterable[CallObserver]) -> None:
        self._all = tuple(observers)

    def began(self, call: Call) -> None:
        """Tell all."""
        for each in self._all:
            each.began(call)

    def ended(
        self, call: Call, reason: Reason | None, error: JobError | None = None
    ) -> None:
        """Tell all."""
        for each in self._all:
            each.ended(call, reason, error)

    def credentials_refused(self, method: str, peer: str, why: str) -> None:
        """Tell all."""
        for each in self._all:
            each.credentials_refused(method, peer, why)

    def reported(self, report: str, job_id: str, tenant: str) -> None:
        """Tell all."""
        for each in self._all:
            each.reported(report, job_id, tenant)

    def close(self) -> None:
        """Tell all."""
        for each in self._all:
            each.close()
