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

    def look() -> None:
        nonlocal timer
        due = idle_s + (began if idle_since is None else idle_since())
        if due <= loop.time():
            wait.reschedule(due)
        else:
            timer = loop.call_at(due, look)

    # Nearly every wait ends long before this, so it is all that is done at first.
    timer = loop.call_at(idle_s + (began if idle_since is None else idle_since()), look)
    try:
        async with asyncio.timeout(None) as wait:
            yield
    finally:
        timer.cancel()
