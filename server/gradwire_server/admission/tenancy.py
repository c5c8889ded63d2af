"""Tenants, and their limits.

A tenant is a name proved by the caller's credentials. Without authentication all
callers are one tenant with an empty name.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

MAX_NAME_LENGTH = 128
"""Most characters of a tenant's name: every log line of its calls contains it."""

current: ContextVar[str] = ContextVar("tenant", default="")
"""The tenant of the call served in this context.

gRPC runs an interceptor in the task that then serves the call. A value set there holds
for the whole call and for no other.
"""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits on concurrent use; None: no limit."""

    max_jobs: int | None = None
    """Running jobs."""
    memory_limit: int | None = None
    """Bytes held by jobs and open calls."""
    max_queue: int | None = None
    """Waiting jobs."""
    keep_limit: int | None = None
    """Bytes reserved by sessions."""
    max_sessions: int | None = None
    """Open sessions."""

    def within(self, other: Limits) -> Limits:
        """Return the smaller of each limit."""
        return Limits(
            _least(self.max_jobs, other.max_jobs),
            _least(self.memory_limit, other.memory_limit),
            _least(self.max_queue, other.max_queue),
            _least(self.keep_limit, other.keep_limit),
            _least(self.max_sessions, other.max_sessions),
        )


def is_name(text: object) -> bool:
    """Return whether a text is a tenant's name: printable ASCII, and not too long."""
    return (
        isinstance(text, str)
        and 0 < len(text) <= MAX_NAME_LENGTH
        and text.isascii()
        and text.isprintable()
    )


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)
