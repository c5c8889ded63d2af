# Generated from _async/row_source.py by scripts/generate-sync: edit that file.

"""The source of a stream's rows for its attempts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from gradwire._arrays.operand import Operand
from gradwire._core.rows import END_OF_ROWS
from gradwire._resilience.replay_buffer import ReplayBuffer
from gradwire._transport.sync_io import SyncItems, SyncLock
from gradwire_protocol.matrices import Matrix


class SyncRowSource:
    """Fetches the caller's rows for the attempts of a stream.

    A failed attempt may still be waiting for an item. The next attempt then waits for
    the same item.
    """

    def __init__(self, rows: Iterable[object], buffer: ReplayBuffer) -> None:
        self._items = SyncItems(rows)
        self._buffer = buffer
        self._turn = SyncLock()
        self._attempt = 0
        self._error: Exception | None = None

    def batches(self, row: int) -> Iterator[Mapping[Matrix, Operand]]:
        """Yield the rows from `row` on, and end the iterators of earlier calls."""
        self._attempt += 1
        return self._batches_of(row, self._attempt)

    def _batches_of(self, row: int, attempt: int) -> Iterator[Mapping[Matrix, Operand]]:
        # A failed attempt must take no more batches: that could drop rows which this
        # attempt has not sent yet.
        while attempt == self._attempt:
            batch = self._buffer.batch(row)
            if batch is not None:
                yield batch
                row += next(iter(batch.values())).rows
            elif not self.fetch(row):
                return

    def fetch(self, row: int) -> bool:
        """Fetch the next item, unless the rows from `row` on are already available.

        Returns:
            Whether there are such rows.

        Raises:
            BaseException: An exception of the caller's iterable. Further calls raise
                it again.
        """
        with self._turn:
            if self._error is not None:
                raise self._error
            if self._buffer.drawn_beyond(row):
                return True
            if self._buffer.complete:
                return False
            self._buffer.settle()
            try:
                item = self._items.next()
                if item is not END_OF_ROWS:
                    self._buffer.add(item)
            except Exception as error:
                self._error = error
                raise
            self._buffer.complete = item is END_OF_ROWS
            return item is not END_OF_ROWS

    def has_raised(self, error: BaseException) -> bool:
        """Return whether an error is the caller's iterable's, or about its items.

        It may be an error of another call, of gradwire even. Another attempt would not
        help: an iterator that has failed has no more items.
        """
        return error is self._error

    def close(self) -> None:
        """Request no more items."""
        self._error = None
        self._items.close()

    def abandon(self) -> None:
        """Do the same from the garbage collector."""
        self._items.abandon()
