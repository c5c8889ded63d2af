"""Reports of a job's progress to its caller."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from gradwire._api.options import OnProgress
from gradwire._api.types import Progress, Receipt
from gradwire._core.job_plan import Plan
from gradwire._core.segments import Division


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


class SpreadReporter:
    """Calls `on_progress` with the totals of the runs of a spread product.

    Args:
        plan: The plan of the whole product. Its `on_progress` is never called
            concurrently.
        division: Its runs.
    """

    def __init__(self, plan: Plan, division: Division) -> None:
        self._plan = plan
        self._division = division
        self._counts: dict[int, _Counts] = {}
        self._by_server: dict[str, int] = {}
        self._lock = threading.Lock()

    def of_run(self, number: int) -> Callable[[Progress], None]:
        """Return the function for the progress of a run's job."""

        def report(progress: Progress) -> None:
            with self._lock:
                self._counts[number] = _Counts(
                    progress.bytes_sent, progress.bytes_received, progress.rows_sent
                )
                self._report(progress.jobs_ahead)

        return report

    def ended(self, number: int, receipt: Receipt) -> None:
        """Report that a run is complete."""
        m, address = receipt.m, receipt.server_address
        with self._lock:
            self._counts[number] = self._of_rows(m)
            self._by_server[address] = self._by_server.get(address, 0) + m
            self._report(None)

    def _of_rows(self, m: int) -> _Counts:
        return _Counts(self._plan.upload_bytes(m), self._plan.download_bytes(m), m)

    def _report(self, jobs_ahead: int | None) -> None:
        on_progress, m = self._plan.options.on_progress, self._plan.m
        if on_progress is None:
            return
        counts = self._counts.values()
        to_send = to_receive = None
        if m is not None:
            # Every run sends W, and receives sums.
            whole, more = self._of_rows(m), self._of_rows(0)
            runs = self._division.run_count - 1
            to_send = whole.bytes_sent + runs * more.bytes_sent
            to_receive = whole.bytes_received + runs * more.bytes_received
        on_progress(
            Progress(
                bytes_sent=sum(each.bytes_sent for each in counts),
                bytes_to_send=to_send,
                bytes_received=sum(each.bytes_received for each in counts),
                bytes_to_receive=to_receive,
                rows_sent=sum(each.rows_sent for each in counts),
                m=m,
                jobs_ahead=jobs_ahead,
                rows_by_server=dict(self._by_server),
            )
        )
