"""Client idle timeouts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self


class IdleLimit:
    """Ends a call's waits for a client that is idle for too long.

    One wait at a time. Its timer is kept from wait to wait: a call has many, and nearly
    all end long before it.

    Args:
        idle_s: Seconds that a client may be idle.
    """

    def __init__(self, idle_s: float) -> None:
        self._idle_s = idle_s
        self._timer: asyncio.TimerHandle | None = None
        self._due_at = 0.0
        """When the timer is due; event loop's clock."""
        self._task: asyncio.Task[object] | None = None
        """The task that waits."""
        self._cancelling = 0
        self._expired = False
        self._began = 0.0
        self._idle_since: Callable[[], float] | None = None

    def wait(self, idle_since: Callable[[], float] | None = None) -> Self:
        """Limit the time in a context by the client's idle time.

        Args:
            idle_since: Returns when the client became idle, by the event loop's clock;
                called again whenever the time seems to be up. Default: the start of
                the context.

        Returns:
            The context. It raises TimeoutError once the client was idle for `idle_s`.
        """
        self._idle_since = idle_since
        return self

    def close(self) -> None:
        """Stop the timer: no more waits follow."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        if task is None or self._task is not None:
            raise RuntimeError("one task at a time waits for the client")
        self._task, self._cancelling = task, task.cancelling()
        self._began = asyncio.get_running_loop().time()
        due = self._idle_s + self._since()
        if self._timer is None or due < self._due_at:
            self.close()
            self._look_at(due)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        task, self._task, self._idle_since = self._task, None, None
        if not self._expired or task is None:
            return
        self._expired = False
        # As in asyncio.timeout: others may have cancelled the task, too.
        if task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError from error

    def _since(self) -> float:
        return self._began if self._idle_since is None else self._idle_since()

    def _look_at(self, when: float) -> None:
        self._due_at = when
        self._timer = asyncio.get_running_loop().call_at(when, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._task is None or self._expired:
            return
        now = asyncio.get_running_loop().time()
        due = self._idle_s + self._since()
        if due > now:
            self._look_at(due)
        elif now - self._due_at > min(self._idle_s / 2, MAX_LOOP_LAG_S):
            # The process was suspended: read the messages that arrived
            # meanwhile before the client counts as idle.
            self._look_at(now + min(self._idle_s, MAX_LOOP_LAG_S))
        else:
            self._expired = True
            self._task.cancel()


MAX_LOOP_LAG_S = 1.0
"""A timer later than this means that the process was suspended; the client then
gets one more second."""
