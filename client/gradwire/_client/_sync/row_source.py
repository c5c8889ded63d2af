# Generated from _async/row_source.py by scripts/generate-sync: edit that file.

"""A stream's rows, as whatever sends them fetches them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from gradwire._arrays.operand import Operand
from gradwire._core.rows import END_OF_ROWS
from gradwire._resilience.replay_buffer import ReplayBuffer
from gradwire._transport.sync_io import SyncItems, SyncLock
from gradwire_protocol.matrices import Matrix


class SyncRowSource:
    """The caller's rows, fetched by whatever needs the next ones.

    An attempt that has failed may still be waiting for an item: the next attempt
    then waits for the same one.
    """

    def __init__(self, rows: Iterable[object], buffer: ReplayBuffer) -> None:
        self._items = SyncItems(rows)
        self._buffer = buffer
        self._turn = SyncLock()
        self._attempt = 0
        self._error: BaseException | None = None

    def batches(self, row: int) -> Iterator[Mapping[Matrix, Operand]]:
        """The rows from a row on; batches of an earlier call end."""
        self._attempt += 1
        return self._batches_of(row, self._attempt)

    def _batches_of(self, row: int, attempt: int) -> Iterator[Mapping[Matrix, Operand]]:
        # What an attempt that has failed still took would have rows dropped that
        # this attempt has not sent again yet.
        while attempt == self._attempt:
            batch = self._buffer.batch(row)
            if batch is not None:
                yield batch
                row += next(iter(batch.values())).rows
            elif not self.fetch(row):
                return

    def fetch(self, row: int) -> bool:
        """Have an item drawn, unless the rows from a row on are there.

        Returns:
            Whether there is one.

        Raises:
            BaseException: What the caller's iterable raised, each time.
        """
        with self._turn:
            if self._error is not None:
                raise self._error
            if self._buffer.drawn_beyond(row):
                return True
            if self._buffer.complete:
                return False
            self._buffer.settle()
            item = self._items.next()
            try:
                if item is not END_OF_ROWS:
                    self._buffer.add(item)
            except BaseException as error:
                self._error = error
                raise
            self._buffer.complete = item is END_OF_ROWS
            return item is not END_OF_ROWS

    def close(self) -> None:
        """Ask for no more items."""
        self._items.close()

    def abandon(self) -> None:
        """The same, where the owner is collected as garbage."""
        self._items.abandon()
