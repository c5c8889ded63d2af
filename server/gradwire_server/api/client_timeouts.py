"""How long a client is waited for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager


@asynccontextmanager
async def patience(
    idle_s: float, idle_since: Callable[[], float] | None = None
) -> AsyncIterator[None]:
    """Ends what is awaited within when the client has been idle for too long.

    Args:
        idle_s: Seconds that a client may be idle.
        idle_since: Since when it has been, by the event loop's clock; asked
            again whenever the time seems to be up. By default since this wait
            began.

    Raises:
        TimeoutError: The client was idle for `idle_s`.
    """
    loop = asyncio.get_running_loop()
    began = loop.time()
    timer: asyncio.Handle
    looks_at = 0.0

    def look() -> None:
        now = loop.time()
        due = idle_s + (began if idle_since is None else idle_since())
        if due > now:
            look_at(due)
        elif now - looks_at > min(idle_s / 2, _LATE_S):
            # It was this process that stood still: what its client did meanwhile
            # is still to be read.
            look_at(now + min(idle_s, _LATE_S))
        else:
            wait.reschedule(due)

    def look_at(when: float) -> None:
        nonlocal timer, looks_at
        looks_at = when
        timer = loop.call_at(when, look)

    # Nearly every wait ends long before this, so it is all that is done at first.
    look_at(idle_s + (began if idle_since is None else idle_since()))
    try:
        async with asyncio.timeout(None) as wait:
            yield
    finally:
        timer.cancel()


_LATE_S = 1.0
"""A timer that is later than this was not late because the process was busy."""
