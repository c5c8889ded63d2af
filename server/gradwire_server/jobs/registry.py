"""The running jobs, so that all of them can be ended at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from gradwire_server.errors import JobError


class JobRegistry:
    """The tasks of running jobs."""

    def __init__(self) -> None:
        self._tasks: dict[asyncio.Task[object], Callable[[], bool]] = {}
        self._cause: JobError | None = None

    @asynccontextmanager
    async def job(self) -> AsyncIterator[None]:
        """Register the calling task as a running job within this context.

        Raises:
            JobError: All jobs were ended meanwhile.
        """
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a job runs in a task")
        self._tasks[task] = _cannot
        try:
            yield
        except asyncio.CancelledError as cancelled:
            if self._cause is not None and cancelled.args == (_ENDED,):
                task.uncancel()
                raise self._cause.bare() from None
            raise
        finally:
            self._tasks.pop(task, None)

    def on_drain(self, hand_over: Callable[[], bool]) -> None:
        """Register a graceful end for the calling task's job.

        Args:
            hand_over: Makes the job end by itself soon; returns False if it cannot.
        """
        task = asyncio.current_task()
        if task in self._tasks:
            self._tasks[task] = hand_over

    def hand_over(self, cause: JobError) -> None:
        """Make every job end by itself soon, or cancel it.

        Args:
            cause: Error of the cancelled jobs.
        """
        self._cause = cause
        for task, hand_over in list(self._tasks.items()):
            if not hand_over():
                task.cancel(_ENDED)

    def cancel_all(self, cause: JobError) -> None:
        """Cancel all jobs except the caller's.

        Args:
            cause: Error of the cancelled jobs.
        """
        self._cause = cause
        for task in set(self._tasks) - {asyncio.current_task()}:
            task.cancel(_ENDED)


def _cannot() -> bool:
    return False


_ENDED = "all jobs are ended"
