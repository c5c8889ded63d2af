"""The rows of a spread stream, in segments, and their results. Without I/O."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from gradwire._api.errors import InputError
from gradwire._api.options import Options, left_of
from gradwire._api.types import Array, Receipt, RowBlock
from gradwire._arrays.operand import Operand
from gradwire._client.spread_plan import SpreadPlan
from gradwire._core.job_plan import with_rows
from gradwire._core.outputs import output_shape
from gradwire._core.progress import SpreadReporter
from gradwire._core.segments import (
    JOBS_PER_DEVICE,
    RECENT,
    Division,
    OrderedSums,
    late_after_s,
    segment_bytes,
)
from gradwire._resilience.row_reader import RowReader
from gradwire_protocol.matrices import ROW_OPERANDS, Matrix

FIRST_S = 0.25
"""Seconds for which the other segments let the first one go first, until its first row
block is there: they would share the link, and the client's processors."""


@dataclass(eq=False)
class SegmentRows:
    """The rows of a segment, as they arrive, and their results."""

    number: int
    first_row: int
    items: list[Any] = field(default_factory=list)
    """Views of the rows: what a stream gets."""
    rows: int = 0
    complete: bool = False
    """Whether all of its rows are there."""
    begun: bool = False
    blocks: deque[RowBlock] = field(default_factory=deque)
    """Results that were not handed out yet."""
    done: bool = False
    """Whether all results are there."""
    buffers: dict[Matrix, Array] = field(default_factory=dict)
    complete_at: float = 0.0
    moved_at: float = 0.0
    """When the last results came; 0: none since all rows are there."""
    moves: int = 0
    """How often the segment was taken from a server that was late."""


class SpreadRows:
    """The segments of a stream. Thread-safe.

    One task adds the caller's items (`add`, `end`), several compute segments (`begin`,
    `took`, `finished`), and one hands results out (`next_block`).

    Args:
        reader: Converts the caller's items.
        held_bytes: Most bytes of operands and results of all segments in memory; a
            segment for each device, and one more, are there in any case.

    Attributes:
        spread: The plan, the division and the servers; known after `plan`.
    """

    def __init__(self, reader: RowReader, held_bytes: int) -> None:
        self._reader = reader
        self._held_bytes = held_bytes
        self._lock = threading.Lock()
        self._begun_at = time.monotonic()
        self._segments: deque[SegmentRows] = deque()
        self._next_number = 0
        self._count = 0
        self._ended = False
        self._computed: list[tuple[Sequence[int], Receipt]] = []
        self._rest: dict[Matrix, Operand] = {}
        self._reporter: SpreadReporter | None = None
        self._came = not any(each.row_wise for each in reader.options.results)
        """Whether any results are there, or none come before the sums."""
        self._first_until = 0.0
        self._seconds: deque[float] = deque(maxlen=RECENT)
        """Of the last segments, from their last row to their last result."""
        self.opened = 0
        """Number of segments that have rows."""
        self.closed = 0
        """Number of segments whose results were handed out."""

    def plan(self, first: Mapping[Matrix, Operand] | None) -> SpreadPlan:
        """Plan the job, whose first item, if any, has these operands.

        Raises:
            InputError: There is neither an item nor W.
        """
        self.spread = SpreadPlan(self._reader.plan(first))
        return self.spread

    @property
    def left_s(self) -> float | None:
        """Seconds that the job has left; None: no limit."""
        return left_of(self.spread.plan.options, self._begun_at).timeout_s

    def divided(self, jobs: int) -> None:
        """Begin, once the job is divided.

        Args:
            jobs: Jobs at the same time.
        """
        spread = self.spread
        rows = spread.division.segment_rows
        spread.division = Division(spread.plan.m or 0, rows)
        self._sums = OrderedSums(spread.plan)
        # With fewer, devices would wait for rows.
        least = jobs // JOBS_PER_DEVICE + 1
        held = self._held_bytes // max(1, segment_bytes(spread.plan, rows))
        self._most = max(least, held)
        self._first_until = time.monotonic() + FIRST_S
        if spread.plan.options.on_progress is not None:
            self._reporter = SpreadReporter(spread.plan)

    def add(self, operands: Mapping[Matrix, Operand]) -> None:
        """Add the rows of an item. Those of the last one must have been stored.

        Raises:
            InputError: There are more rows than the caller has said.
        """
        m, rows = self.spread.plan.m, self._count + _rows(operands)
        if m is not None and rows > m:
            raise InputError(f"rows has at least {rows} rows: expected m = {m}")
        self._rest = dict(operands)

    @property
    def bytes_to_store(self) -> int:
        """Bytes of the last item that `store` will copy."""
        return sum(each.array.nbytes for each in self._rest.values())

    def store(self) -> bool:
        """Copy rows of the last item to segments.

        Returns:
            Whether all rows are there, so that the next item can be requested. If not,
            results must come or be handed out first, or `FIRST_S` seconds pass.
        """
        size = self.spread.division.segment_rows
        while (left := _rows(self._rest)) > 0:
            with self._lock:
                segment = self._open()
            if segment is None:
                return False
            count = min(left, size - segment.rows)
            item = self._copied(segment, count)
            self._rest = {
                matrix: operand.part(count, left)
                for matrix, operand in self._rest.items()
            }
            with self._lock:
                self._count += count
                segment.items.append(item)
                segment.rows += count
                if segment.rows == size:
                    segment.complete, segment.complete_at = True, time.monotonic()
        self._rest = {}
        return True

    def end(self) -> None:
        """Note that all rows are there.

        Raises:
            InputError: There are fewer rows than the caller has said.
        """
        m = self.spread.plan.m
        if m is not None and self._count != m:
            raise InputError(f"rows has {self._count} rows: expected m = {m}")
        with self._lock:
            if not self._next_number:
                self._segments.append(SegmentRows(0, 0))
                self._next_number = 1
            if self._segments and not self._segments[-1].complete:
                self._segments[-1].complete = True
                self._segments[-1].complete_at = time.monotonic()
            self._ended = True
            self.spread.plan = with_rows(self.spread.plan, self._count)
            self.spread.division = replace(self.spread.division, m=self._count)

    def begin(self, jobs: int) -> SegmentRows | None:
        """Return the next segment to compute; None if there is none yet.

        Args:
            jobs: Most segments that are computed at the same time.
        """
        with self._lock:
            running = sum(each.begun and not each.done for each in self._segments)
            if running >= (1 if self._waits_for_first() else jobs):
                return None
            for segment in self._segments:
                if not segment.begun and (segment.items or segment.complete):
                    segment.begun = True
                    return segment
            return None

    def _waits_for_first(self) -> bool:
        """Whether the first row block is still due, and may come soon."""
        return not self._came and time.monotonic() < self._first_until

    def late(self, servers: int) -> list[SegmentRows]:
        """Return the segments that another server should compute.

        They have had no results for longer than others take for all of theirs.

        Args:
            servers: Number of servers. A segment is not moved as often.
        """
        with self._lock:
            limit = late_after_s(self._seconds)
            if limit is None:
                return []
            since = time.monotonic() - limit
            late = [
                each
                for each in self._segments
                if each.begun and each.complete and not each.done
                if each.moves + 1 < servers
                if max(each.complete_at, each.moved_at) < since
            ]
            for each in late:
                each.moves += 1
                each.moved_at = time.monotonic()
            return late

    def reader_of(self, segment: SegmentRows) -> RowReader:
        """Return what reads the rows of a segment."""
        spread = self.spread
        options: Options = left_of(spread.plan.options, self._begun_at)
        number, reporter = segment.number, self._reporter
        options = replace(
            options,
            result_dtypes={**options.result_dtypes, **spread.sum_dtypes()},
            on_progress=None if reporter is None else reporter.of_job(number),
            job_id=spread.job_id(number),
            block_rows=spread.plan.block_rows,
        )
        w, m = self._reader.w, spread.plan.m
        size = spread.division.segment_rows
        with self._lock:
            rows = segment.rows if segment.complete else None
        if rows is None and m is not None:
            rows = min(size, m - segment.first_row)
        w_array = None if w is None else w.array
        return RowReader(w_array, rows, options, first_row=segment.first_row)

    def took(self, segment: SegmentRows, block: RowBlock) -> None:
        """Store a row block of a segment's results."""
        first_row = segment.first_row + block.first_row
        with self._lock:
            segment.blocks.append(RowBlock(first_row, block.y, block.dx))
            segment.moved_at = time.monotonic()
            self._came = True

    def finished(
        self, segment: SegmentRows, sums: Mapping[Matrix, Array], receipt: Receipt
    ) -> None:
        """Store the sums of a segment, whose row blocks are all there."""
        if segment.rows or not segment.number:
            self._sums.add(segment.number, sums)
        with self._lock:
            self._computed.append(((segment.number,), receipt))
            segment.done = self._came = True
            self._seconds.append(time.monotonic() - segment.complete_at)
            segment.items.clear()
            segment.buffers.clear()
        if self._reporter is not None:
            address = receipt.server_address
            self._reporter.complete(segment.number, segment.rows, address)
            self._reporter.forget(segment.number)

    def next_block(self) -> RowBlock | None:
        """Return the next row block in the order of rows, if it is there."""
        with self._lock:
            while self._segments:
                first = self._segments[0]
                if first.blocks:
                    block = first.blocks.popleft()
                    return RowBlock(
                        block.first_row,
                        self._converted(block.y),
                        self._converted(block.dx),
                    )
                if not first.done:
                    return None
                self._segments.popleft()
                self.closed += 1
            return None

    @property
    def exhausted(self) -> bool:
        """Whether all results were handed out."""
        with self._lock:
            return self._ended and not self._segments

    def finish(self) -> tuple[dict[Matrix, Any], Receipt]:
        """Return the sums as the caller gets them, and the receipt."""
        plan = self.spread.plan
        results = {
            matrix: np.empty(
                output_shape(plan, {}, matrix), plan.array_dtype(matrix).numpy
            )
            for matrix in plan.sums
        }
        self._sums.write(results)
        receipt = self.spread.receipt(self._computed)
        made = {matrix: self._converted(array) for matrix, array in results.items()}
        return made, self._reader.copies.told(receipt)

    def _converted(self, array: Array | None) -> Any:
        library = self._reader.library
        if array is None or library is None:
            return array
        return library.converted(array, self._reader.copies)

    def _open(self) -> SegmentRows | None:
        """Return the segment for the next row; None if it must not begin yet."""
        if self._segments and not self._segments[-1].complete:
            return self._segments[-1]
        if len(self._segments) >= self._most:
            return None
        if self._segments and self._waits_for_first():
            return None  # to copy rows takes processor time from it
        first_row = self._next_number * self.spread.division.segment_rows
        segment = SegmentRows(self._next_number, first_row)
        self._next_number += 1
        self.opened += 1
        self._segments.append(segment)
        return segment

    def _copied(self, segment: SegmentRows, count: int) -> tuple[Array | None, ...]:
        """Copy the next rows of the current item to a segment, and return the copy."""
        first, last = segment.rows, segment.rows + count
        views: dict[Matrix, Array] = {}
        for matrix, operand in self._rest.items():
            if matrix not in segment.buffers:
                rows, m = self.spread.division.segment_rows, self.spread.plan.m
                if m is not None:
                    rows = min(rows, m - segment.first_row)
                dtype = operand.array.dtype.newbyteorder("=")
                segment.buffers[matrix] = np.empty((rows, operand.columns), dtype)
            views[matrix] = segment.buffers[matrix][first:last]
            np.copyto(views[matrix], operand.part(0, count).array)
        return tuple(views.get(matrix) for matrix in ROW_OPERANDS)


def _rows(operands: Mapping[Matrix, Operand]) -> int:
    return next(iter(operands.values())).rows if operands else 0
