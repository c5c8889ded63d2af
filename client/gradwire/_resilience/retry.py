"""The decision whether and when to retry a failed call, without I/O.

A job has no effects other than its results, so a retry is always safe. Whether it is
useful depends on the error, the time left and the client's retry budget. The engine
asks after each failure, and waits.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import TypeAlias

from grpc import StatusCode

from gradwire._api.errors import (
    ChecksumError,
    ConnectionLostError,
    GradwireError,
    InputError,
    NumericsError,
    TlsError,
    UnavailableError,
    VerificationError,
)
from gradwire._api.options import MetadataPairs, Options, left_of
from gradwire._api.types import Receipt
from gradwire._resilience.call_span import CallSpan
from gradwire_protocol.limits import AFFINITY

_log = logging.getLogger("gradwire")
# Without a handler, Python would write the warnings to standard error.
_log.addHandler(logging.NullHandler())


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When and how often a failed call is retried.

    A call is retried if it fails with UNAVAILABLE (no server listens, the connection
    broke, a proxy reset the call, the server drains or lost its device), with
    RESOURCE_EXHAUSTED and a retry time from the server, or with a wrong checksum, as
    long as its `timeout_s` allows. Other failures would occur again.

    The r-th retry waits between 0 and
    min(`max_backoff_s`, `initial_backoff_s` * `multiplier` ** (r - 1)) seconds, drawn
    uniformly ("full jitter": M. Brooker, Exponential Backoff And Jitter, AWS
    Architecture Blog, 2015). A retry time from the server is added.

    Each client has a budget for all of its calls, as in gRPC's retry throttling
    (proposal A6). A failed attempt takes 1 from it, and a successful call returns
    `refund`. While half of the budget or less is left, no call is retried. So many
    threads do not overload a service that is down.

    Raises:
        InputError: A value is out of range; the message names the field.

    Example:
        >>> patient = gradwire.RetryPolicy(attempts=20, max_backoff_s=30)
        >>> client = gradwire.connect("gpu-node:50051", retries=patient)
    """

    attempts: int = 8
    """Most consecutive attempts without progress."""

    initial_backoff_s: float = 0.1
    """Longest wait before the first retry, without the server's retry time."""

    multiplier: float = 2.0
    """Factor by which the longest wait grows with each retry."""

    max_backoff_s: float = 5.0
    """Longest wait before any retry, without the server's retry time."""

    budget: float = 100.0
    """The full budget: the number of failed attempts that use it up. Half of them are
    retried."""

    refund: float = 0.1
    """Part of the budget that a successful call returns."""

    held_bytes: int = 256 << 20
    """Most bytes of copied rows that a stream buffers, so that it can resume after a
    failure; 0: none. Rows of a sequence are not copied. See docs/failing.md. Streams
    with `spread` hold that many bytes of rows and results, or a segment for each device
    and one more."""

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise InputError(
                    f"RetryPolicy's {name} is {value!r}: expected a number"
                )
            if not least <= value < _MOST:
                raise InputError(
                    f"RetryPolicy's {name} is {value!r}: expected at least {least},"
                    f" and less than {_MOST:g}"
                )
        for name in ("attempts", "held_bytes"):
            value = getattr(self, name)
            if not isinstance(value, int):
                raise InputError(
                    f"RetryPolicy's {name} is {value!r}: expected an integer"
                )

    def backoff_s(self, retry: int) -> float:
        """Return the longest wait before retry number `retry`, counted from 1."""
        grown = self.initial_backoff_s
        for _ in range(retry - 1):
            if grown >= self.max_backoff_s:
                break
            grown *= self.multiplier
        return min(grown, self.max_backoff_s)


_LEAST: dict[str, float] = {
    "attempts": 1,
    "initial_backoff_s": 0,
    "multiplier": 1,
    "max_backoff_s": 0,
    "budget": 0,
    "refund": 0,
    "held_bytes": 0,
}

_RESET_NOTE = (
    "If it happens again, a proxy before the server may limit the size or the time of"
    " calls: it resets them without saying why (nginx: client_max_body_size, 1 MiB by"
    " default; see docs/proxies.md)."
)

_LONGEST_S = 3600.0
"""Longest retry time of a server that the client waits for."""

_MOST = 1e9
"""Upper limit of every field, to avoid overflow."""

RetriesLike: TypeAlias = RetryPolicy | bool | None


def parse_retries(value: RetriesLike) -> RetryPolicy:
    """Return the policy for a value of `retries`.

    Raises:
        InputError: The value is invalid.
    """
    if value is None or value is False:
        return RetryPolicy(attempts=1)
    if value is True:
        return RetryPolicy()
    if isinstance(value, RetryPolicy):
        return value
    raise InputError(
        f"retries is {value!r}: expected True, False or a gradwire.RetryPolicy"
    )


class OvertakenError(UnavailableError):
    """Another server was faster by far. That costs nothing of the budget."""


class Retries:
    """A client's policy and its retry budget. Thread-safe.

    Args:
        policy: The policy.
        draw: Draws a number between two others, for the jitter.
        clock: A monotonic clock, in seconds.
    """

    def __init__(
        self,
        policy: RetryPolicy,
        draw: Callable[[float, float], float] = random.uniform,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.policy = policy
        self.draw = draw
        self.clock = clock
        self._left = policy.budget
        self._lock = threading.Lock()

    def failed(self) -> bool:
        """Count a failed attempt, and return whether the budget allows a retry."""
        with self._lock:
            self._left = max(0.0, self._left - 1)
            return self._left > self.policy.budget / 2

    def succeeded(self) -> None:
        """Return part of the budget after a successful call."""
        with self._lock:
            self._left = min(self.policy.budget, self._left + self.policy.refund)

    def renew(self) -> None:
        """Replace the lock in the child of a fork, where it may be held."""
        self._lock = threading.Lock()


class Attempts:
    """The attempts of one call.

    Args:
        retries: The client's policy and budget.
        timeout_s: Seconds for all attempts together; None: no limit.
        job_id: Id of the job; None for calls without a job.
        span: The call's span; None if it is not traced.

    Attributes:
        count: Number of attempts, including the current one.
        causes: Why each earlier attempt failed: a reason, or a status.
        begun: Time at which the first attempt began.
        avoid: Addresses of servers on which an attempt failed.
        unusable: Addresses of servers for no attempt.
        retry_on_other_server: Whether the next attempt can use another server.
        span: The call's span; None if it is not traced.
        metadata: Metadata that names the span to the server.
        affinity: What a proxy recognizes a session's calls by; empty without one.
    """

    def __init__(
        self,
        retries: Retries,
        timeout_s: float | None,
        job_id: str | None = None,
        span: CallSpan | None = None,
    ) -> None:
        self.span = span
        self.metadata: MetadataPairs = () if span is None else span.metadata
        self.affinity = ""
        self.count = 1
        self.causes: list[str] = []
        self.begun = retries.clock()
        self._retries = retries
        self._timeout_s = timeout_s
        self._job_id = job_id
        self._final = False
        self._in_vain = 0
        self.avoid: set[str] = set()
        self.unusable: Collection[str] = ()
        self.retry_on_other_server = False

    def options(self, options: Options) -> Options:
        """Return the options of the next attempt, with the time left.

        A proxy may send it to another server than the attempts before.
        """
        options = left_of(options, self.begun)
        pairs = options.metadata
        own = (AFFINITY, options.job_id)
        if self.count > 1 and own in pairs:
            other = (AFFINITY, f"{options.job_id}/{self.count}")
            pairs = tuple(other if pair == own else pair for pair in pairs)
        if self.metadata or pairs is not options.metadata:
            options = replace(options, metadata=pairs + self.metadata)
        return options

    @property
    def left_s(self) -> float | None:
        """The time left, in seconds; None: no limit."""
        if self._timeout_s is None:
            return None
        return self._timeout_s - (self._retries.clock() - self.begun)

    def make_final(self) -> None:
        """Allow no further attempt after the current one."""
        self._final = True

    def progressed(self) -> None:
        """Record that the current attempt got further than the earlier ones."""
        self._in_vain = 0

    def after(self, error: GradwireError) -> float | None:
        """Record the failure of the current attempt.

        Returns:
            Seconds to wait before the next attempt. None: there is no further attempt,
            and the call fails with `error`.
        """
        self._in_vain += 1
        delay_s = self._delay_s(error)
        status = error.status
        if isinstance(error, UnavailableError):
            # A proxy's reset has many statuses, and one meaning.
            status = StatusCode.UNAVAILABLE
        kind = status.name if status else type(error).__name__
        cause = error.reason or kind
        if delay_s is None:
            error.attempts = self.count
            if self.count > 1:
                error.add_note(
                    f"This was attempt {self.count}; the earlier ones failed with"
                    f" {', '.join(self.causes)}."
                )
            if isinstance(error, ConnectionLostError) and (
                error.status is not StatusCode.UNAVAILABLE
            ):
                error.add_note(_RESET_NOTE)
            return None
        self.causes.append(str(cause))
        self.count += 1
        if isinstance(error, NumericsError):
            return delay_s  # that server was excluded, with a line in the log
        ids = {}
        if self.span is not None:
            self.span.retried(str(cause), delay_s)
            ids = self.span.ids
        _log.warning(
            "%s: attempt %d failed with %s; the next one starts in %.3f s: %s",
            f"job {self._job_id}" if self._job_id else "a call",
            self.count - 1,
            cause,
            delay_s,
            str(error),  # a kept record must not hold the operands
            extra={
                "job_id": self._job_id,
                "attempt": self.count - 1,
                "status": error.status.name if error.status else None,
                "reason": error.reason,
                "delay_s": delay_s,
                **ids,
            },
        )
        return delay_s

    def succeeded(self) -> None:
        """Record that the current attempt succeeded."""
        self._retries.succeeded()

    def ended(self, error: BaseException | None = None) -> None:
        """End the span; None: the call succeeded. Further calls do nothing."""
        if self.span is not None:
            self.span.end(error)

    def annotate(self, receipt: Receipt) -> Receipt:
        """Return the receipt with the number of attempts and their causes."""
        if self.count == 1:
            return receipt
        return replace(receipt, attempts=self.count, retried=tuple(self.causes))

    def _delay_s(self, error: GradwireError) -> float | None:
        if isinstance(error, NumericsError) and self.retry_on_other_server:
            return 0.0  # the job was not sent, and no server has failed
        if isinstance(error, OvertakenError):
            return 0.0  # as often as there are servers at most
        wrong = isinstance(error, VerificationError) and self.retry_on_other_server
        if not (is_transient(error) or wrong) or not self._retries.failed():
            return None
        policy = self._retries.policy
        if self._final or self._in_vain >= policy.attempts:
            return None
        delay_s = self._retries.draw(0.0, policy.backoff_s(self._in_vain))
        if not self.retry_on_other_server:
            told_s = error.retry_after_s or 0.0
            if told_s > _LONGEST_S:
                return None
            delay_s += told_s
        left_s = self.left_s
        return delay_s if left_s is None or delay_s < left_s else None


def is_transient(error: GradwireError) -> bool:
    """Return whether a retry of the same call may succeed.

    RESOURCE_EXHAUSTED without a retry time is permanent: the job is too large, or gRPC
    refused an oversize message. TLS errors are permanent, too.
    """
    if isinstance(error, TlsError):
        return False
    # Also calls that a proxy has reset, with any status.
    if isinstance(error, UnavailableError | ChecksumError):
        return True
    if error.status is StatusCode.RESOURCE_EXHAUSTED:
        return error.retry_after_s is not None
    return error.status is StatusCode.UNAVAILABLE
