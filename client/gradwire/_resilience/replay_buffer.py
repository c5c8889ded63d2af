"""The buffer of a stream's rows, for rows that must be sent again.

A resumed job sends some rows again. Rows of a sequence are read again from the
sequence. Other iterables give each item only once, so their rows are copied when they
are sent. The copies are kept until they are no longer needed, or until the buffer is
full.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gradwire._arrays.operand import Operand
from gradwire._resilience.row_reader import RowReader
from gradwire_protocol.limits import MIB
from gradwire_protocol.matrices import Matrix

_PORTION_BYTES = 4 * MIB
"""Approximate size of a batch of copied rows. A large item is copied batch by batch,
right before each is sent."""

_PORTION_OVERHEAD = 1024
"""Approximate overhead of a batch, in bytes."""


@dataclass(frozen=True, slots=True)
class _Batch:
    first_row: int
    rows: int
    size_bytes: int
    operands: Mapping[Matrix, Operand] | None
    """None: the rows are in the caller's sequence."""
    item: int


class ReplayBuffer:
    """The rows of a stream. Thread-safe.

    The next item is added only after the memory of the previous one may be reused.

    Args:
        reader: Converts items to operands.
        limit_bytes: Most bytes of copied rows; 0: none.
        again: A sequence with the same items, if there is one.

    Attributes:
        count: Number of rows returned by `batch`.
        first: Operands of the first item; None before it is added.
        complete: Whether there are no more items.
    """

    def __init__(
        self,
        reader: RowReader,
        limit_bytes: int = 0,
        again: Sequence[object] | None = None,
    ) -> None:
        self.count = 0
        self.first: Mapping[Matrix, Operand] | None = None
        self.complete = False
        self._reader = reader
        self._limit_bytes = limit_bytes
        self._again = again
        self._lock = threading.RLock()
        self._batches: dict[int, _Batch] = {}
        self._held_bytes = 0
        self._item: Mapping[Matrix, Operand] | None = None
        self._taken = 0
        self._items = 0

    @property
    def repeatable(self) -> bool:
        """Whether all rows can be read again from a sequence."""
        return self._again is not None

    @property
    def first_available(self) -> int:
        """The first row that is still available."""
        with self._lock:
            return next(iter(self._batches), self.count)

    def has(self, row: int) -> bool:
        """Return whether the rows from `row` on are available, now or later."""
        return self.first_available <= row

    def drawn_beyond(self, row: int) -> bool:
        """Return whether `batch(row)` needs no further item."""
        with self._lock:
            return row < self.count or self._left() > 0

    def settle(self) -> None:
        """Prepare for the request of the next item."""
        self._reader.settle()

    def add(self, item: object) -> None:
        """Add the next item. All rows of the previous one must have been returned.

        Raises:
            InputError: The item is invalid, or does not fit the first one.
        """
        operands = self._reader.read(item)
        with self._lock:
            self._item, self._taken = operands, 0
            self._items += 1
            if self.first is None:
                self.first = operands

    def batch(self, row: int) -> Mapping[Matrix, Operand] | None:
        """Return the next batch of rows, from `row` on.

        None if the next item must be added first, or if there are no more items.
        """
        with self._lock:
            batch = self._find(row)
            if batch is None and row == self.count and self._left():
                batch = self._next()
            if batch is None:
                return None
            operands = batch.operands
            if operands is None and self._again is not None:
                operands = self._reader.again(self._again[batch.item])
            skipped = row - batch.first_row
        return _behind(operands or {}, skipped)

    def disable(self) -> None:
        """Drop all rows: none is needed again."""
        with self._lock:
            self._limit_bytes = 0
            for batch in list(self._batches.values()):
                self._drop(batch)

    def discard_before(self, row: int) -> None:
        """Drop the rows before `row`: they are not needed again."""
        with self._lock:
            while self._batches:
                first = next(iter(self._batches.values()))
                if first.first_row + first.rows > row:
                    break
                self._drop(first)

    def _left(self) -> int:
        """Return the number of rows of the current item not yet returned."""
        if self._item is None:
            return 0
        return next(iter(self._item.values())).rows - self._taken

    def _next(self) -> _Batch:
        operands, item = self._item or {}, self._items - 1
        rows, size_bytes = self._left(), 0
        kept: Mapping[Matrix, Operand] | None = operands
        if self._again is not None:
            kept = None
        elif self._limit_bytes:
            row_bytes = sum(
                each.columns * each.dtype.itemsize for each in operands.values()
            )
            rows = min(rows, max(1, _PORTION_BYTES // max(1, row_bytes)))
            last = self._taken + rows
            kept = operands = {
                matrix: Operand(np.array(each.take(self._taken, last)), each.dtype)
                for matrix, each in operands.items()
            }
            size_bytes = rows * row_bytes + _PORTION_OVERHEAD
        batch = _Batch(self.count, rows, size_bytes, kept, item)
        self.count += rows
        self._taken += rows
        if self._again is not None or self._limit_bytes:
            self._batches[batch.first_row] = batch
            self._held_bytes += size_bytes
            while self._held_bytes > self._limit_bytes and self._again is None:
                self._drop(next(iter(self._batches.values())))
        return batch if kept is not None else _given(batch, operands)

    def _find(self, row: int) -> _Batch | None:
        batch = self._batches.get(row)
        if batch is not None or row >= self.count:
            return batch
        for each in self._batches.values():
            if each.first_row <= row < each.first_row + each.rows:
                return each
        raise RuntimeError(f"row {row} is no longer buffered")

    def _drop(self, batch: _Batch) -> None:
        del self._batches[batch.first_row]
        self._held_bytes -= batch.size_bytes


def _given(batch: _Batch, operands: Mapping[Matrix, Operand]) -> _Batch:
    """Return a batch that is returned for the first time, with its operands."""
    return _Batch(batch.first_row, batch.rows, batch.size_bytes, operands, batch.item)


def _behind(operands: Mapping[Matrix, Operand], rows: int) -> Mapping[Matrix, Operand]:
    """Return operands without their first `rows` rows."""
    if not rows:
        return operands
    return {
        matrix: Operand(each.array[rows:], each.dtype, each.rounding)
        for matrix, each in operands.items()
    }
