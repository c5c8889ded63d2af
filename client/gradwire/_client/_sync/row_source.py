"""A stream's items as threads draw them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping

from gradwire._arrays.operand import Operand
from gradwire._resilience.replay_buffer import ReplayBuffer
from gradwire_protocol.matrices import Matrix

_NOTHING = object()


class RowSource:
    """The caller's items, drawn by whichever thread needs the next one.

    That of an attempt which has failed may still be waiting for an item: the
    next attempt's then waits for the same one.
    """

    def __init__(self, items: Iterator[object], held: ReplayBuffer) -> None:
        self._items = items
        self._held = held
        self._turn = threading.Lock()
        self._attempt = 0
        self._error: BaseException | None = None

    def portions(self, row: int) -> Iterator[Mapping[Matrix, Operand]]:
        """The rows from a row on; those that were given out before end."""
        self._attempt += 1
        return self._portions(row, self._attempt)

    def _portions(self, row: int, attempt: int) -> Iterator[Mapping[Matrix, Operand]]:
        # What a thread of an attempt that has failed still takes would have rows
        # dropped that the one of this attempt has not sent again yet.
        while attempt == self._attempt:
            portion = self._held.portion(row)
            if portion is not None:
                yield portion
                row += next(iter(portion.values())).rows
            elif not self.draw(row):
                return

    def draw(self, row: int) -> bool:
        """Have an item drawn, unless the rows from a row on are there.

        Returns:
            Whether there is one.

        Raises:
            BaseException: What the caller's iterable raised, each time.
        """
        with self._turn:
            if self._error is not None:
                raise self._error
            if self._held.drawn_beyond(row):
                return True
            if self._held.complete:
                return False
            try:
                self._held.settle()
                item = next(self._items, _NOTHING)
                if item is not _NOTHING:
                    self._held.add(item)
            except BaseException as error:
                self._error = error
                raise
            self._held.complete = item is _NOTHING
            return item is not _NOTHING
