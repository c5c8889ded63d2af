"""A job that takes segments of a larger job one by one, without I/O."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from gradwire._api.errors import GradwireError, ProtocolError
from gradwire._api.types import Array, Receipt
from gradwire._arrays.array_sink import ArraySink
from gradwire._arrays.buffer_pool import ResultPool
from gradwire._arrays.device_copy import HostCopies
from gradwire._arrays.operand import Operand
from gradwire._core.direct_exchange import RowSource
from gradwire._core.exchange import JobExchange
from gradwire._core.job_plan import Plan
from gradwire._core.outputs import ArrayOutputs
from gradwire._core.receiver import Sink
from gradwire._core.sender import Sender
from gradwire._core.timers import later
from gradwire._resilience.array_job import ArrayJob
from gradwire._resilience.retry import Attempts
from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.matrices import ROW_OPERANDS, Matrix
from gradwire_protocol.v1.job_pb2 import Accepted


@dataclass(eq=False, slots=True)
class Taken:
    """A segment that a job has taken."""

    number: int
    """Number of the segment."""

    first_row: int
    """Its first row, within the larger job."""

    rows: int
    """Number of its rows. Only the last one of a job may be short."""

    places: Mapping[Matrix, Array]
    """Arrays for its rows of Y and dX."""

    at: float
    """When it was taken; `time.monotonic`."""

    duplicate: bool
    """Whether another job had it already."""


class Segments(Protocol):
    """What a job takes its segments from. Thread-safe."""

    def take(self) -> Taken | float | None:
        """Take the next segment.

        Returns:
            The segment; or seconds after which to ask again, if nothing changes
            before; or None: the job ends.
        """

    @property
    def news(self) -> int:
        """Number of changes so far, for `wait`."""

    def wait(self, news: int, seconds: float) -> None:
        """Wait until there are more changes, at most so long.

        Args:
            news: Their number before `take`: one may have come since.
            seconds: Seconds.
        """

    def tell(self) -> None:
        """Let all wait no longer."""

    def complete(self, taken: Taken, sums: Mapping[Matrix, Array]) -> None:
        """Use the results of a segment, which are in its places, and its sums."""

    def give_back(self, left: Sequence[Taken]) -> None:
        """Have segments that are not complete computed by another job."""


@dataclass(eq=False, slots=True)
class _Attempt:
    taken: list[Taken] = field(default_factory=list)
    """Its segments, in order."""

    complete: int = 0
    """How many of them are complete."""

    sums: list[Mapping[Matrix, Array]] = field(default_factory=list)
    """Their sums, until the segments are complete."""

    over: bool = False
    """Whether it takes no more."""

    failed: bool = False


class SegmentsJob(ArrayJob):
    """A job whose rows are segments, which it takes while it runs.

    Where an attempt fails, complete segments are kept. The others are given back, and
    the next attempt takes new ones.

    Args:
        plan: The job, without m.
        operands: The operands of the larger job.
        outputs: Arrays that are not used.
        whole: The plan of the larger job.
        segments: What it takes the segments from.
        segment_rows: Rows of a segment.
        copies: As for `ArrayJob`.
        memory: Allocates sums.
        early_bytes: As for `ArrayJob`.

    Attributes:
        attempt: Number of the attempt, from 1.
    """

    def __init__(
        self,
        plan: Plan,
        operands: Mapping[Matrix, Operand],
        outputs: ArrayOutputs,
        *,
        whole: Plan,
        segments: Segments,
        segment_rows: int,
        copies: HostCopies,
        memory: ResultPool,
        early_bytes: int = 0,
    ) -> None:
        super().__init__(
            plan,
            operands,
            outputs,
            unary=False,
            copies=copies,
            early_bytes=early_bytes,
        )
        self.attempt = 0
        self._whole = whole
        self._memory = memory
        self._segments: Segments | None = segments
        self._segment_rows = segment_rows
        self._exchange: JobExchange | None = None
        self._lock = threading.Lock()
        self._now = _Attempt()

    def exchange(self, direct: int = 0) -> JobExchange:
        """Create the exchange of an attempt.

        Args:
            direct: Most direct connections.
        """
        self._now = now = _Attempt()
        self.attempt += 1
        self._exchange = JobExchange(
            self.plan,
            Sender(self.plan),
            self.sinks(),
            early_bytes=self._early_bytes,
            direct=direct,
            segment_sums=now.sums,
            memory=self._memory,
            segment_rows=self._segment_rows,
            on_segments=self._completed,
        )
        return self._exchange

    @property
    def accepted(self) -> Accepted | None:
        """What the server has said of the job."""
        return None if self._exchange is None else self._exchange.accepted

    @property
    def whole(self) -> Plan:
        """The plan of the larger job."""
        return self._whole

    # Rows.

    @property
    def source(self) -> RowSource:
        """Where the rows come from."""
        return self

    @property
    def rows(self) -> int:
        """Number of all rows, once there are no more."""
        return sum(each.rows for each in self._now.taken)

    def rows_at(
        self, row: int, count: int
    ) -> tuple[Mapping[Matrix, Operand], int, int] | None:
        """Return the next rows, as for `RowSource`."""
        index, first = divmod(row, self._segment_rows)
        while True:
            segments = self._required()
            news = segments.news
            taken = self._take(self._now, index)
            if isinstance(taken, float):
                segments.wait(news, taken)
                continue
            if taken is None or first >= taken.rows:  # the last segment may be short
                return None
            last = min(first + count, taken.rows)
            return self.operands, taken.first_row + first, taken.first_row + last

    def interrupt(self) -> None:
        """Have `rows_at` wait no longer, from any thread."""
        self._now.failed = True
        if self._segments is not None:
            self._segments.tell()

    def messages(self, exchange: JobExchange) -> Iterator[bytes]:
        """Yield the messages after the first."""
        batches = self._batches(self._now)
        for message in exchange.segment_messages(self.operands, batches):
            if isinstance(message, bytes):  # frames are sent elsewhere
                yield message

    def _batches(self, attempt: _Attempt) -> Iterator[Mapping[Matrix, Operand] | None]:
        """Yield the rows of each segment; None: wait."""
        index = 0
        while True:
            self.waits = True  # before it looks: something may change behind that
            taken = self._take(attempt, index)
            if taken is None:
                break
            if isinstance(taken, Taken):
                self.waits = False
                index += 1
                first, last = taken.first_row, taken.first_row + taken.rows
                yield {
                    matrix: self.operands[matrix].part(first, last)
                    for matrix in ROW_OPERANDS
                    if matrix in self.operands
                }
            else:
                timer = later(taken, self.wake)
                try:
                    yield None
                finally:  # it refers to the call
                    timer.cancel()
        self.waits = False

    def _take(self, attempt: _Attempt, index: int) -> Taken | float | None:
        """Return the segment with that index; as for `Segments.take`."""
        with self._lock:
            while len(attempt.taken) <= index:
                if attempt.failed:
                    raise InterruptedError("the attempt has failed")
                if attempt.over:
                    return None
                taken = self._required().take()
                if isinstance(taken, float):
                    return taken
                if taken is None:
                    attempt.over = True
                else:
                    attempt.taken.append(taken)
            return attempt.taken[index]

    # Results.

    def sinks(self) -> dict[Matrix, Sink]:
        """Make sinks that store Y and dX where their segments have places."""
        return {
            matrix: SegmentSink(self._now.taken, matrix, self.plan, self._segment_rows)
            for matrix in self.plan.results
            if matrix.row_wise
        }

    def _completed(self, count: int) -> None:
        """Note that the first segments are complete."""
        now = self._now
        while True:
            with self._lock:  # one by one: the caller's `on_progress` may raise
                index = now.complete
                if index >= count:
                    return
                now.complete += 1
            sums: Mapping[Matrix, Array] = {}
            if now.sums:
                sums, now.sums[index] = now.sums[index], {}
            self._required().complete(now.taken[index], sums)

    def cut_off(
        self, exchange: JobExchange, error: GradwireError, attempts: Attempts
    ) -> bool:
        """Record a failed attempt, and return whether to start over immediately."""
        del exchange
        if self._now.complete:
            attempts.progressed()
        self.give_back()
        return self.was_too_early(error)

    def give_back(self) -> None:
        """Have the segments that are not complete computed by another job."""
        now = self._now
        with self._lock:
            now.over = True
            left = now.taken[now.complete :]
            del now.taken[now.complete :]
        self._required().give_back(left)

    def verified(self, receipt: Receipt, address: str) -> Receipt:
        """Use the last segment, and return the receipt with the address."""
        self._completed(len(self._now.taken))
        return super().verified(receipt, address)

    def detach(self) -> None:
        """Refer no more to calls and to the larger job."""
        super().detach()
        self._segments = self._exchange = None

    def _required(self) -> Segments:
        if self._segments is None:
            raise InterruptedError("the job has ended")
        return self._segments


class SegmentSink:
    """Stores a result's rows in the places of their segments.

    Args:
        taken: The segments of the job, in order.
        matrix: The result.
        plan: The job.
        segment_rows: Rows of a segment.
    """

    def __init__(
        self, taken: list[Taken], matrix: Matrix, plan: Plan, segment_rows: int
    ) -> None:
        self._taken = taken
        self._matrix = matrix
        self._dtype: Dtype = plan.result_dtype(matrix)
        columns = matrix.row_length(plan.n, plan.k)
        self._row_bytes = columns * self._dtype.itemsize
        self._segment_rows = segment_rows
        self._row = 0
        """The row to continue at, in the segment that is looked up next."""
        self._index = -1
        self._sink: ArraySink | None = None
        self._left = 0
        """Bytes that are missing of the segment."""

    def seek(self, row: int) -> None:
        """Continue at `row`, the first row of a row block."""
        index, first = divmod(row, self._segment_rows)
        if index == self._index and self._sink is not None:
            self._sink.seek(first)
            self._left = (self._taken[index].rows - first) * self._row_bytes
        else:
            # It may not have been taken yet.
            self.close()
            self._sink, self._left, self._row = None, 0, row

    def write(self, payload: memoryview) -> None:
        """Store the next elements."""
        while payload:
            part = payload[: self._missing()]
            self._here().write(part)
            self._left -= len(part)
            payload = payload[len(part) :]

    def room(self, size_bytes: int) -> memoryview | None:
        """Return the memory of the next bytes, if they can be received there."""
        return self._here().room(size_bytes) if size_bytes <= self._missing() else None

    def advance(self, size_bytes: int) -> None:
        """Count the next bytes as stored: they were received into `room`."""
        self._here().advance(size_bytes)
        self._left -= size_bytes

    def close(self) -> None:
        """Store what was collected."""
        if self._sink is not None:
            self._sink.close()

    def _missing(self) -> int:
        """Return the bytes that are missing of the segment, at least 1."""
        self._here()
        return self._left

    def _here(self) -> ArraySink:
        if self._sink is not None and self._left:
            return self._sink
        if self._sink is not None:
            self.close()
            self._row = (self._index + 1) * self._segment_rows
        self._index, first = divmod(self._row, self._segment_rows)
        if self._index >= len(self._taken):
            # On direct connections, the last block's rows may not be known yet.
            raise ProtocolError(
                f"the server sent more rows of {self._matrix.label} than it was sent"
            )
        taken = self._taken[self._index]
        self._sink = ArraySink(taken.places[self._matrix], self._dtype)
        self._sink.seek(first)
        self._left = (taken.rows - first) * self._row_bytes
        return self._sink
