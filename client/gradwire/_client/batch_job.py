"""A product with batch dimensions or vectors, as jobs that are in flight together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from gradwire._api.errors import GradwireError
from gradwire._api.options import Options, left_of
from gradwire._api.types import Array, Receipt, merged_receipt
from gradwire._arrays.device_copy import HostCopies
from gradwire._arrays.operand import Operand, Source
from gradwire._core.broadcast import Broadcast
from gradwire._core.job_plan import Plan
from gradwire._core.outputs import ArrayOutputs, Output
from gradwire._core.progress import BatchReporter
from gradwire._resilience.array_job import ArrayJob
from gradwire_protocol.dtypes import Dtype, rounded
from gradwire_protocol.limits import MIB
from gradwire_protocol.matrices import Matrix

MAX_IN_FLIGHT = 8
"""Most jobs of a batch at the same time."""

_BYTES_IN_FLIGHT = 256 * MIB
"""Two jobs at the same time are enough if this is less than what they move."""


class MakeJob(Protocol):
    """Creates a job."""

    def __call__(
        self,
        plan: Plan,
        operands: Mapping[Matrix, Operand],
        given: Mapping[Matrix, Output],
    ) -> ArrayJob:
        """Create a job with the given arrays for some results."""


@dataclass(frozen=True, slots=True)
class Part:
    """One of the jobs."""

    number: int
    job: ArrayJob


class BatchJob:
    """The jobs of a product, and what they have in common. Thread-safe.

        while (part := batch.begin()) is not None:
            ... run part.job ...
            batch.end(part, its receipt)
        batch.deliver()

    Args:
        division: The division into jobs.
        sources: The operands that are needed.
        plan: The plan of each job.
        outputs: The results of the whole product.
        make: Creates a job.
        copies: Counts copies between GPUs and host memory.

    Attributes:
        outputs: As above.
    """

    def __init__(
        self,
        division: Broadcast,
        sources: Mapping[Matrix, Source],
        plan: Plan,
        outputs: ArrayOutputs,
        *,
        make: MakeJob,
        copies: HostCopies,
    ) -> None:
        self.outputs = outputs
        self._division = division
        self._sources = sources
        self._plan = plan
        self._make = make
        self._copies = copies
        # An empty batch asks the server, too: it has a receipt and checks the options.
        self._count = max(1, division.count)
        self._whole: Mapping[Matrix, Array] = {}
        self._sums: Array | None = None
        self._reporter: BatchReporter | None = None
        if plan.options.on_progress is not None:
            self._reporter = BatchReporter(plan.options.on_progress, self._count)
        self._lock = threading.Lock()
        self._begun_at = time.monotonic()
        self._begun = 0
        self._stopped = False
        self._cancels: dict[int, Callable[[], object]] = {}
        self._receipts: list[Receipt | None] = [None] * self._count

    @property
    def in_flight(self) -> int:
        """How many jobs to run at the same time."""
        plan = self._plan
        size_bytes = plan.upload_bytes(plan.m or 0) + plan.download_bytes(plan.m or 0)
        enough = max(2, _BYTES_IN_FLIGHT // max(1, size_bytes))
        return min(self._count, MAX_IN_FLIGHT, enough)

    @property
    def copies(self) -> bool:
        """Whether `begin` and `end` copy elements."""
        return self._division.folds

    def begin(self) -> Part | None:
        """Create the next job; None if there are no more."""
        with self._lock:
            if self._stopped or self._begun == self._count:
                return None
            if not self._whole:
                self._whole = self.outputs.all()
            number, self._begun = self._begun, self._begun + 1
        plan = replace(self._plan, options=self._options())
        operands = {
            matrix: source.part(self._operand(matrix, source.array, number))
            for matrix, source in self._sources.items()
        }
        job = self._make(plan, operands, self._places(number))
        job.on_call = lambda cancel: self._called(number, cancel)
        return Part(number, job)

    def end(self, part: Part, receipt: Receipt) -> None:
        """Use the results of a job that is done."""
        division, number = self._division, part.number
        results = part.job.outputs.present()
        if division.count and division.folds:
            for matrix in (Matrix.Y, Matrix.DW):
                if matrix in results:
                    place = division.part(matrix, self._whole[matrix], number)
                    place[...] = results[matrix].reshape(place.shape)
        with self._lock:
            if division.count and Matrix.DB in results:
                sums = results[Matrix.DB].reshape(division.joined_count, division.k)
                if self._sums is None:
                    shape = (self._count, *sums.shape)
                    self._sums = np.empty(shape, sums.dtype)
                self._sums[number] = sums
            self._receipts[number] = receipt
            self._cancels.pop(number, None)

    def fail(self, part: Part, error: BaseException) -> None:
        """Add the job's place in the batch to its error."""
        if isinstance(error, GradwireError) and self._count > 1:
            index = np.unravel_index(part.number, self._division.loop)
            where = ", ".join(str(int(each)) for each in index)
            error.add_note(f"It is job [{where}] of a batch of {self._count} jobs.")

    def stop(self) -> None:
        """Begin no more jobs, and cancel the calls of those that run."""
        with self._lock:
            self._stopped = True
            cancels = list(self._cancels.values())
        for cancel in cancels:
            cancel()

    def deliver(self) -> Receipt:
        """Make the objects that the caller gets from the results.

        Returns:
            The receipt of all jobs.
        """
        if Matrix.DB in self._whole:
            self._write_db(self._whole[Matrix.DB])
        self.outputs.deliver(self._copies)
        receipts = [receipt for receipt in self._receipts if receipt is not None]
        return self._copies.told(merged_receipt(receipts))

    def _options(self) -> Options:
        options = left_of(self._plan.options, self._begun_at)
        if self._reporter is not None:
            options = replace(options, on_progress=self._reporter.of_one())
        if Matrix.DB in options.results:
            # Its parts are added here, and rounded once.
            wide = options.dw_accumulator or self._plan.dtype.sums_in
            dtypes = {**options.result_dtypes, Matrix.DB: wide}
            options = replace(options, result_dtypes=dtypes)
        return options

    def _operand(self, matrix: Matrix, array: Array, number: int) -> Array:
        division = self._division
        if not division.count:
            return np.empty(self._plan.shape(matrix, 0), array.dtype)
        return division.joined(matrix, division.part(matrix, array, number))

    def _places(self, number: int) -> dict[Matrix, Output]:
        """Return the parts of the results that a job can write itself."""
        division = self._division
        if not division.count:
            return {}
        places: dict[Matrix, Output] = {}
        for matrix, array in self._whole.items():
            joined = division.folds and matrix is not Matrix.DX
            if matrix is not Matrix.DB and not joined:
                part = division.part(matrix, array, number)
                places[matrix] = Output(part, part)
        return places

    def _write_db(self, array: Array) -> None:
        if self._sums is None:
            array[...] = 0
            return
        with np.errstate(all="ignore"):  # of overflow: Inf is a result
            total = self._sums.sum(axis=(0, 1), dtype=np.float64)
            rounded(total.reshape(array.shape), Dtype.of(array.dtype), array)

    def _called(self, number: int, cancel: Callable[[], object]) -> None:
        with self._lock:
            self._cancels[number] = cancel
            stopped = self._stopped
        if stopped:
            cancel()
