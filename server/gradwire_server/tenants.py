"""On whose behalf a call is served.

A tenant is a name, which the caller's credentials prove. Without
authentication all callers are one tenant, which has none.
"""

from __future__ import annotations

from contextvars import ContextVar

MAX_NAME_LENGTH = 128
"""Characters of a tenant's name: it stands in every line of the log."""

current: ContextVar[str] = ContextVar("tenant", default="")
"""The tenant of the call that is served in this context.

gRPC runs an interceptor in the task that then serves the call, so what is set
there holds for the whole call and for no other.
"""


def is_name(text: object) -> bool:
    """Whether a tenant can be called so: printable ASCII, and not too long."""
    return (
        isinstance(text, str)
        and 0 < len(text) <= MAX_NAME_LENGTH
        and text.isascii()
        and text.isprintable()
    )
