# Generated from _async/spread_stream.py by scripts/generate-sync: edit that file.

"""The class `SyncSpreadStream`."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from gradwire._api.errors import ClientStateError
from gradwire._api.types import Receipt, RowBlock
from gradwire._client._sync.engine import SyncEngine
from gradwire._client._sync.stream import GradientStream
from gradwire._client.spread_rows import FIRST_S, SegmentRows, SpreadRows
from gradwire._core.rows import END_OF_ROWS
from gradwire._core.segments import ASK_AGAIN_S, MOST_LATER
from gradwire._resilience.row_reader import RowReader
from gradwire._transport.sync_io import (
    SyncBackground,
    SyncItems,
    SyncLock,
    SyncNews,
    run_beside,
    run_together,
)
from gradwire_protocol.matrices import Matrix

_LARGE_BYTES = 1 << 20
"""Bytes of an item from which on it is copied beside the event loop."""


class SyncSpreadStream(GradientStream):
    """The results of `Client.stream` with ``spread=True``.

    Each segment is a stream of its own, and several run at the same time. Row blocks
    are yielded in the order of rows.
    """

    def __init__(
        self,
        engine: SyncEngine,
        rows: Iterable[object],
        reader: RowReader,
        remember: Callable[[Receipt], Receipt],
    ) -> None:
        self._remember = remember
        self._run = _Run(engine, rows, reader)
        self._turn = SyncLock()
        self._over = False
        self._sums: dict[Matrix, Any] = {}
        self._receipt: Receipt | None = None

    def __next__(self) -> RowBlock:
        """Return the next row block.

        Raises:
            StopIteration: The job is done.
            GradwireError: The job failed.
            BaseException: An exception of the caller's iterable, unchanged.
        """
        with self._turn:
            if self._over:
                raise StopIteration
            try:
                block = self._run.next_block()
                if block is None:
                    self._sums, receipt = run_beside(self._run.rows.finish)
                    self._receipt = self._remember(receipt)
            except BaseException:
                self.close()
                raise
            if block is None:
                self.close()
                raise StopIteration
            return block

    def close(self) -> None:
        """Cancel the job, unless it is done, and yield no more row blocks."""
        self._over = True
        self._run.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self._run.abandon()

    @property
    def dw(self) -> Any:
        """DW, as for `GradientStream`."""
        self._require_receipt()
        return self._sums.get(Matrix.DW)

    @property
    def db(self) -> Any:
        """The column sums of dY, as for `GradientStream`."""
        self._require_receipt()
        return self._sums.get(Matrix.DB)

    @property
    def receipt(self) -> Receipt:
        """The job's receipt, once the stream is exhausted."""
        return self._require_receipt()

    def _require_receipt(self) -> Receipt:
        if self._receipt is None:
            raise ClientStateError(
                "dw and receipt are available once the stream is exhausted"
            )
        return self._receipt


class _Run:
    """The computation of a stream's segments.

    It does not refer to the stream, which can then be garbage collected.
    """

    def __init__(
        self,
        engine: SyncEngine,
        rows: Iterable[object],
        reader: RowReader,
    ) -> None:
        self.rows = SpreadRows(reader, engine.jobs.held_bytes)
        self._engine = engine
        self._reader = reader
        self._items = SyncItems(rows)
        self._news = SyncNews()
        self._background: SyncBackground | None = None
        self._error: BaseException | None = None
        self._stopped = False
        self._filler = threading.Lock()
        self._running: dict[int, GradientStream] = {}
        self._arrived = SyncNews()
        """Rows that a stream may wait for."""

    def next_block(self) -> RowBlock | None:
        """Return the next row block; None after the last one.

        Raises:
            BaseException: What has gone wrong in the background.
        """
        if self._background is None:
            self._begin()
        while True:
            count = self._news.count
            if self._error is not None:
                raise self._error
            closed = self.rows.closed
            block = self.rows.next_block()
            if self.rows.closed != closed:
                self._news.tell()  # there is room for rows
            if block is not None:
                return block
            if self.rows.exhausted:
                return None
            self._news.wait(count, ASK_AGAIN_S)

    def close(self) -> None:
        """Stop."""
        self.stop()
        # The caller's iterable may block: as long as it likes, but not the caller.
        in_iterable = self._items.stop()
        if self._background is not None and not in_iterable:
            self._background.close()
        self._items.close()
        self._error = None  # its frames refer to this object

    def abandon(self) -> None:
        """Stop, from the garbage collector."""
        self.stop()
        if self._background is not None:
            self._background.abandon()
        self._items.abandon()

    def stop(self) -> None:
        """Begin nothing more, and cancel what runs."""
        self._stopped = True
        for stream in list(self._running.values()):
            stream.interrupt()
        self._arrived.tell()
        self._news.tell()

    def _begin(self) -> None:
        first = self._items.next()
        operands = None if first is END_OF_ROWS else self._reader.read(first)
        spread = self.rows.plan(operands)
        jobs = self._engine.spread(spread, self.rows.left_s, several=False)
        self.rows.divided(jobs)
        if operands is None:
            self.rows.end()
        else:
            self.rows.add(operands)

        def work() -> None:
            try:
                run_together(self._work, jobs + MOST_LATER, self.stop)
            except BaseException as error:  # noqa: BLE001 - raised by `next_block`
                self._error = self._error or error
            self._news.tell()

        self._background = SyncBackground(work)

    def _work(self) -> None:
        """Compute segments; the first task also requests the rows."""
        try:
            self._compute_all()
        except BaseException as error:
            # At once, though another task may be in the caller's iterable.
            self._error = self._error or error
            self._news.tell()
            raise

    def _compute_all(self) -> None:
        if self._filler.acquire(blocking=False):
            self._fill()
        while not self._stopped:
            count = self._news.count
            jobs = self._engine.jobs_at_once(self.rows.spread)
            segment = self.rows.begin(jobs)
            if segment is not None:
                self._compute(segment)
                self._news.tell()
            elif self.rows.exhausted:
                return
            else:
                self._move_late()
                self._news.wait(count, ASK_AGAIN_S)

    def _move_late(self) -> None:
        """Have other servers compute what takes too long."""
        unusable = self.rows.spread.unusable
        if len(self._engine.usable_servers(unusable)) < 2:
            return
        for segment in self.rows.late(self._engine.server_count(unusable)):
            stream = self._running.get(segment.number)
            if stream is not None:
                stream.move_elsewhere()

    def _fill(self) -> None:
        """Request the caller's items, and store their rows."""
        item: object = None
        while not self._stopped and item is not END_OF_ROWS:
            count, opened = self._news.count, self.rows.opened
            stored = self._stored()
            self._arrived.tell()
            if stored:
                if self.rows.opened != opened:
                    self._news.tell()
                self._reader.settle()
                item = self._items.next()
                if item is not END_OF_ROWS:
                    self.rows.add(self._reader.read(item))
            else:
                self._news.tell()
                self._news.wait(count + 1, FIRST_S)
        if not self._stopped:
            self.rows.end()
            self._arrived.tell()
            self._news.tell()

    def _stored(self) -> bool:
        """Store rows, beside the event loop if they are many."""
        if self.rows.bytes_to_store < _LARGE_BYTES:
            return self.rows.store()
        return run_beside(self.rows.store)

    def _compute(self, segment: SegmentRows) -> None:
        stream = GradientStream(
            self._engine,
            self._rows_of(segment),
            self.rows.reader_of(segment),
            _unchanged,
            again=segment.items,
            spread=self.rows.spread,
        )
        self._running[segment.number] = stream
        try:
            with stream:
                for block in stream:
                    self.rows.took(segment, block)
                    self._news.tell()
            if self._stopped:
                return
            sums = {}
            for matrix in self.rows.spread.plan.sums:
                sums[matrix] = stream.dw if matrix is Matrix.DW else stream.db
            receipt = stream.receipt
            run_beside(lambda: self.rows.finished(segment, sums, receipt))
        finally:
            del self._running[segment.number]

    def _rows_of(self, segment: SegmentRows) -> Iterator[object]:
        """Yield the rows of a segment, as they arrive."""
        at = 0
        while not self._stopped:
            count = self._arrived.count
            complete = segment.complete
            if at < len(segment.items):
                yield segment.items[at]
                at += 1
            elif complete:
                return
            else:
                self._arrived.wait(count, ASK_AGAIN_S)


def _unchanged(receipt: Receipt) -> Receipt:
    return receipt
