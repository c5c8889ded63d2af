"""Reports of a job's progress to its caller."""

from __future__ import annotations

import threading

from gradwire._api.types import Progress
from gradwire._core.job_plan import Plan


class Reporter:
    """Calls `on_progress` from both directions of a stream, but never concurrently."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._lock = threading.Lock()

    def report(
        self,
        *,
        bytes_sent: int,
        bytes_received: int,
        rows_sent: int,
        m: int | None,
        jobs_ahead: int | None = None,
    ) -> None:
        """Report the current progress."""
        on_progress = self._plan.options.on_progress
        if on_progress is None:
            return
        with self._lock:
            on_progress(
                Progress(
                    bytes_sent=bytes_sent,
                    bytes_to_send=None if m is None else self._plan.upload_bytes(m),
                    bytes_received=bytes_received,
                    bytes_to_receive=(
                        None if m is None else self._plan.download_bytes(m)
                    ),
                    rows_sent=rows_sent,
                    m=m,
                    jobs_ahead=jobs_ahead,
                )
            )
