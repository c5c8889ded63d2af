"""Client idle timeouts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from gradwire_server.api.call_state import CallState
from gradwire_server.errors import client_did_not_read, client_sent_nothing


class ClientTimeouts:
    """Ends calls of clients that neither send nor read for too long.

    Args:
        idle_s: Seconds that a client may be idle.
    """

    def __init__(self, idle_s: float) -> None:
        self.idle_s = idle_s

    @asynccontextmanager
    async def client_sends(
        self, call: CallState, since: float, expected: str
    ) -> AsyncIterator[None]:
        """Limit the wait for the client's next message.

        While received rows wait to be computed, or their results to be sent, the client
        may be waiting for the server, and does not count as idle.

        Args:
            call: The call.
            since: When the client last made progress; event loop's clock.
            expected: Name of the expected message, for the error.

        Raises:
            JobError: The client was idle for too long.
        """
        started = time.perf_counter()
        try:
            async with client_idle_timeout(
                self.idle_s, lambda: max(since, call.idle_since())
            ):
                yield
        except TimeoutError:
            raise client_sent_nothing(self.idle_s, expected) from None
        finally:
            call.receiving_s += time.perf_counter() - started
            if (stages := call.progress.stages) is not None:
                stages.receive.since(started)

    @asynccontextmanager
    async def client_reads(self, call: CallState) -> AsyncIterator[None]:
        """Limit the wait for the client to read.

        Raises:
            JobError: The client did not read for too long.
        """
        started = time.perf_counter()
        try:
            async with client_idle_timeout(self.idle_s):
                yield
        except TimeoutError:
            raise client_did_not_read(self.idle_s) from None
        finally:
            call.sending_s += time.perf_counter() - started


@asynccontextmanager
async def client_idle_timeout(
    idle_s: float, idle_since: Callable[[], float] | None = None
) -> AsyncIterator[None]:
    """Limit the time in this context by the client's idle time.

    Args:
        idle_s: Seconds that a client may be idle.
        idle_since: Returns when the client became idle, by the event loop's clock;
            called again whenever the time seems to be up. Default: the start of this
            context.

    Raises:
        TimeoutError: The client was idle for `idle_s`.
    """
    loop = asyncio.get_running_loop()
    began = loop.time()
    timer: asyncio.Handle
    due_at = 0.0

    def look() -> None:
        now = loop.time()
        due = idle_s + (began if idle_since is None else idle_since())
        if due > now:
            look_at(due)
        elif now - due_at > min(idle_s / 2, MAX_LOOP_LAG_S):
            # The process was suspended: read the messages that arrived
            # meanwhile before the client counts as idle.
            look_at(now + min(idle_s, MAX_LOOP_LAG_S))
        else:
            wait.reschedule(due)

    def look_at(when: float) -> None:
        nonlocal timer, due_at
        due_at = when
        timer = loop.call_at(when, look)

    # Nearly every wait ends before this timer, so nothing else is set up at first.
    look_at(idle_s + (began if idle_since is None else idle_since()))
    try:
        async with asyncio.timeout(None) as wait:
            yield
    finally:
        timer.cancel()


MAX_LOOP_LAG_S = 1.0
"""A timer later than this means that the process was suspended; the client then
gets one more second."""
