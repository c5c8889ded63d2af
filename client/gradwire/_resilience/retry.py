"""When a call that failed is made again, and how soon: without the I/O.

A job has no effects but its results, so whatever became of an attempt, the
next one does no harm. Whether it is worth it depends on how the attempt ended,
on what is left of the call's deadline, and on how the client's other calls
have fared. Whoever makes the calls asks after each failure, and waits.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

from grpc import StatusCode

from gradwire._api.errors import (
    ChecksumError,
    ConnectionLostError,
    GradwireError,
    InputError,
    TlsError,
    VerificationError,
)
from gradwire._api.options import Options, left_of
from gradwire._api.types import Receipt

_log = logging.getLogger("gradwire")
# Without a handler of the program's own Python would write to standard error.
_log.addHandler(logging.NullHandler())


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often a call is made again that failed, and how soon.

    Made again are calls that end with UNAVAILABLE (nobody listens, the
    connection broke, the server drains or lost its device), with
    RESOURCE_EXHAUSTED and a time to come back, or with a payload whose
    checksum is wrong, as long as their `timeout_s` allows. Nothing else is:
    it would end in the same way.

    The r-th retry waits between 0 and
    min(`max_backoff_s`, `initial_backoff_s` * `multiplier` ** (r - 1)) seconds,
    drawn uniformly ("full jitter": M. Brooker, Exponential Backoff And Jitter,
    AWS Architecture Blog, 2015), and as long as the server said before that.

    Each client has a budget for all of its calls (as in gRPC's retry
    throttling, proposal A6): a failed attempt takes one from it, a call that
    succeeds gives `refund` back, and while half of it or less is left no call
    is made again. A dead service is thus not hammered by many threads.

    Raises:
        InputError: A value is out of its range; the text names the field.

    Example:
        >>> patient = gradwire.RetryPolicy(attempts=20, max_backoff_s=30)
        >>> client = gradwire.connect("gpu-node:50051", retries=patient)
    """

    attempts: int = 8
    """Most attempts in a row of which none gets any further."""

    initial_backoff_s: float = 0.1
    """Most seconds before the first retry, unless the server says longer."""

    multiplier: float = 2.0
    """By how much that grows from one retry to the next."""

    max_backoff_s: float = 5.0
    """Most seconds before any retry, unless the server says longer."""

    budget: float = 100.0
    """Failed attempts of all the client's calls that use the budget up; half
    as many are followed by a retry."""

    refund: float = 0.1
    """What a call that succeeds gives back to the budget."""

    held_bytes: int = 256 << 20
    """Most bytes of its rows that a stream holds in copies, so that it can go on
    where it was cut off; 0: none. Rows that are given as a sequence are not
    copied. See docs/failing.md."""

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise InputError(f"RetryPolicy's {name} is {value!r}: give a number")
            if not least <= value < _MOST:
                raise InputError(
                    f"RetryPolicy's {name} is {value!r}: give at least {least}, and"
                    f" less than {_MOST:g}"
                )
        for name in ("attempts", "held_bytes"):
            value = getattr(self, name)
            if not isinstance(value, int):
                raise InputError(
                    f"RetryPolicy's {name} is {value!r}: give a whole number"
                )

    def backoff_s(self, retry: int) -> float:
        """Most seconds before the so many-th retry, counted from 1."""
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

_LONGEST_S = 3600.0
"""A server that wants to be left alone for longer is not waited for."""

_MOST = 1e9
"""What waits and counts are below, so that they can be counted with."""

RetriesLike: TypeAlias = RetryPolicy | bool | None


def parse_retries(value: RetriesLike) -> RetryPolicy:
    """The policy that an argument `retries` means.

    Raises:
        InputError: It means none.
    """
    if value is None or value is False:
        return RetryPolicy(attempts=1)
    if value is True:
        return RetryPolicy()
    if isinstance(value, RetryPolicy):
        return value
    raise InputError(
        f"retries is {value!r}: give True, False or a gradwire.RetryPolicy"
    )


class Retries:
    """A client's policy, and what its calls have left of the budget.

    Threads may share one.

    Args:
        policy: The policy.
        draw: Gives a number between two others, for the jitter.
        clock: Seconds that only grow.
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
        """Take a failed attempt from the budget; whether a retry is in it."""
        with self._lock:
            self._left = max(0.0, self._left - 1)
            return self._left > self.policy.budget / 2

    def succeeded(self) -> None:
        """Give something back for a call that succeeded."""
        with self._lock:
            self._left = min(self.policy.budget, self._left + self.policy.refund)

    def renew(self) -> None:
        """Begin anew in the child of a fork, where the lock may be held."""
        self._lock = threading.Lock()


class Attempts:
    """The attempts of one call, from the first one's beginning.

    Args:
        retries: The client's.
        timeout_s: Seconds for all of them together; None: as long as it takes.
        job_id: The job's id; None where there is none.

    Attributes:
        made: How many there were, with the one that runs.
        causes: Why each of the others failed: a reason, or else a status.
        avoid: Addresses of servers where it failed.
        elsewhere: Whether the next attempt has another server.
    """

    def __init__(
        self, retries: Retries, timeout_s: float | None, job_id: str | None = None
    ) -> None:
        self.count = 1
        self.causes: list[str] = []
        self.begun = retries.clock()
        self._retries = retries
        self._timeout_s = timeout_s
        self._job_id = job_id
        self._final = False
        self._in_vain = 0
        self.avoid: set[str] = set()
        self.retry_on_other_server = False

    def options(self, options: Options) -> Options:
        """The options of the attempt that is due: with what is left of time."""
        return left_of(options, self.begun)

    @property
    def left_s(self) -> float | None:
        """What is left of time; None: as long as it takes."""
        if self._timeout_s is None:
            return None
        return self._timeout_s - (self._retries.clock() - self.begun)

    def make_final(self) -> None:
        """The attempt that runs is the last, however it ends."""
        self._final = True

    def progressed(self) -> None:
        """The attempt that ran has got further than those before it."""
        self._in_vain = 0

    def after(self, error: GradwireError) -> float | None:
        """Take the failure of the attempt that ran.

        Returns:
            Seconds to wait before the next one; None: there is none, and the
            error is what the call ends with.
        """
        self._in_vain += 1
        delay_s = self._delay_s(error)
        kind = error.status.name if error.status else type(error).__name__
        cause = error.reason or kind
        if delay_s is None:
            error.attempts = self.count
            if self.count > 1:
                error.add_note(
                    f"This was attempt {self.count}; those before it ended with"
                    f" {', '.join(self.causes)}."
                )
            return None
        self.causes.append(str(cause))
        _log.warning(
            "%s: attempt %d ended with %s, and the next one begins in %.3f s: %s",
            f"job {self._job_id}" if self._job_id else "a call",
            self.count,
            cause,
            delay_s,
            error,
            extra={
                "job_id": self._job_id,
                "attempt": self.count,
                "status": error.status.name if error.status else None,
                "reason": error.reason,
                "delay_s": delay_s,
            },
        )
        self.count += 1
        return delay_s

    def succeeded(self) -> None:
        """The attempt that ran came to a good end."""
        self._retries.succeeded()

    def annotate(self, receipt: Receipt) -> Receipt:
        """The receipt, with how many attempts there were, and why."""
        if self.count == 1:
            return receipt
        return replace(receipt, attempts=self.count, retried=tuple(self.causes))

    def _delay_s(self, error: GradwireError) -> float | None:
        wrong = isinstance(error, VerificationError) and self.retry_on_other_server
        if not (is_passing(error) or wrong) or not self._retries.failed():
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


def is_passing(error: GradwireError) -> bool:
    """Whether the same call may end otherwise when it is made again.

    RESOURCE_EXHAUSTED without a time to come back is not passing: a job may
    be too large, and gRPC itself ends oversize messages so. Nor is it where
    the two sides do not trust each other.
    """
    if isinstance(error, TlsError):
        return False
    if error.status is StatusCode.RESOURCE_EXHAUSTED:
        return error.retry_after_s is not None
    return error.status is StatusCode.UNAVAILABLE or isinstance(
        error, ChecksumError | ConnectionLostError
    )
