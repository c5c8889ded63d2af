"""How the calls of one job that travels over several connections end.

A job has one end, and its calls have one each. Which of them is the job's is
decided here, without the I/O; whoever drives the calls tells how each ended.
"""

from __future__ import annotations

import time

import grpc

from gradwire._endpoint import Endpoint
from gradwire._exceptions import (
    ConnectionLostError,
    DeadlineError,
    GradwireError,
    JobCancelledError,
)
from gradwire._exchange import Exchange
from gradwire._failures import LATE, call_error
from gradwire._options import Options
from gradwire.wire.reasons import Reason

ANSWERS_WAITING = 2
"""Most of a connection's answers that wait to be taken in."""

_CAUSE_S = 1.0
"""How long the cause is waited for where a call only tells that there is one."""


class NotJoinedError(Exception):
    """The job's connections could not be had; nothing was sent but its header.

    Args:
        cause: Why not.
    """

    def __init__(self, cause: GradwireError) -> None:
        super().__init__(str(cause))
        self.lasts = cause.status is not grpc.StatusCode.RESOURCE_EXHAUSTED
        """Whether the next job would find the same: not if they were taken."""


class Ends:
    """How a job's calls have ended, so far.

    Args:
        exchange: What is said on them.
        endpoint: Of the server.
        options: The job's.
    """

    def __init__(
        self, exchange: Exchange, endpoint: Endpoint, options: Options
    ) -> None:
        self._exchange = exchange
        self._endpoint = endpoint
        self._job_id = options.job_id
        timeout_s = options.timeout_s
        self._due = None if timeout_s is None else time.monotonic() + timeout_s
        self._count = 0
        self._error: GradwireError | None = None
        self._cause_due = 0.0

    @property
    def failed(self) -> bool:
        """Whether a call has failed, and messages are of no use any more."""
        return self._error is not None

    @property
    def decided(self) -> bool:
        """Whether it is clear how the job ended."""
        if self._count == self._exchange.connections:
            return True
        if self._error is None:
            return False
        return not _is_echo(self._error) or time.monotonic() >= self._cause_due

    @property
    def patience_s(self) -> float | None:
        """How long another message, or another end, may be waited for."""
        return max(0.0, self._cause_due - time.monotonic()) if self.failed else None

    def add(
        self, connection: int, outcome: grpc.RpcError | GradwireError | None
    ) -> None:
        """Take the end of a call; None where it was a good one.

        Raises:
            NotJoinedError: The job cannot have these connections.
        """
        self._count += 1
        if isinstance(outcome, grpc.RpcError):
            outcome = call_error(outcome, self._endpoint, self._job_id)
        if outcome is None:
            return
        if not self._exchange.ready and _cannot_join(outcome, connection):
            raise NotJoinedError(outcome)
        if self._error is None:
            self._cause_due = time.monotonic() + _CAUSE_S
        if self._error is None or not _is_echo(outcome):
            self._error = outcome

    def raise_error(self) -> None:
        """Raise why the job failed, or that it was given up; if either is so."""
        error = self._error
        if error is None:
            if not self.decided:
                raise cancelled_here(self._job_id)
            return
        if not _is_echo(error):
            raise error
        if self._due is not None and time.monotonic() >= self._due:
            raise DeadlineError(
                f"{LATE} (job {self._job_id})",
                status=grpc.StatusCode.DEADLINE_EXCEEDED,
                job_id=self._job_id,
                details=error.details,
            )
        raise ConnectionLostError(
            f"a connection to {self._endpoint} broke before the job was done"
            f" ({error.details})",
            status=grpc.StatusCode.UNAVAILABLE,
            job_id=self._job_id,
            details=error.details,
        )


def cancelled_here(job_id: str) -> JobCancelledError:
    """The error of a job that this side has cancelled."""
    return JobCancelledError(
        "the job was cancelled by this side",
        status=grpc.StatusCode.CANCELLED,
        job_id=job_id,
    )


def _cannot_join(error: GradwireError, connection: int) -> bool:
    """Whether an error, met before anything was sent, is about the connections.

    That a further call found no such job, or nobody; that none of it reached
    the server in time; or that the server does not know of connections. Then
    the job can go over one.
    """
    if not connection:
        return error.reason in {Reason.FEATURE_UNKNOWN, Reason.CLIENT_IDLE}
    return error.status not in {
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    }


def _is_echo(error: GradwireError) -> bool:
    """Whether an error says no more than that one of a job's calls is gone.

    That is what the server tells the others, and what gRPC's asyncio API says
    itself of a call that it writes to while it breaks.
    """
    core = error.status is grpc.StatusCode.INTERNAL and (
        "Internal error from Core" in (error.details or "")
    )
    return error.reason == Reason.JOB_CANCELLED or core
