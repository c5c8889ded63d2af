"""Reports of a job's progress to its caller."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from gradwire._api.options import OnProgress
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


@dataclass(slots=True)
class _Counts:
    bytes_sent: int = 0
    bytes_received: int = 0
    rows_sent: int = 0


class BatchReporter:
    """Calls `on_progress` with the totals of several jobs of one size.

    Args:
        on_progress: The caller's function. It is never called concurrently.
        count: The number of jobs.
    """

    def __init__(self, on_progress: OnProgress, count: int) -> None:
        self._on_progress = on_progress
        self._count = count
        self._lock = threading.Lock()
        self._total = _Counts()

    def of_one(self) -> Callable[[Progress], None]:
        """Return the function for the progress of one more job."""
        before = _Counts()

        def report(progress: Progress) -> None:
            total = self._total
            with self._lock:
                for name in _Counts.__slots__:
                    now = getattr(progress, name)
                    more = now - getattr(before, name)  # negative in a retry
                    setattr(total, name, getattr(total, name) + more)
                    setattr(before, name, now)
                self._on_progress(
                    Progress(
                        bytes_sent=total.bytes_sent,
                        bytes_to_send=self._times(progress.bytes_to_send),
                        bytes_received=total.bytes_received,
                        bytes_to_receive=self._times(progress.bytes_to_receive),
                        rows_sent=total.rows_sent,
                        m=self._times(progress.m),
                        jobs_ahead=progress.jobs_ahead,
                    )
                )

        return report

    def _times(self, of_one: int | None) -> int | None:
        return None if of_one is None else self._count * of_one


@dataclass(slots=True)
class _Attempt:
    """The progress of an attempt of a job of a spread product."""

    rows_sent: int = 0
    bytes_received: int = 0
    complete: int = 0
    """Rows of complete segments."""


class SpreadReporter:
    """Calls `on_progress` with the totals of a spread product.

    W and the sums count once, however many servers get them.

    Args:
        plan: The plan of the whole product. Its `on_progress` is never called
            concurrently.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._complete = 0
        self._attempts: dict[int, _Attempt] = {}
        self._by_server: dict[str, int] = {}
        self._lock = threading.Lock()
        self._row_bytes = plan.download_bytes(1) - plan.download_bytes(0)

    def of_job(self, number: int) -> Callable[[Progress], None]:
        """Return the function for the progress of a job."""

        def report(progress: Progress) -> None:
            with self._lock:
                attempt = self._attempts.setdefault(number, _Attempt())
                attempt.rows_sent = progress.rows_sent
                attempt.bytes_received = progress.bytes_received
                self._report(progress.jobs_ahead)

        return report

    def complete(self, number: int, rows: int, address: str) -> None:
        """Report that a segment is complete.

        Args:
            number: The job.
            rows: Rows of the segment.
            address: The server.
        """
        with self._lock:
            self._attempts.setdefault(number, _Attempt()).complete += rows
            self._complete += rows
            self._by_server[address] = self._by_server.get(address, 0) + rows
            self._report(None)

    def forget(self, number: int) -> None:
        """Note that an attempt of a job has ended."""
        with self._lock:
            self._attempts.pop(number, None)

    def _report(self, jobs_ahead: int | None) -> None:
        plan, m = self._plan, self._plan.m
        if plan.options.on_progress is None:
            return
        rows, received = self._complete, self._complete * self._row_bytes
        for each in self._attempts.values():
            rows += max(0, each.rows_sent - each.complete)
            received += max(0, each.bytes_received - each.complete * self._row_bytes)
        if m is not None:  # more than one job may compute a segment
            rows, received = min(rows, m), min(received, m * self._row_bytes)
            if self._complete == m:
                received = plan.download_bytes(m)
        plan.options.on_progress(
            Progress(
                bytes_sent=plan.upload_bytes(rows),
                bytes_to_send=None if m is None else plan.upload_bytes(m),
                bytes_received=received,
                bytes_to_receive=None if m is None else plan.download_bytes(m),
                rows_sent=rows,
                m=m,
                jobs_ahead=jobs_ahead,
                rows_by_server=dict(self._by_server),
            )
        )
