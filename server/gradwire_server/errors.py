"""Errors of the server."""

from __future__ import annotations

from collections.abc import Mapping

from gradwire_protocol.error_details import ErrorDetails
from gradwire_protocol.error_reasons import Reason


class ListenError(OSError):
    """An address cannot be listened on; the text names it and the cause."""


class BackendError(RuntimeError):
    """A backend cannot be used here; the text says what is missing."""


class BackendUnavailableError(BackendError):
    """A backend whose package, driver or device is missing here.

    The text is a part of a sentence that says which. ``auto`` then takes
    another backend.
    """


class TracesError(RuntimeError):
    """Traces cannot be sent; the text gives the cause."""


class StateDirectoryError(OSError):
    """The directory for saved states cannot be used; the text gives the cause."""


class CredentialsError(ValueError):
    """The authentication settings cannot be used; the text gives the cause."""


class JobError(Exception):
    """A failure of a job, reported to its client.

    Args:
        reason: The stable reason, which also decides the status.
        message: One sentence with the given and the expected value.
        field: Path of the invalid field in the request.
        retry_after_s: Seconds after which the same call may succeed.
        metadata: Further metadata to send with the reason.
        log: What only the operator is told, in the log: the cause lies with the server.
    """

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        field: str | None = None,
        retry_after_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
        log: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s
        self.metadata = dict(metadata or {})
        self.log = dict(log or {})

    def bare(self) -> JobError:
        """Return the same error without its cause and traceback."""
        return JobError(
            self.reason,
            self.message,
            field=self.field,
            retry_after_s=self.retry_after_s,
            metadata=self.metadata,
            log=self.log,
        )

    def details(self, job_id: str) -> ErrorDetails:
        """Return the details to send with the status and the message."""
        return ErrorDetails(
            reason=self.reason,
            fields={self.field: self.message} if self.field else {},
            metadata={**self.metadata, **({"job_id": job_id} if job_id else {})},
            retry_after_s=self.retry_after_s,
        )


def malformed(what: str) -> JobError:
    """Return the error for bytes that are not the expected message."""
    return JobError(Reason.MESSAGE_MALFORMED, what)


def client_sent_nothing(idle_s: float, expected: str) -> JobError:
    """Return the error of a client that did not send for too long.

    Args:
        idle_s: Seconds that it may be idle.
        expected: What it should have sent.
    """
    return JobError(
        Reason.CLIENT_IDLE,
        f"the client sent nothing for {idle_s:g} s: expected {expected}",
    )


def client_did_not_read(idle_s: float) -> JobError:
    """Return the error of a client that did not read for too long."""
    return JobError(
        Reason.CLIENT_IDLE,
        f"the client did not read for {idle_s:g} s what it was sent: it must read "
        f"while it writes",
    )
