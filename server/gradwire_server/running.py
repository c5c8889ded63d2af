"""The jobs that run, so that all of them can be ended at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from gradwire_server.errors import JobError


class Running:
    """The tasks of running jobs."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[object]] = set()
        self._cause: JobError | None = None

    @asynccontextmanager
    async def job(self) -> AsyncIterator[None]:
        """The calling task runs a job within this context.

        Raises:
            JobError: All jobs were ended meanwhile.
        """
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a job runs in a task")
        self._tasks.add(task)
        try:
            yield
        except asyncio.CancelledError as cancelled:
            if self._cause is not None and cancelled.args == (_ENDED,):
                task.uncancel()
                raise self._cause.bare() from None
            raise
        finally:
            self._tasks.discard(task)

    def end(self, cause: JobError) -> None:
        """Ends all of them but the caller's own.

        Args:
            cause: What each ends with.
        """
        self._cause = cause
        for task in self._tasks - {asyncio.current_task()}:
            task.cancel(_ENDED)


_ENDED = "all jobs are ended"
