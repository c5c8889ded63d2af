"""A product that several servers compute, as jobs of some of its segments each."""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from gradwire._api.errors import GradwireError, NumericsError
from gradwire._api.options import Numerics, left_of
from gradwire._api.types import Array, Receipt, Segment, spread_receipt
from gradwire._arrays.device_copy import HostCopies
from gradwire._arrays.operand import Operand
from gradwire._client.batch_job import MakeJob
from gradwire._core.job_plan import Plan, with_rows
from gradwire._core.numerics import most_common
from gradwire._core.outputs import ArrayOutputs, Output
from gradwire._core.progress import SpreadReporter
from gradwire._core.segments import Division, OrderedSums, Run, accumulator_of, divide
from gradwire._resilience.array_job import ArrayJob, note_excluded
from gradwire_protocol.limits import MAX_JOB_ID_LENGTH
from gradwire_protocol.matrices import Matrix

SLOW = 2.0
"""How many times as long as the others a run may take, before an idle server computes
it, too. The tail of a job is then at most so much longer: J. Dean and S. Ghemawat,
MapReduce, OSDI 2004, section 3.6."""

LEAST_SLOW_S = 0.05
"""Seconds by which a run may be late in any case."""

_RECENT = 32
"""Runs whose times count for `SLOW`."""


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

    duplicated: bool = False
    """Whether it has, or had, two."""

    decided: bool = False
    """Whether one of them has succeeded."""

    winner: tuple[Part, Receipt] | None = None
    """That one, until its results were taken."""


class SpreadJob:
    """A product's segments, and what they have in common. Thread-safe.

        spread.choose_numerics(those of all servers)
        spread.divide(jobs)
        while (part := spread.begin(jobs, several=...)) is not None:
            if it is a number: wait, and ask again
            ... run part.job ...
            spread.end(part, its receipt), or spread.fail(part, its error)
        spread.deliver()

    Args:
        plan: The plan of the whole product.
        operands: Its operands.
        outputs: Its results.
        make: Creates a job.
        copies: Counts copies between GPUs and host memory.

    Attributes:
        outputs: As above.
        plan: As above.
        unusable: Addresses of the servers that get no segment.
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
        self.plan = plan
        self.unusable: set[str] = set()
        self._operands = operands
        self._make = make
        self._copies = copies
        self._lock = threading.Lock()
        self._begun_at = time.monotonic()
        self._stopped = False
        self._sums = OrderedSums(plan)
        self._states: dict[int, _State] = {}
        self._receipts: dict[int, Receipt] = {}
        self._seconds: deque[float] = deque(maxlen=_RECENT)
        self._next = 0
        self._whole: Mapping[Matrix, Array] = {}
        self._division = Division(plan.m or 0, 1)
        self._reporter: SpreadReporter | None = None
        self._window = 0

    def choose_numerics(self, found: Mapping[str, Numerics | None]) -> None:
        """Decide which servers compute segments: those that most have in common.

        Args:
            found: The numerics of each server, by address; None: it computes no
                segments.

        Raises:
            NumericsError: No server computes segments.
        """
        known = {at: each for at, each in found.items() if each is not None}
        chosen = most_common(known)
        if chosen is None:
            raise NumericsError(
                f"spread is on, but no server at {', '.join(found)} computes segments:"
                " update them"
            )
        for address, each in found.items():
            if each != chosen:
                self.unusable.add(address)
                why = f"it computes with {each}: expected {chosen}"
                if each is None:
                    why = "it does not know them: update it"
                note_excluded(self.plan.options.job_id, address, why)
        options = replace(self.plan.options, numerics=chosen)
        rows = options.block_rows if isinstance(options.block_rows, int) else 0
        self.plan = replace(self.plan, options=options, block_rows=rows)

    def divide(self, jobs: int) -> None:
        """Divide the product, once its servers are known.

        Args:
            jobs: Jobs at the same time.
        """
        numerics = self.plan.options.numerics
        if numerics is None:
            raise RuntimeError("the servers of the job are not known")
        self._division = divide(self.plan, numerics.row_block_bytes, jobs)
        if self.plan.options.on_progress is not None:
            self._reporter = SpreadReporter(
                self.plan.options.on_progress,
                [with_rows(self.plan, run.rows) for run in self._division.runs()],
            )

    @property
    def run_count(self) -> int:
        """Number of runs."""
        return self._division.run_count

    def begin(self, jobs: int, *, several: bool) -> Part | float | None:
        """Create the next job.

        Args:
            jobs: Most jobs at the same time.
            several: Whether there are servers beside the slowest one.

        Returns:
            The job; or seconds after which to ask again, unless a job ends before; or
            None if there are no more.
        """
        with self._lock:
            if self._stopped or len(self._receipts) == self.run_count:
                return None
            if not self._whole:
                self._whole = self.outputs.all()
            in_progress = sum(len(state.parts) for state in self._states.values())
            if in_progress >= jobs:
                return _ASK_AGAIN_S
            self._window = max(self._window, jobs)
            if self._next < self.run_count and self._may_begin():
                run, self._next = self._division.run(self._next), self._next + 1
                state = self._states[run.number] = _State()
                return self._part(state, run)
            return self._duplicate() if several else _ASK_AGAIN_S

    def end(self, part: Part, receipt: Receipt) -> None:
        """Use the results of a job that has succeeded, unless another one was first."""
        with self._lock:
            state = self._states[part.run.number]
            state.parts.remove(part)
            cancels: Sequence[Callable[[], object]] = ()
            if not state.decided:
                state.decided, state.winner = True, (part, receipt)
                self._seconds.append(time.monotonic() - part.begun_at)
                cancels = self._cancels(state.parts)
            winner = self._settled(state)
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
            state = self._states[part.run.number]
            state.parts.remove(part)
            matters = isinstance(error, Exception) and not part.cancelled
            if not isinstance(error, GradwireError) or (
                matters and not state.parts and not state.decided
            ):
                return True
            winner = self._settled(state)
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
        runs = [self._receipts[number] for number in range(self.run_count)]
        segments = [
            Segment(
                first_row=first,
                rows=min(self._division.segment_rows, run.first_row + run.rows - first),
                server_address=receipt.server_address,
                server_instance=receipt.server_instance,
                device=receipt.device,
                attempts=receipt.attempts,
            )
            for run, receipt in zip(self._division.runs(), runs, strict=True)
            for first in range(
                run.first_row,
                max(run.first_row + run.rows, run.first_row + 1),
                self._division.segment_rows,
            )
        ]
        receipt = spread_receipt(
            runs,
            segments,
            job_id=self.plan.options.job_id,
            segment_rows=self._division.segment_rows,
            result_dtypes={
                each.label: self.plan.result_dtype(each).label
                for each in self.plan.results
            },
        )
        return self._copies.told(receipt)

    def _may_begin(self) -> bool:
        """Whether the sums of the next run may be held until those before are there."""
        ahead = self._division.run(self._next).first_segment - self._sums.added
        return ahead < self._window * self._division.run_segments

    def _duplicate(self) -> Part | float:
        """Create a second job for the run that takes longest, if that is too long."""
        if not self._seconds:
            return _ASK_AGAIN_S
        limit = max(LEAST_SLOW_S, SLOW * statistics.median(self._seconds))
        candidates = [
            (state.parts[0].begun_at, state)
            for state in self._states.values()
            if not state.decided and state.parts and not state.duplicated
        ]
        if not candidates:
            return _ASK_AGAIN_S
        begun_at, state = min(candidates, key=lambda each: each[0])
        left = begun_at + limit - time.monotonic()
        if left > 0:
            return left
        state.duplicated = True
        return self._part(state, state.parts[0].run, state.parts[0])

    def _part(self, state: _State, run: Run, slow: Part | None = None) -> Part:
        """Create the job of a run.

        Args:
            state: The run's state.
            run: The run.
            slow: The run's first job, if this is a second one. Another server gets
                this one, and its results have places of their own.
        """
        rows = (run.first_row, run.first_row + run.rows)
        operands = {
            matrix: operand if matrix is Matrix.W else operand.part(*rows)
            for matrix, operand in self._operands.items()
        }
        places: dict[Matrix, Output] = {}
        if slow is None:
            for matrix, array in self._whole.items():
                place = _rows_of(array, *rows) if matrix.row_wise else None
                if place is not None:
                    places[matrix] = Output(place, place)
        options = left_of(self.plan.options, self._begun_at)
        job_id = f"{options.job_id}/{run.number}{'' if slow is None else '+'}"
        wide = dict.fromkeys(self.plan.sums, accumulator_of(self.plan))
        report = None
        if self._reporter is not None and slow is None:
            report = self._reporter.of_run(run.number)
        options = replace(
            options,
            result_dtypes={**options.result_dtypes, **wide},
            on_progress=report,
            job_id=job_id if len(job_id) <= MAX_JOB_ID_LENGTH else options.job_id,
        )
        plan = replace(with_rows(self.plan, run.rows), options=options)
        job = self._make(plan, operands, places)
        job.unusable = self.unusable
        if slow is not None:
            job.avoid = {slow.job.address}
            job.unusable = self.unusable | job.avoid
        part = Part(run, job, slow is not None, time.monotonic())
        job.on_call = lambda cancel: self._called(part, cancel)
        state.parts.append(part)
        return part

    def _called(self, part: Part, cancel: Callable[[], object]) -> None:
        with self._lock:
            part.cancel = cancel
            cancelled = part.cancelled
        if cancelled:
            cancel()

    @staticmethod
    def _cancels(parts: Sequence[Part]) -> list[Callable[[], object]]:
        """Mark jobs as cancelled, and return what cancels their calls."""
        for part in parts:
            part.cancelled = True
        return [part.cancel for part in parts if part.cancel is not None]

    @staticmethod
    def _settled(state: _State) -> tuple[Part, Receipt] | None:
        """Return the job whose results a run has, once, when no other writes there."""
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
        sums = {matrix: results[matrix] for matrix in self.plan.sums}
        self._sums.add(part.run.first_segment, [sums])
        with self._lock:
            self._receipts[part.run.number] = receipt
        if self._reporter is not None:
            self._reporter.ended(part.run.number, receipt.server_address)


_ASK_AGAIN_S = 1.0
"""Seconds after which to ask again, if nothing else happens before: another server may
be there."""


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
