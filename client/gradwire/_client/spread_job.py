"""A product that several servers compute, as jobs of some of its segments each."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

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
    RECENT,
    OrderedSums,
    Run,
    held_segments,
    late_after_s,
)
from gradwire._resilience.array_job import ArrayJob
from gradwire_protocol.matrices import Matrix


@dataclass(eq=False, slots=True)
class Part:
    """A job with the segments of a run: the run's first job, or a duplicate."""

    run: Run
    job: ArrayJob
    duplicate: bool
    begun_at: float
    cancel: Callable[[], object] | None = None
    cancelled: bool = False


@dataclass(eq=False, slots=True)
class _State:
    """A run that was begun."""

    parts: list[Part] = field(default_factory=list)
    """Its jobs in progress."""

    begun: int = 0
    """Number of all its jobs so far."""

    decided: bool = False
    """Whether one of them has succeeded."""

    winner: tuple[Part, Receipt] | None = None
    """That one, until its results were taken."""


class SpreadJob:
    """A product's segments, and what they have in common. Thread-safe.

        job.spread.choose_numerics(those of all servers)
        job.spread.divide(jobs)
        job.begin_reports()
        while (part := job.begin(jobs, servers)) is not None:
            if it is a number: wait, and ask again
            ... run part.job ...
            job.end(part, its receipt), or job.fail(part, its error)
        job.deliver()

    Args:
        plan: The plan of the whole product.
        operands: Its operands.
        outputs: Its results.
        make: Creates a job.
        copies: Counts copies between GPUs and host memory.

    Attributes:
        outputs: As above.
        spread: The plan, the division and the servers.
    """

    def __init__(
        self,
        plan: Plan,
        operands: Mapping[Matrix, Operand],
        outputs: ArrayOutputs,
        *,
        make: MakeJob,
        copies: HostCopies,
    ) -> None:
        self.outputs = outputs
        self._plan = plan
        self._operands = operands
        self._make = make
        self._copies = copies
        self._lock = threading.Lock()
        self._begun_at = time.monotonic()
        self.begin_again()

    def begin_again(self) -> None:
        """Forget what was computed, with other servers. No job may be in progress."""
        self.spread = SpreadPlan(self._plan)
        self._stopped = False
        self._sums = OrderedSums(self._plan)
        self._states: dict[int, _State] = {}
        self._receipts: dict[int, Receipt] = {}
        self._seconds: deque[float] = deque(maxlen=RECENT)
        self._next = 0
        self._whole: Mapping[Matrix, Array] = {}
        self._reporter: SpreadReporter | None = None
        self._window = 0

    def begin_reports(self) -> None:
        """Report progress, once the product is divided."""
        if self.spread.plan.options.on_progress is not None:
            self._reporter = SpreadReporter(self.spread.plan, self.spread.division)

    @property
    def left_s(self) -> float | None:
        """Seconds that the product has left; None: no limit."""
        return left_of(self._plan.options, self._begun_at).timeout_s

    @property
    def run_count(self) -> int:
        """Number of runs."""
        return self.spread.division.run_count

    def begin(self, jobs: int, servers: Set[str]) -> Part | float | None:
        """Create the next job.

        Args:
            jobs: Most runs at the same time.
            servers: Addresses of the servers that can be used. A run has a job on each
                at most.

        Returns:
            The job; or seconds after which to ask again, unless a job ends before; or
            None if there are no more.
        """
        with self._lock:
            if self._stopped or len(self._receipts) == self.run_count:
                return None
            if not self._whole:
                self._whole = self.outputs.all()
            self._window = max(self._window, jobs)
            in_progress = sum(bool(state.parts) for state in self._states.values())
            room = in_progress < jobs and self._next < self.run_count
            if room and self._may_begin():
                run, self._next = self.spread.division.run(self._next), self._next + 1
                state = self._states[run.number] = _State()
                return self._part(state, run)
            return self._duplicate(servers)

    def end(self, part: Part, receipt: Receipt) -> None:
        """Use the results of a job that has succeeded, unless another one was first."""
        with self._lock:
            state = self._left(part)
            cancels: Sequence[Callable[[], object]] = ()
            if not state.decided:
                state.decided, state.winner = True, (part, receipt)
                self._seconds.append(time.monotonic() - part.begun_at)
                for each in state.parts:
                    each.job.late = each.begun_at < part.begun_at
                cancels = self._cancels(state.parts)
            winner = self._settled(part.run)
        for cancel in cancels:
            cancel()
        if winner is not None:
            self._take(*winner)

    def fail(self, part: Part, error: BaseException) -> bool:
        """Note the failure of a job.

        Returns:
            Whether the product has failed, too: not if another job computes the same.
        """
        with self._lock:
            state = self._left(part)
            matters = isinstance(error, Exception) and not part.cancelled
            if not isinstance(error, GradwireError) or (
                matters and not state.parts and not state.decided
            ):
                return True
            winner = self._settled(part.run)
        if winner is not None:
            self._take(*winner)
        return False

    def stop(self) -> None:
        """Begin no more jobs, and cancel those that run."""
        with self._lock:
            self._stopped = True
            cancels = [
                cancel
                for state in self._states.values()
                for cancel in self._cancels(state.parts)
            ]
        for cancel in cancels:
            cancel()

    def deliver(self) -> Receipt:
        """Make the objects that the caller gets from the results.

        Returns:
            The receipt of all jobs.
        """
        self._sums.write(self._whole)
        self.outputs.deliver(self._copies)
        receipt = self.spread.receipt(self._receipts)
        return self._copies.told(receipt)

    def _may_begin(self) -> bool:
        """Whether the sums of the next run may be held until those before are there."""
        run = self.spread.division.run(self._next)
        ahead = run.first_segment + run.segments - self._sums.added
        return ahead <= max(self._window, held_segments(self.spread.plan))

    def _duplicate(self, servers: Set[str]) -> Part | float:
        """Create another job for the run that takes longest, if that is too long.

        If that job takes too long as well, its server may have stopped, too, and there
        is a third one.
        """
        limit = late_after_s(self._seconds)
        if limit is None:
            return ASK_AGAIN_S
        candidates = [
            (state.parts[-1].begun_at, state)
            for state in self._states.values()
            if not state.decided and state.parts
            if servers - {each.job.address for each in state.parts}
            if state.begun <= len(servers) + 1  # some may have failed
        ]
        if not candidates:
            return ASK_AGAIN_S
        begun_at, state = min(candidates, key=lambda each: each[0])
        left = begun_at + limit - time.monotonic()
        if left > 0:
            return left
        return self._part(state, state.parts[0].run)

    def _part(self, state: _State, run: Run) -> Part:
        """Create the job of a run.

        If the run has jobs already, another server gets this one, and its results have
        places of their own.
        """
        first = not state.begun
        rows = (run.first_row, run.first_row + run.rows)
        operands = {
            matrix: operand if matrix is Matrix.W else operand.part(*rows)
            for matrix, operand in self._operands.items()
        }
        places: dict[Matrix, Output] = {}
        if first:
            for matrix, array in self._whole.items():
                place = _rows_of(array, *rows) if matrix.row_wise else None
                if place is not None:
                    places[matrix] = Output(place, place)
        whole, shared = self.spread.plan, self.spread
        options = left_of(whole.options, self._begun_at)
        report = None
        if self._reporter is not None and first:
            report = self._reporter.of_run(run.number)
        options = replace(
            options,
            result_dtypes={**options.result_dtypes, **shared.sum_dtypes()},
            on_progress=report,
            job_id=shared.job_id(run.number, "+" * state.begun),
        )
        plan = replace(
            with_rows(whole, run.rows), options=options, first_row=run.first_row
        )
        if run.segments > 1 and whole.sums:
            plan = replace(plan, segment_rows=shared.division.segment_rows)
        job = self._make(plan, operands, places)
        job.unusable = shared.unusable
        if not first:
            job.unusable = shared.unusable | {each.job.address for each in state.parts}
            job.once = True
        part = Part(run, job, not first, time.monotonic())
        state.begun += 1
        job.on_call = lambda cancel: self._called(part, cancel)
        state.parts.append(part)
        return part

    def _called(self, part: Part, cancel: Callable[[], object]) -> None:
        with self._lock:
            part.cancel = cancel
            cancelled = part.cancelled
        if cancelled:
            cancel()

    def _left(self, part: Part) -> _State:
        """Remove a job that has ended, and return its run's state.

        Nothing may refer back to it: its sums would live until the next garbage
        collection.
        """
        part.job.on_call = part.cancel = None
        state = self._states[part.run.number]
        state.parts.remove(part)
        return state

    @staticmethod
    def _cancels(parts: Sequence[Part]) -> list[Callable[[], object]]:
        """Mark jobs as cancelled, and return what cancels their calls."""
        for part in parts:
            part.cancelled = True
        return [part.cancel for part in parts if part.cancel is not None]

    def _settled(self, run: Run) -> tuple[Part, Receipt] | None:
        """Return the job whose results a run has, once, when no other writes there."""
        state = self._states[run.number]
        if state.decided and not state.parts:
            del self._states[run.number]
        if any(not part.duplicate for part in state.parts):
            return None
        winner, state.winner = state.winner, None
        return winner

    def _take(self, part: Part, receipt: Receipt) -> None:
        """Take the results of a run."""
        results = part.job.outputs.present()
        for matrix, array in self._whole.items():
            if matrix.row_wise:
                _store(array, part.run.first_row, results[matrix])
        sums: Sequence[Mapping[Matrix, Array]] = part.job.segment_sums
        if not part.job.plan.segment_rows:
            own = {matrix: results[matrix] for matrix in self.spread.plan.sums}
            sums = [own] * part.run.segments  # of several segments only without sums
        self._sums.add(part.run.first_segment, sums)
        with self._lock:
            self._receipts[part.run.number] = receipt
        if self._reporter is not None:
            self._reporter.ended(part.run.number, receipt)


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
