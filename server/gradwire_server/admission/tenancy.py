"""On whose behalf a call is served.

A tenant is a name, which the caller's credentials prove. Without
authentication all callers are one tenant, which has none.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

MAX_NAME_LENGTH = 128
"""Characters of a tenant's name: it stands in every line of the log."""

current: ContextVar[str] = ContextVar("tenant", default="")
"""The tenant of the call that is served in this context.

gRPC runs an interceptor in the task that then serves the call, so what is set
there holds for the whole call and for no other.
"""


@dataclass(frozen=True, slots=True)
class Limits:
    """What may be had at once; None where there is no limit."""

    max_jobs: int | None = None
    """Jobs that run."""
    memory_limit: int | None = None
    """Bytes that jobs and open calls hold."""
    max_queue: int | None = None
    """Jobs that wait."""

    def within(self, other: Limits) -> Limits:
        """The smaller one of each."""
        return Limits(
            _least(self.max_jobs, other.max_jobs),
            _least(self.memory_limit, other.memory_limit),
            _least(self.max_queue, other.max_queue),
        )


def is_name(text: object) -> bool:
    """Whether a tenant can be called so: printable ASCII, and not too long."""
    return (
        isinstance(text, str)
        and 0 < len(text) <= MAX_NAME_LENGTH
        and text.isascii()
        and text.isprintable()
    )


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)
