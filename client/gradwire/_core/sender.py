"""The requests of a job, in order: W, the rows of X and dY, End.

Rows are sent in runs. A run ends at the boundary of a row block, or before it. The
rows of X in a run are sent first, then the rows of dY. So neither operand is ahead by
more than a run, and the next rows always belong to the operand with fewer complete
rows (X on a tie).

An empty message stands for a wait: the next one may be sent once the server has sent
more. Before the server has accepted the job, only so many bytes are sent as it allows.
Then it has a limit, its credit, on the row blocks whose results have not arrived.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Final

import numpy as np

from gradwire._api.errors import InputError
from gradwire._api.types import Array
from gradwire._arrays.operand import Operand
from gradwire._core.frame import Message, complete_frame, elements_frame
from gradwire._core.job_plan import Plan
from gradwire_protocol import checksum, framing
from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.matrices import ROW_OPERANDS, Matrix

WAIT: Final = b""
"""In the place of a message: wait until the server has sent more."""

STALE_S = 0.1
"""Longest time that rows are collected for a full message, so that the server sees
progress of a slow caller."""


class Sender:
    """The requests of one job, after its header.

    All attributes are updated before a message is yielded, because the server's answer
    may arrive before the sender continues.

    It does not refer to the receiver, whose arrays would then be freed by the garbage
    collector only.

    Attributes:
        m: Number of all rows, once it is known.
        block_rows: Rows of a row block, once the server has accepted the job.
        rows_sent: Rows that were yielded, wholly or in part.
        bytes_sent: Bytes of operands that were yielded.
        accepted: Whether the server has accepted the job.
        received_row: First row of the first row block whose results have not all
            arrived; None: no results of row blocks are wanted.
        ended: Whether End was yielded.
        received_segments: Segments whose sums have arrived, if the plan wants them.
    """

    def __init__(self, plan: Plan, clock: Callable[[], float] = time.monotonic) -> None:
        self.m = plan.m
        self.ended = False
        self.rows_sent = 0
        self.accepted = False
        self.received_row: int | None = None
        self.received_segments = 0
        self.bytes_sent = 0
        self._plan = plan
        self._clock = clock
        self._last_sent = 0.0
        self.block_rows = self._run_rows = 1
        self._early_bytes = self._credit_blocks = 0
        self._row_bytes = sum(
            plan.size_bytes(operand, 1)
            for operand in plan.operands
            if operand in ROW_OPERANDS
        )
        self._early_run_rows = plan.block_rows or self._stage_rows()
        self._staging: _Staging | None = None
        self._in_frames = False

    def begin(self, first_row: int, early_bytes: int = 0) -> None:
        """Begin a job.

        Args:
            first_row: The first row to send. Earlier rows count as sent.
            early_bytes: Most bytes of operands to send before the server has accepted
                the job.
        """
        self._early_bytes = early_bytes
        self.rows_sent = first_row

    def accept(self, block_rows: int, window_rows: int, credit_blocks: int = 0) -> None:
        """Use the server's row blocks.

        Args:
            block_rows: Rows of a row block, at least 1.
            window_rows: Rows by which one operand may be ahead, at least 1.
            credit_blocks: Row blocks that may be outstanding; 0: any number.
        """
        self.block_rows = block_rows
        self._run_rows = min(block_rows, window_rows)
        # Row blocks without elements to send are not complete before End.
        if self._row_bytes:
            self._credit_blocks = credit_blocks
        self.accepted = True

    def use_frames(self) -> None:
        """Yield elements in frames for a direct connection; before `accept`."""
        self._in_frames = True

    def opening(self) -> Iterator[bytes]:
        """Wait until operands may be sent."""
        while not self.accepted and not self._early_bytes:
            yield WAIT

    def weights(self, w: Operand) -> Iterator[Message]:
        """Yield the messages with W."""
        yield from self._messages(Matrix.W, w, 0, w.rows, row=0)

    def sums(self, sums: Mapping[Matrix, Array]) -> Iterator[Message]:
        """Yield the messages that carry partial sums of these results."""
        for matrix, index, payload in self.sum_pieces(sums):
            yield self._encoded(matrix, index, payload)

    def sum_pieces(
        self, sums: Mapping[Matrix, Array]
    ) -> Iterator[tuple[Matrix, int, memoryview]]:
        """Yield partial sums in pieces: matrix, index of the first element, bytes."""
        for matrix, array in sums.items():
            elements = max(1, self._plan.chunk_bytes // array.itemsize)
            flat = array.reshape(-1)
            for index in range(0, flat.size, elements):
                payload = flat[index : index + elements].view(np.uint8).data
                yield matrix.partial, index, payload

    def all_rows(self, operands: Mapping[Matrix, Operand]) -> Iterator[Message]:
        """Yield the messages with all rows not yet sent.

        Args:
            operands: All rows of X and dY, if the job needs them.
        """
        m = self.m or 0
        while self.rows_sent < m:
            first = self.rows_sent
            count = min(self._room(), m - first)
            if not count:
                yield WAIT
                continue
            yield from self._run(operands, first, count, row=first)

    def rows(self, operands: Mapping[Matrix, Operand]) -> Iterator[Message]:
        """Yield the messages with the next rows.

        A few rows may be copied and kept, to be sent together with later rows.

        Args:
            operands: Rows of X and dY, if the job needs them, in equal number.

        Raises:
            InputError: There are more rows than m.
        """
        total = next(iter(operands.values())).rows
        told = self.rows_sent + self._held() + total
        if self._plan.m is not None and told > self._plan.m:
            raise InputError(
                f"rows has at least {told} rows: expected m = {self._plan.m}"
            )
        capacity = self._stage_rows()
        start = 0
        while start < total:
            held, left = self._held(), total - start
            room = self._room()
            if held >= room:
                # The server may just have accepted the job, with smaller row blocks.
                yield from self.flush() if held else (WAIT,)
                continue
            if held or left < min(capacity, room):
                count = min(left, capacity - held, room - held)
                self._stage(operands, start, count, capacity)
                full = held + count in {capacity, room}
                if full or self._clock() - self._last_sent > STALE_S:
                    yield from self.flush()
            else:
                count = min(left, room)
                yield from self._run(operands, start, count, row=self.rows_sent)
            start += count

    def flush(self) -> Iterator[Message]:
        """Yield the messages with the rows kept by `rows`."""
        if self._staging is not None and self._staging.count:
            operands, count = self._staging.operands(), self._staging.count
            self._staging.count = 0
            yield from self._run(operands, 0, count, row=self.rows_sent)

    def last_rows(self) -> Iterator[Message]:
        """Yield the messages with the rows kept by `rows`.

        Raises:
            InputError: There are fewer rows than m.
        """
        yield from self.flush()
        if self._plan.m is not None and self.rows_sent != self._plan.m:
            raise InputError(f"rows has {self.rows_sent} rows: expected m = {self.m}")
        self.m = self.rows_sent

    def end(self) -> Iterator[Message]:
        """Yield what completes the job."""
        self.ended = True
        if self._in_frames:
            yield complete_frame(self.m or 0)
        yield framing.encode_end(self.m or 0)

    def _held(self) -> int:
        return 0 if self._staging is None else self._staging.count

    def _room(self) -> int:
        """Return the number of rows until the run must end.

        0: the server has to accept the job first.
        """
        if not self.accepted:
            # The grid is not known yet. Neither operand may be ahead by a whole
            # message, so that the first row blocks are complete soon.
            to_boundary = self._early_run_rows - self.rows_sent % self._early_run_rows
            return min(to_boundary, self._early_rows())
        to_boundary = self.block_rows - self.rows_sent % self.block_rows
        return min(to_boundary, self._run_rows)

    def _may_begin(self, row: int) -> bool:
        """Return whether the server's credit covers the row block of a row."""
        segment_rows = self._plan.segment_rows
        if segment_rows and row // segment_rows >= self.received_segments + 2:
            return False
        received = self.received_row
        if not self._credit_blocks or received is None:
            return True
        block, first = row // self.block_rows, received // self.block_rows
        return block < first + self._credit_blocks

    def _early_rows(self) -> int:
        """Return how many rows may still be sent before the job is accepted."""
        left = self._early_bytes - self.bytes_sent
        return left // self._row_bytes if self._row_bytes else self._early_run_rows

    def _stage_rows(self) -> int:
        """Return the number of rows in a full message of the wider operand."""
        columns = max(
            (
                operand.row_length(self._plan.n, self._plan.k)
                for operand in ROW_OPERANDS
                if operand in self._plan.operands
            ),
            default=0,
        )
        return max(1, self._plan.elements_per_message() // max(1, columns))

    def _stage(
        self,
        operands: Mapping[Matrix, Operand],
        start: int,
        count: int,
        capacity: int,
    ) -> None:
        if self._staging is None:
            rows = min(capacity, self._run_rows) if self.accepted else capacity
            self._staging = _Staging(operands, rows)
        self._staging.put(operands, start, count)

    def _run(
        self,
        operands: Mapping[Matrix, Operand],
        start: int,
        count: int,
        *,
        row: int,
    ) -> Iterator[Message]:
        while not self._may_begin(row):
            yield WAIT
        self.rows_sent += count
        for matrix in ROW_OPERANDS:
            if matrix in operands:
                operand = operands[matrix]
                yield from self._messages(
                    matrix, operand, start, start + count, row=row
                )
        self._last_sent = self._clock()

    def _messages(
        self,
        matrix: Matrix,
        operand: Operand,
        first: int,
        last: int,
        *,
        row: int,
    ) -> Iterator[Message]:
        """Yield rows [first, last) of an operand, as rows `row`, ... of the matrix."""
        shift = (row - first) * operand.columns
        elements = self._plan.elements_per_message()
        for index, payload in operand.pieces(first, last, elements):
            # Rows are counted before; this is about W.
            while not self._may_send(len(payload)):
                yield WAIT
            self.bytes_sent += len(payload)
            yield self._encoded(matrix, index + shift, payload)

    def _may_send(self, size_bytes: int) -> bool:
        return self.accepted or self.bytes_sent + size_bytes <= self._early_bytes

    def _encoded(self, matrix: Matrix, index: int, payload: memoryview) -> Message:
        has_checksum = self._plan.options.checksum
        if self._in_frames:
            return elements_frame(matrix, index, payload, has_checksum=has_checksum)
        crc = checksum.crc32c(payload) if has_checksum else None
        return framing.encode_chunk(matrix, index, payload, crc)


class _Staging:
    """Copied rows that wait to be sent together with later rows."""

    def __init__(self, like: Mapping[Matrix, Operand], rows: int) -> None:
        self.count = 0
        self._arrays: dict[Matrix, Array] = {
            matrix: np.empty((rows, operand.columns), operand.dtype.numpy)
            for matrix, operand in like.items()
        }

    def put(self, operands: Mapping[Matrix, Operand], start: int, count: int) -> None:
        for matrix, operand in operands.items():
            where = slice(self.count, self.count + count)
            self._arrays[matrix][where] = operand.take(start, start + count)
        self.count += count

    def operands(self) -> dict[Matrix, Operand]:
        return {
            matrix: Operand(array[: self.count], Dtype.of(array.dtype))
            for matrix, array in self._arrays.items()
        }
