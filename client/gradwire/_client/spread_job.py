"""A product that several servers compute, as jobs that take its segments."""

from __future__ import annotations

import heapq
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from gradwire._api.errors import GradwireError
from gradwire._api.options import left_of
from gradwire._api.types import Array, Receipt
from gradwire._arrays.device_copy import HostCopies
from gradwire._arrays.operand import Operand
from gradwire._client.batch_job import MakeJob
from gradwire._client.spread_plan import SpreadPlan
from gradwire._core.job_plan import Plan, with_rows
from gradwire._core.outputs import ArrayOutputs, Output
from gradwire._core.progress import SpreadReporter
from gradwire._core.segments import (
    ASK_AGAIN_S,
    JOB_S,
    RECENT,
    OrderedSums,
    held_segments,
    late_after_s,
    segments_ahead,
)
from gradwire._core.timers import later
from gradwire._resilience.array_job import ArrayJob
from gradwire._resilience.segments_job import Segments, SegmentsJob, Taken
from gradwire_protocol.matrices import Matrix

RECEIPT_S = 1.0
"""Seconds that jobs have for their receipts once all results are there."""


class MakeSegmentsJob(Protocol):
    """Creates a job that takes segments."""

    def __call__(
        self,
        plan: Plan,
        operands: Mapping[Matrix, Operand],
        segments: Segments,
        whole: Plan,
        segment_rows: int,
        /,
    ) -> SegmentsJob:
        """Create a job; see `SegmentsJob`."""


@dataclass(eq=False, slots=True)
class Part:
    """A job of the product."""

    number: int
    duplicate: bool
    """Whether it was begun for segments that others are late with."""
    moved_at: float
    """When it has begun, or has last completed a segment."""
    job: ArrayJob = field(init=False)
    taken: list[Taken] = field(default_factory=list)
    """Its segments that are not complete, in order."""
    since: float | None = None
    """When the attempt took its first segment."""
    over: bool = False
    """Whether the attempt has taken the last segment of the product."""
    complete: list[int] = field(default_factory=list)
    """Segments that the attempt has completed first."""
    cancel: Callable[[], object] | None = None
    cancelled: bool = False

    @property
    def idle_since(self) -> float:
        """When it has last completed a segment, or began the one that is next."""
        return max(self.moved_at, self.taken[0].at) if self.taken else math.inf

    def is_late(self, before: float) -> bool:
        """Return whether it has completed nothing since then, with segments to do."""
        return self.idle_since < before


@dataclass(eq=False, slots=True)
class _Segment:
    """A segment that was begun."""

    parts: list[Part] = field(default_factory=list)
    """The jobs that compute it."""
    writer: Part | None = None
    """The one that writes its results where the caller gets them."""
    kept: Taken | None = None
    """Results of another one, to be stored when the writer has left."""
    done: bool = False


class SpreadJob:
    """A product's segments, and what they have in common. Thread-safe.

        job.spread.choose_numerics(those of all servers)
        job.spread.divide()
        job.start(servers)
        while (part := job.begin(jobs)) is not None:
            if it is a number: wait, and ask again
            ... run part.job, which takes segments ...
            job.end(part, its receipt), or job.fail(part, its error)
        job.deliver()

    Args:
        plan: The plan of the whole product.
        operands: Its operands.
        outputs: Its results.
        make: Creates a job of one segment.
        make_of_segments: Creates a job that takes segments.
        copies: Counts copies between GPUs and host memory.

    Attributes:
        outputs: As above.
        spread: The plan, the division and the servers.
        news: Number of changes so far, as for `Segments`.
    """

    def __init__(
        self,
        plan: Plan,
        operands: Mapping[Matrix, Operand],
        outputs: ArrayOutputs,
        *,
        make: MakeJob,
        make_of_segments: MakeSegmentsJob,
        copies: HostCopies,
    ) -> None:
        self.outputs = outputs
        self._plan = plan
        self._operands = operands
        self._make = make
        self._make_of_segments = make_of_segments
        self._copies = copies
        self._changed = threading.Condition()
        self.news = 0
        self._begun_at = time.monotonic()
        self._servers: Callable[[], Set[str]] = frozenset
        self._timer: threading.Timer | None = None
        self.begin_again()

    def begin_again(self) -> None:
        """Forget what was computed, with other servers. No job may be in progress."""
        self._end_timer()
        self.spread = SpreadPlan(self._plan)
        self._stopped = False
        self._sums = OrderedSums(self._plan)
        self._parts: list[Part] = []
        self._begun = 0
        """Number of all jobs so far."""
        self._segments: dict[int, _Segment] = {}
        """The segments that were begun, until all their jobs have left them."""
        self._queue: list[int] = []
        """The others that are not done: a heap."""
        self._left = 0
        """Number of segments that are not done."""
        self._computed: list[tuple[Sequence[int], Receipt]] = []
        """Receipts of jobs, with the segments for which each was the first."""
        self._seconds: deque[float] = deque(maxlen=RECENT)
        self._no_duplicates_until = 0.0
        self._whole: Mapping[Matrix, Array] = {}
        self._reporter: SpreadReporter | None = None
        self._jobs = 1

    def start(self, servers: Callable[[], Set[str]]) -> None:
        """Begin, once the product is divided.

        Args:
            servers: Returns the addresses of the servers that can be used.
        """
        self._servers = servers
        self._left = self.spread.division.segments
        self._queue = list(range(self._left))
        if self.spread.plan.options.on_progress is not None:
            self._reporter = SpreadReporter(self.spread.plan)

    @property
    def left_s(self) -> float | None:
        """Seconds that the product has left; None: no limit."""
        return left_of(self._plan.options, self._begun_at).timeout_s

    def begin(self, jobs: int) -> Part | float | None:
        """Create the next job.

        Args:
            jobs: Most jobs at the same time.

        Returns:
            The job; or seconds after which to ask again, unless a job ends before; or
            None if there are no more.
        """
        with self._changed:
            if self._stopped or not self._left:
                return None
            if not self._whole:
                self._whole = self.outputs.all()
            self._jobs, now = max(1, jobs), time.monotonic()
            running = len(self._parts)
            if self._may_begin():
                return self._part(now) if running < jobs else ASK_AGAIN_S
            if now < self._no_duplicates_until or self._late_segment(now) is None:
                return self._late_in(now)
            late = [part for part in self._parts if part.is_late(now - self._limit())]
            slow = {part.job.address for part in late}
            servers = self._servers()
            others = servers - slow
            room = max(1, jobs * len(others) // max(1, len(servers)))
            if others and running - len(late) < room:
                return self._part(now, slow)
            return ASK_AGAIN_S

    def end(self, part: Part, receipt: Receipt) -> None:
        """Use the receipt of a job that has succeeded, and its results."""
        job = part.job
        if not isinstance(job, SegmentsJob):
            results = job.outputs.present()
            sums = {matrix: results[matrix] for matrix in self.spread.plan.sums}
            (taken,) = part.taken
            self.complete(part, taken, sums)
        self._leave(part, receipt)

    def fail(self, part: Part, error: BaseException) -> bool:
        """Note the failure of a job.

        Returns:
            Whether the product has failed, too.
        """
        if isinstance(part.job, SegmentsJob):
            part.job.give_back()
        else:
            self.give_back(part, part.taken)
        self._leave(part, None)
        with self._changed:
            if not isinstance(error, GradwireError):
                return True
            if part.cancelled or not self._left:
                return False
            if part.duplicate:
                self._no_duplicates_until = time.monotonic() + ASK_AGAIN_S
            return not part.duplicate

    def stop(self) -> None:
        """Begin no more jobs, and cancel those that run."""
        with self._changed:
            self._stopped = True
            cancels = _cancels(self._parts)
            self._changed_now()
        for cancel in cancels:
            cancel()

    def deliver(self) -> Receipt:
        """Make the objects that the caller gets from the results.

        Returns:
            The receipt of all jobs.
        """
        self._end_timer()
        self._sums.write(self._whole)
        self.outputs.deliver(self._copies)
        return self._copies.told(self.spread.receipt(self._computed))

    def _end_timer(self) -> None:
        """End the wait for receipts, and refer no more to its timer.

        The timer refers to this job, whose results would live until the next garbage
        collection.
        """
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    # What jobs that take segments call, in any thread.

    def take(self, part: Part) -> Taken | float | None:
        """Take the next segment for a job, as for `Segments.take`."""
        with self._changed:
            if self._stopped or part.cancelled or part.over or not self._left:
                return None
            now = time.monotonic()
            if part.since is not None and now - part.since > JOB_S:
                return None
            servers = self._servers()  # none: the last one is tried again
            if servers and part.job.address not in servers:
                return None
            if len(part.taken) >= self._ahead():
                return ASK_AGAIN_S
            if self._may_begin():
                return self._give(part, heapq.heappop(self._queue), now)
            late = self._late_segment(now, {part.job.address})
            if late is not None:
                return self._give(part, late, now)
            return self._late_in(now) if self._queue else None

    def wait(self, news: int, seconds: float) -> None:
        """Wait until something has changed, as for `Segments.wait`."""
        with self._changed:
            self._changed.wait_for(lambda: self.news != news, seconds)

    def tell(self) -> None:
        """Have all jobs ask again what to take."""
        with self._changed:
            self._changed_now()
            wakes = [part.job.wake for part in self._parts if part.job.waits]
        for wake in wakes:
            wake()

    def complete(self, part: Part, taken: Taken, sums: Mapping[Matrix, Array]) -> None:
        """Use the results of a segment, which are in its places, and its sums."""
        with self._changed:
            now = time.monotonic()
            self._seconds.append(now - max(part.moved_at, taken.at))
            part.moved_at = now
            part.taken.remove(taken)
            segment = self._without(part, taken)
            first, segment.done = not segment.done, True
            store = first or segment.writer is part
            if segment.writer is part:
                self._leave_to_others(segment)
            elif first and segment.writer is not None:
                # It may be about to write the same.
                segment.kept, store = taken, False
            if first:
                part.complete.append(taken.number)
                self._left -= 1
            cancels = self._overtaken(now)
            if first and not self._left:
                # Jobs that have completed nothing hang, or have just begun.
                idle = [
                    each
                    for each in self._parts
                    if not each.complete and not each.cancelled
                ]
                for each in idle:
                    each.job.late = each.moved_at < now - self._limit()
                cancels += _cancels(idle)
                self._timer = later(RECEIPT_S, self.stop)
        if store:
            self._store(taken)
        if first:
            self._sums.add(taken.number, sums)
        self.tell()
        for cancel in cancels:
            cancel()
        if first and self._reporter is not None:
            self._reporter.complete(part.number, taken.rows, part.job.address)

    def give_back(self, part: Part, left: Sequence[Taken]) -> None:
        """Have segments that are not complete computed by another job.

        Args:
            part: The job, whose attempt has ended.
            left: The segments.
        """
        with self._changed:
            kept: list[Taken] = []
            for taken in left:
                segment = self._without(part, taken)
                if segment.writer is part and (own := self._leave_to_others(segment)):
                    kept.append(own)
                if not segment.done and not segment.parts:
                    heapq.heappush(self._queue, taken.number)
            part.taken.clear()
            part.since, part.over = None, False
            complete, part.complete = part.complete, []
            if complete and isinstance(part.job, SegmentsJob):
                receipt = self.spread.receipt_so_far(part.job, complete)
                self._computed.append((complete, receipt))
        for taken in kept:
            self._store(taken)
        if self._reporter is not None:
            self._reporter.forget(part.number)
        self.tell()

    # With the lock held.

    def _changed_now(self) -> None:
        self.news += 1
        self._changed.notify_all()

    def _may_begin(self) -> bool:
        """Whether the sums of the next segment may be held until those before come."""
        most = max(2 * self._jobs, held_segments(self.spread.plan))
        return bool(self._queue) and self._queue[0] - self._sums.added < most

    def _ahead(self) -> int:
        """Return how many segments a job may have begun and not completed."""
        plan, rows = self.spread.plan, self.spread.division.segment_rows
        idle = self._jobs - sum(bool(part.taken) for part in self._parts)
        return segments_ahead(plan, rows, len(self._queue), self._jobs, idle)

    def _limit(self) -> float:
        """Return the seconds after which a segment is late; infinite: not known yet."""
        limit = late_after_s(self._seconds)
        return math.inf if limit is None else limit

    def _late_segment(self, now: float, not_at: Set[str] = frozenset()) -> int | None:
        """Return the first segment that takes too long where it is computed.

        Args:
            now: The time.
            not_at: Servers, none of which computes it.
        """
        before = now - self._limit()
        for number, segment in sorted(self._segments.items()):
            if segment.done or not all(p.is_late(before) for p in segment.parts):
                continue
            if not_at.isdisjoint(part.job.address for part in segment.parts):
                return number
        return None

    def _late_in(self, now: float) -> float:
        """Return the seconds after which another job is late, at most `ASK_AGAIN_S`."""
        until = self._limit() - now
        at = [until + each.idle_since for each in self._parts if each.taken]
        return min((ASK_AGAIN_S, *(each for each in at if each > 0)))

    def _overtaken(self, now: float) -> list[Callable[[], object]]:
        """Mark jobs all of whose segments others have completed, to be cancelled."""
        before = now - self._limit()
        several = self.spread.division.several
        overtaken = [
            part
            for part in self._parts
            if part.taken
            and all(self._segments[each.number].done for each in part.taken)
            and not (several and self._queue and not part.is_late(before))
        ]
        for part in overtaken:
            part.job.late = any(not each.duplicate for each in part.taken)
        return _cancels(overtaken)

    def _without(self, part: Part, taken: Taken) -> _Segment:
        """Return a segment, which a job computes no longer."""
        segment = self._segments[taken.number]
        segment.parts.remove(part)
        if not segment.parts:
            del self._segments[taken.number]
        return segment

    @staticmethod
    def _leave_to_others(segment: _Segment) -> Taken | None:
        """Let another job write a segment's results, and return those that are kept."""
        kept, segment.writer, segment.kept = segment.kept, None, None
        return kept

    def _part(self, now: float, avoid: Set[str] = frozenset()) -> Part:
        """Create a job.

        Args:
            now: The time.
            avoid: Servers that are late, if it is for their segments.
        """
        shared, whole, division = self.spread, self.spread.plan, self.spread.division
        part = Part(self._begun, duplicate=bool(avoid), moved_at=now)
        self._begun += 1
        report = None
        if self._reporter is not None:
            report = self._reporter.of_job(part.number)
        options = replace(
            left_of(whole.options, self._begun_at),
            result_dtypes={**whole.options.result_dtypes, **shared.sum_dtypes()},
            on_progress=report,
            job_id=shared.job_id(part.number, "+" if avoid else ""),
        )
        if division.several:
            rows = division.segment_rows
            plan = replace(with_rows(whole, None), options=options)
            plan = replace(plan, segment_rows=rows if whole.sums else 0)
            part.job = self._make_of_segments(
                plan, self._operands, _Bound(self, part), whole, rows
            )
        else:
            late = self._late_segment(now) if avoid else None
            number = heapq.heappop(self._queue) if late is None else late
            taken = self._give(part, number, now)
            first, last = division.rows_of(number)
            plan = replace(
                with_rows(whole, taken.rows), options=options, first_row=first
            )
            operands = {
                matrix: each if matrix is Matrix.W else each.part(first, last)
                for matrix, each in self._operands.items()
            }
            places = {m: Output(array, array) for m, array in taken.places.items()}
            part.job = self._make(plan, operands, places)
        part.job.unusable = shared.unusable | avoid if avoid else shared.unusable
        part.job.once = bool(avoid)
        part.job.on_call = lambda cancel: self._called(part, cancel)
        self._parts.append(part)
        return part

    def _give(self, part: Part, number: int, now: float) -> Taken:
        """Give a job a segment.

        If another job writes its results, this one's have places of their own.
        """
        segment = self._segments.setdefault(number, _Segment())
        first, last = self.spread.division.rows_of(number)
        places: dict[Matrix, Array] = {}
        for matrix, array in self._whole.items():
            if matrix.row_wise:
                place = _rows_of(array, first, last) if not segment.writer else None
                if place is None:
                    place = np.empty((last - first, array.shape[-1]), array.dtype)
                places[matrix] = place
        duplicate = bool(segment.parts)
        taken = Taken(number, first, last - first, places, now, duplicate)
        segment.writer = segment.writer or part
        segment.parts.append(part)
        part.taken.append(taken)
        part.since = part.since or now
        part.over = number == self.spread.division.segments - 1
        return taken

    # Without it.

    def _leave(self, part: Part, receipt: Receipt | None) -> None:
        """Remove a job that has ended.

        Nothing may refer back to it: its sums would live until the next garbage
        collection.
        """
        with self._changed:
            self._parts.remove(part)
            part.job.detach()
            part.cancel = None
            if receipt is not None and part.complete:
                self._computed.append((part.complete, receipt))
        if self._reporter is not None:
            self._reporter.forget(part.number)
        self.tell()

    def _called(self, part: Part, cancel: Callable[[], object]) -> None:
        with self._changed:
            part.cancel = cancel
            cancelled = part.cancelled
        if cancelled:
            cancel()

    def _store(self, taken: Taken) -> None:
        """Store the rows of a segment where the caller gets them."""
        for matrix, rows in taken.places.items():
            _store(self._whole[matrix], taken.first_row, rows)


class _Bound:
    """The segments of a product, for one of its jobs."""

    def __init__(self, spread: SpreadJob, part: Part) -> None:
        self._spread, self._part = spread, part

    def take(self) -> Taken | float | None:
        return self._spread.take(self._part)

    @property
    def news(self) -> int:
        return self._spread.news

    def wait(self, news: int, seconds: float) -> None:
        self._spread.wait(news, seconds)

    def tell(self) -> None:
        self._spread.tell()

    def complete(self, taken: Taken, sums: Mapping[Matrix, Array]) -> None:
        self._spread.complete(self._part, taken, sums)

    def give_back(self, left: Sequence[Taken]) -> None:
        self._spread.give_back(self._part, left)


def _cancels(parts: Sequence[Part]) -> list[Callable[[], object]]:
    """Mark jobs as cancelled, and return what cancels their calls."""
    for part in parts:
        part.cancelled = True
    return [part.cancel for part in parts if part.cancel is not None]


def _rows_of(array: Array, first: int, last: int) -> Array | None:
    """Return rows of an array whose leading dimensions count as rows, as a view.

    None if no view has them.
    """
    try:
        flat = array.reshape(-1, array.shape[-1], copy=False)
    except ValueError:
        return None
    return flat[first:last]


def _store(array: Array, first: int, rows: Array) -> None:
    """Store rows in an array whose leading dimensions count as rows."""
    if not rows.size or np.may_share_memory(array, rows):
        return  # they were written in place
    place = _rows_of(array, first, first + len(rows))
    if place is None:
        at = np.unravel_index(np.arange(first, first + len(rows)), array.shape[:-1])
        array[at] = rows
    else:
        np.copyto(place, rows)
