"""The elements of a job on direct connections, without I/O.

Connection c of N carries the row blocks b with b mod N = c, and connection 0 everything
that belongs to no row block. Each connection has a sending and a receiving thread:

    for header, payload in direct.frames(connection): send both
    share = direct.share(connection)
    while not share.complete:
        header = FrameHeader.decode(the next bytes)
        payload = share.room(header), filled with the next bytes
        share.take(header, payload)

A job whose rows come from an iterable has one connection, and its sender yields the
frames.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from gradwire._api.errors import ProtocolError
from gradwire._arrays.operand import Operand
from gradwire._core.frame import (
    NOTHING,
    Frame,
    check_length,
    complete_frame,
    elements_frame,
)
from gradwire._core.job_plan import Plan
from gradwire._core.receiver import Sink, check_crc32c
from gradwire._core.resume import Checkpoint
from gradwire._core.sender import Sender
from gradwire_protocol.data_plane.frames import FrameHeader, Kind
from gradwire_protocol.framing import Chunk
from gradwire_protocol.matrices import PARTIAL_SUMS, RESULTS, ROW_OPERANDS, Matrix

_BY_NUMBER = {int(matrix): matrix for matrix in (*RESULTS, *PARTIAL_SUMS)}


class Listener(Protocol):
    """What learns of elements and checkpoints: the job's exchange."""

    @property
    def awaits_sums(self) -> bool:
        """Whether a checkpoint has begun, and its sums are not complete."""

    def begin_checkpoint(self, rows: int) -> None:
        """Begin a checkpoint."""

    def take_sums(self, chunk: Chunk) -> None:
        """Take elements of its sums."""

    def received_block(self) -> None:
        """Note that all results of a row block were received."""

    def report(self) -> None:
        """Report progress."""


class RowSource(Protocol):
    """Where the rows of a job come from. Thread-safe."""

    @property
    def rows(self) -> int:
        """Number of all rows, once there are no more."""

    def rows_at(
        self, row: int, count: int
    ) -> tuple[Mapping[Matrix, Operand], int, int] | None:
        """Return the next rows of a job, at most `count`, from `row` on.

        Args:
            row: The first row, of a row block.
            count: Rows of a row block.

        Returns:
            Operands, and the first row in them and the row after the last; None: there
            are no more.

        Raises:
            InterruptedError: The source was interrupted.
        """


class _Arrays:
    """The rows of complete operands."""

    def __init__(self, operands: Mapping[Matrix, Operand], m: int) -> None:
        self.rows = m
        self._operands = operands

    def rows_at(
        self, row: int, count: int
    ) -> tuple[Mapping[Matrix, Operand], int, int] | None:
        if row >= self.rows:
            return None
        return self._operands, row, min(row + count, self.rows)


class _Shared:
    """What all threads of a job share.

    It refers neither to the exchange nor to the shares. Their arrays would otherwise be
    freed by the garbage collector only.

    Attributes:
        connections: Number of connections, N.
        lock: Guards the counters, also those of the sender.
        bytes_received: Bytes of results stored.
        sent: Row blocks that were sent, and whose results have not all come.
        next_block: The first row block whose results have not all come.
    """

    def __init__(
        self,
        plan: Plan,
        sender: Sender,
        listener: Listener,
        connections: int,
        next_block: int,
    ) -> None:
        self.plan = plan
        self.sender = sender
        self.listener: Listener = weakref.proxy(listener)
        self.connections = connections
        self.lock = threading.Lock()
        self.bytes_received = 0
        self.sent: set[int] = set()
        self.next_block = next_block
        self._complete: set[int] = set()

    def was_sent(self, block: int) -> bool:
        """Return whether a row block was sent, and its results are due."""
        if block in self.sent or self.sender.ended:
            return True
        # The sender yields frames in order of their rows.
        rows = (block + 1) * self.sender.block_rows
        return self.connections == 1 and rows <= self.sender.rows_sent

    def received(self, block: int) -> None:
        """Count a row block as received. The lock must be held."""
        self.sent.discard(block)
        self._complete.add(block)
        while self.next_block in self._complete:
            self._complete.remove(self.next_block)
            self.next_block += 1


class DirectExchange:
    """The elements of a job on direct connections.

    It takes the place of the exchange's receiver.

    Args:
        plan: The job.
        sender: Its counters; the server has accepted the job.
        sinks: Makes the results' sinks, for each connection its own.
        listener: The job's exchange.
        connections: Number of connections, N.
        checkpoint: The sums with which the job goes on.
        results_from_row: The first row with Y and dX wanted.
        source: Where the rows of X and dY come from; None: from operands with all of
            them.

    Attributes:
        all_sent: Whether all operands were sent, for a job of arrays.
    """

    def __init__(
        self,
        plan: Plan,
        sender: Sender,
        sinks: Callable[[], Mapping[Matrix, Sink]],
        listener: Listener,
        *,
        connections: int,
        checkpoint: Checkpoint | None,
        results_from_row: int,
        source: RowSource | None = None,
    ) -> None:
        self.all_sent = False
        self._source = source
        first_result = results_from_row // sender.block_rows
        self._shared = _Shared(plan, sender, listener, connections, first_result)
        self._checkpoint = checkpoint
        self._first_block = sender.rows_sent // sender.block_rows
        self._shares_to_send = connections
        self._shares = [
            ResultShare(self._shared, number, sinks(), first_result)
            for number in range(connections)
        ]

    @property
    def bytes_received(self) -> int:
        """Bytes of results stored."""
        return self._shared.bytes_received

    # Sending.

    def frames(
        self, connection: int, operands: Mapping[Matrix, Operand]
    ) -> Iterator[Frame]:
        """Yield the frames of a connection.

        Args:
            connection: Its number.
            operands: W, and all rows of X and dY, if the job needs them and has no
                source of rows.

        Raises:
            InputError: An element is too large for 16 bits.
            InterruptedError: The source was interrupted.
        """
        if not connection:
            w = operands.get(Matrix.W)
            if w is not None:
                yield from self._frames(Matrix.W, w, 0, w.rows, row=0)
            if self._checkpoint is not None:
                yield from self._sums(self._checkpoint)
        sender, size = self._shared.sender, self._shared.sender.block_rows
        source = self._source or _Arrays(operands, sender.m or 0)
        block = self._first_block
        block += (connection - block) % self._shared.connections
        while (rows := source.rows_at(block * size, size)) is not None:
            having, start, end = rows
            with self._shared.lock:
                self._shared.sent.add(block)
                sender.rows_sent += end - start
            for matrix in ROW_OPERANDS:
                if matrix in having:
                    operand = having[matrix]
                    yield from self._frames(
                        matrix, operand, start, end, row=block * size
                    )
            block += self._shared.connections
        m = source.rows
        with self._shared.lock:
            sender.m = m
            self._shares_to_send -= 1
            if not self._shares_to_send:
                # Before the server can know that the operands are complete.
                self._shared.sender.ended = True
        yield complete_frame(m)

    def _frames(
        self, matrix: Matrix, operand: Operand, first: int, last: int, *, row: int
    ) -> Iterator[Frame]:
        """Yield rows [first, last) of an operand, as rows `row`, ... of the matrix."""
        shift = (row - first) * operand.columns
        elements = self._shared.plan.elements_per_message()
        for index, payload in operand.pieces(first, last, elements):
            with self._shared.lock:
                self._shared.sender.bytes_sent += len(payload)
            yield self._frame(matrix, index + shift, payload)
            self._shared.listener.report()

    def _sums(self, checkpoint: Checkpoint) -> Iterator[Frame]:
        for matrix, index, payload in self._shared.sender.sum_pieces(checkpoint.sums):
            yield self._frame(matrix, index, payload)

    def _frame(self, matrix: Matrix, index: int, payload: memoryview) -> Frame:
        has_checksum = self._shared.plan.options.checksum
        return elements_frame(matrix, index, payload, has_checksum=has_checksum)

    # Receiving.

    def share(self, connection: int) -> ResultShare:
        """Return the results of a connection."""
        return self._shares[connection]

    def complete_row(self) -> int | None:
        """Return the first row of the first row block without all its results.

        None if neither Y nor dX is wanted.
        """
        if not self._shares[0].has_rows:
            return None
        with self._shared.lock:
            return self._shared.next_block * self._shared.sender.block_rows

    def flush(self) -> None:
        """Write all complete rows to their arrays; no thread receives any more."""
        for share in self._shares:
            share.flush()

    def finish(self) -> None:
        """Check that all results are complete.

        Raises:
            ProtocolError: Elements are missing.
        """
        for share in self._shares:
            share.finish()


class ResultShare:
    """The results on one connection.

    Args:
        shared: What all shares of the job have in common.
        connection: Number of the connection.
        sinks: Store the results.
        results_from: The first row block with results.

    Attributes:
        complete: Whether the last frame has come.
    """

    def __init__(
        self,
        shared: _Shared,
        connection: int,
        sinks: Mapping[Matrix, Sink],
        results_from: int,
    ) -> None:
        self.complete = False
        self._shared = shared
        self._plan = plan = shared.plan
        self._connection = connection
        self._sinks = sinks
        self._row_lengths = {
            matrix: columns
            for matrix in plan.results
            if matrix.row_wise and (columns := matrix.row_length(plan.n, plan.k))
        }
        self._block = results_from
        self._block += (connection - results_from) % shared.connections
        self._received = dict.fromkeys(self._row_lengths, 0)
        """Elements of `_block` by result."""
        self._sums = {
            matrix: math.prod(plan.shape(matrix, 0))
            for matrix in plan.results
            if matrix.is_sum and not connection
        }
        self._received_sums = dict.fromkeys(self._sums, 0)
        self._staging = bytearray()
        self._in_place = False
        self._begin_block()

    @property
    def has_rows(self) -> bool:
        """Whether there are results of row blocks."""
        return bool(self._row_lengths)

    def room(self, header: FrameHeader) -> memoryview:
        """Check a frame's header, and return memory for its payload.

        Raises:
            ProtocolError: The frame does not continue the results.
        """
        check_length(header)
        self._in_place = False
        matrix = _BY_NUMBER.get(header.matrix)
        # Sums follow their checkpoint at once, on the same connection.
        if (
            not self._connection
            and matrix not in PARTIAL_SUMS
            and self._shared.listener.awaits_sums
        ):
            raise ProtocolError("the server did not complete a checkpoint")
        if header.kind != Kind.ELEMENTS:
            return NOTHING
        if matrix is not None and (matrix in self._received or matrix in self._sums):
            self._check(matrix, header)
            place = self._sinks[matrix].room(header.length)
            if place is not None:
                self._in_place = True
                return place
        elif matrix not in PARTIAL_SUMS or self._connection:
            name = matrix.label if matrix else f"matrix {header.matrix}"
            raise ProtocolError(
                f"the server sent {name} on direct connection {self._connection},"
                " which was not requested there"
            )
        if len(self._staging) < header.length:
            self._staging = bytearray(header.length)
        return memoryview(self._staging)[: header.length]

    def take(self, header: FrameHeader, payload: memoryview) -> None:
        """Take a frame whose payload was received into `room`.

        Raises:
            ProtocolError: The frame violates the contract.
            ChecksumError: The payload was damaged in transit.
        """
        shared, listener = self._shared, self._shared.listener
        if header.kind == Kind.COMPLETE:
            self._complete_at(header.position)
            return
        if header.kind == Kind.CHECKPOINT:
            if self._connection:
                raise ProtocolError("the server sent a checkpoint beside connection 0")
            listener.begin_checkpoint(header.position)
            return
        matrix = Matrix(header.matrix)
        if matrix in PARTIAL_SUMS:
            chunk = Chunk(header.matrix, header.position, payload, header.crc32c)
            listener.take_sums(chunk)
            return
        check_crc32c(self._plan.options, matrix, header.crc32c, payload)
        sink = self._sinks[matrix]
        if self._in_place:
            sink.advance(header.length)
        else:
            sink.write(payload)
        count = header.length // self._plan.result_dtype(matrix).itemsize
        with shared.lock:
            shared.bytes_received += header.length
            if matrix in self._received:
                self._received[matrix] += count
                ended = self._end_block()
            else:
                self._received_sums[matrix] += count
                ended = False
        if ended:
            listener.received_block()
        listener.report()

    def flush(self) -> None:
        """Write all complete rows to their arrays."""
        for sink in self._sinks.values():
            sink.close()

    def finish(self) -> None:
        """Check that all results are complete.

        Raises:
            ProtocolError: Elements are missing.
        """
        missing = {
            matrix: due - self._received_sums[matrix]
            for matrix, due in self._sums.items()
        }
        for matrix in self._received:
            missing[matrix] = self._due(matrix)
        for matrix, elements in missing.items():
            if elements or not self.complete:
                raise ProtocolError(
                    f"the server ended the job without {elements} elements of"
                    f" {matrix.label} on direct connection {self._connection}"
                )
        self.flush()

    def _check(self, matrix: Matrix, header: FrameHeader) -> None:
        itemsize = self._plan.result_dtype(matrix).itemsize
        count, rest = divmod(header.length, itemsize)
        if rest or not count:
            raise ProtocolError(
                f"the server sent {header.length} bytes of {matrix.label}: expected a"
                f" multiple of {itemsize}, and at least one element"
            )
        if matrix in self._sums:
            at, due = self._received_sums[matrix], self._sums[matrix]
            begun = self._shared.sender.ended
        else:
            received = self._received[matrix]
            start = self._block * self._shared.sender.block_rows
            at = start * self._row_lengths[matrix] + received
            due = at + self._due(matrix) - received
            begun = self._shared.was_sent(self._block)
        if not begun:
            raise ProtocolError(
                f"the server sent elements of {matrix.label} before it had the operands"
            )
        if header.position != at:
            raise ProtocolError(
                f"the server sent {matrix.label} from element {header.position} on:"
                f" expected element {at}"
            )
        if at + count > due:
            raise ProtocolError(
                f"the server sent {matrix.label} up to element {at + count}: expected"
                f" at most {due} for its row block"
            )

    def _due(self, matrix: Matrix) -> int:
        """Return how many elements a result has in the current row block."""
        sender = self._shared.sender
        first = self._block * sender.block_rows
        rows = sender.block_rows
        if sender.m is not None:
            rows = min(rows, max(sender.m - first, 0))
        return rows * self._row_lengths[matrix]

    def _begin_block(self) -> None:
        first = self._block * self._shared.sender.block_rows
        m = self._shared.sender.m
        if m is not None and first >= m:
            return
        for matrix in self._received:
            self._sinks[matrix].seek(first)

    def _end_block(self) -> bool:
        """Go on to the next row block if this one is complete; return whether it is."""
        if any(each < self._due(matrix) for matrix, each in self._received.items()):
            return False
        for matrix in self._received:
            self._sinks[matrix].close()
        self._shared.received(self._block)
        self._block += self._shared.connections
        self._received = dict.fromkeys(self._received, 0)
        self._begin_block()
        return True

    def _complete_at(self, m: int) -> None:
        if m != self._shared.sender.m:
            raise ProtocolError(
                f"the server completed a job of {m} rows: expected"
                f" {self._shared.sender.m}"
            )
        self.complete = True
