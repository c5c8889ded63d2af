"""What a server says when it cannot do what it was asked."""

from __future__ import annotations

from collections.abc import Mapping

from gradwire_protocol.error_details import ErrorDetails
from gradwire_protocol.error_reasons import Reason


class ListenError(OSError):
    """An address cannot be listened on; the text says which and why."""


class BackendError(RuntimeError):
    """A backend cannot be used here; the text says what is missing."""


class CredentialsError(ValueError):
    """Callers cannot be told apart as was asked; the text says what is wrong."""


class JobError(Exception):
    """A job that fails for a reason that its caller is told.

    Args:
        reason: The stable reason, which also decides the status.
        message: One sentence: what was given and what was expected.
        field: Path of the field of the request that is at fault.
        retry_after_s: Seconds after which the same call may succeed.
        metadata: What else travels with the reason.
    """

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        field: str | None = None,
        retry_after_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s
        self.metadata = dict(metadata or {})

    def bare(self) -> JobError:
        """The same error, without what it was raised from and where."""
        return JobError(
            self.reason,
            self.message,
            field=self.field,
            retry_after_s=self.retry_after_s,
            metadata=self.metadata,
        )

    def details(self, job_id: str) -> ErrorDetails:
        """What travels beside the status and the message."""
        return ErrorDetails(
            reason=self.reason,
            fields={self.field: self.message} if self.field else {},
            metadata={**self.metadata, **({"job_id": job_id} if job_id else {})},
            retry_after_s=self.retry_after_s,
        )


def malformed(what: str) -> JobError:
    """The error of bytes that are not the message that was due."""
    return JobError(Reason.MESSAGE_MALFORMED, what)
