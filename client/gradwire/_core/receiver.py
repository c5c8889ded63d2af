"""The results of a job, checked before they are stored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from gradwire._api.errors import ChecksumError, ProtocolError
from gradwire._api.options import Options
from gradwire._api.types import Array
from gradwire._arrays.array_sink import ArraySink
from gradwire._core.job_plan import Plan
from gradwire._core.sender import Sender
from gradwire_protocol import checksum
from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.error_details import ErrorDetails
from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.framing import Chunk
from gradwire_protocol.matrices import RESULTS, Matrix

_BY_NUMBER = {int(matrix): matrix for matrix in RESULTS}


class Sink(Protocol):
    """Stores a result's elements in order."""

    def seek(self, row: int) -> None:
        """Continue at `row`, the first row of a row block."""

    def write(self, payload: memoryview) -> None:
        """Store the next elements: a whole number, at least one."""

    def room(self, size_bytes: int) -> memoryview | None:
        """Return the memory of the next bytes, if they can be received there."""

    def advance(self, size_bytes: int) -> None:
        """Count the next bytes as stored: they were received into `room`."""

    def close(self) -> None:
        """Finish: there are no more elements, or none before the next `seek`."""


class BlockSink:
    """Collects a result's elements in one array for each row block.

    Args:
        columns: Elements of a row.
        array_dtype: Dtype of the arrays.
        dtype: Dtype of the received elements.
        sender: Provides the number of rows of a row block.

    Attributes:
        columns: Elements of a row.
        complete: Complete row blocks that were not yet taken, by first row.
    """

    def __init__(
        self,
        columns: int,
        array_dtype: Dtype,
        dtype: Dtype,
        sender: Sender,
    ) -> None:
        self.complete: dict[int, Array] = {}
        self.columns = columns
        self._array_dtype = array_dtype
        self._dtype = dtype
        self._sender = sender
        self._first_row = 0
        self._array: Array | None = None
        self._sink: ArraySink | None = None
        self._missing = 0

    def empty(self, rows: int) -> Array:
        """Create an array for `rows` rows."""
        return np.empty((rows, self.columns), self._array_dtype.numpy)

    def seek(self, row: int) -> None:
        """Continue at `row`, the first row of a row block."""
        self._first_row = row

    def write(self, payload: memoryview) -> None:
        """Store the next elements."""
        while payload:
            if self._array is None or self._sink is None:
                self._array = self.empty(self._rows())
                self._sink = ArraySink(self._array, self._dtype)
                self._missing = self._array.size * self._dtype.itemsize
            part = payload[: self._missing]
            self._sink.write(part)
            self._missing -= len(part)
            payload = payload[len(part) :]
            if not self._missing:
                self.complete[self._first_row] = self._array
                self._first_row += self._array.shape[0]
                self._array = None

    def room(self, size_bytes: int) -> memoryview | None:
        """Return None: a row block's array is made when its first element comes."""

    def advance(self, size_bytes: int) -> None:
        """Do nothing, without `room`."""

    def close(self) -> None:
        """Do nothing: the last element completed the last block."""

    def _rows(self) -> int:
        # The server sends a short block only after End, when m is known.
        sender = self._sender
        if sender.m is None:
            return sender.block_rows
        return min(sender.block_rows, sender.m - self._first_row)


class Receiver:
    """Receives the results of a job.

    Attributes:
        bytes_received: Bytes of results stored.
    """

    def __init__(
        self,
        plan: Plan,
        sinks: Mapping[Matrix, Sink],
        sender: Sender,
    ) -> None:
        self.bytes_received = 0
        self._plan = plan
        self._sinks = sinks
        self._sender = sender
        self._next = dict.fromkeys(plan.results, 0)

    def begin(self, row: int) -> None:
        """Expect Y and dX from `row` on, the first row of a row block."""
        if not row:
            return
        rows = row if self._sender.m is None else min(row, self._sender.m)
        for matrix in self._next:
            if matrix.row_wise:
                columns = matrix.row_length(self._plan.n, self._plan.k)
                self._next[matrix] = rows * columns
                self._sinks[matrix].seek(row)

    def complete_row(self) -> int | None:
        """Return the first row of the first incomplete row block.

        None if neither Y nor dX is wanted.
        """
        block_rows = self._sender.block_rows
        numbers = []
        for matrix, at in self._next.items():
            columns = matrix.row_length(self._plan.n, self._plan.k)
            if matrix.row_wise and columns:
                numbers.append(at // (block_rows * columns))
        return min(numbers) * block_rows if numbers else None

    def flush(self) -> None:
        """Write all complete rows to their arrays."""
        for sink in self._sinks.values():
            sink.close()

    def take(self, chunk: Chunk) -> None:
        """Store the elements of a chunk.

        Raises:
            ProtocolError: The elements are not the next ones, or cannot have been
                computed yet.
            ChecksumError: The elements were damaged in transit.
        """
        matrix = _BY_NUMBER.get(chunk.matrix)
        if matrix is None or matrix not in self._next:
            name = matrix.label if matrix else f"matrix {chunk.matrix}"
            raise ProtocolError(f"the server sent {name}, which was not requested")
        payload = chunk.payload
        if not payload:
            raise ProtocolError(
                f"the server sent a chunk of {matrix.label} without elements"
            )
        check_crc32c(self._plan.options, matrix, chunk.crc32c, payload)
        itemsize = self._plan.result_dtype(matrix).itemsize
        count, rest = divmod(len(payload), itemsize)
        if rest:
            raise ProtocolError(
                f"the server sent {len(payload)} bytes of {matrix.label}:"
                f" expected a multiple of {itemsize}"
            )
        at = self._next[matrix]
        if chunk.index != at:
            raise ProtocolError(
                f"the server sent {matrix.label} from element {chunk.index} on:"
                f" expected element {at}"
            )
        if at + count > self._due(matrix):
            raise ProtocolError(
                f"the server sent {at + count} elements of {matrix.label}: expected at"
                f" most {self._due(matrix)} for the rows sent"
            )
        self._next[matrix] = at + count
        self._sinks[matrix].write(payload)
        self.bytes_received += len(payload)

    def finish(self) -> None:
        """Check that all results are complete.

        Raises:
            ProtocolError: Elements are missing.
        """
        for matrix, at in self._next.items():
            if at != self._due(matrix) or not self._sender.ended:
                raise ProtocolError(
                    f"the server ended the job after {at} of {self._due(matrix)}"
                    f" elements of {matrix.label}"
                )
            self._sinks[matrix].close()

    def _due(self, matrix: Matrix) -> int:
        """Return how many elements the server can have computed from the rows sent."""
        sender = self._sender
        if matrix.is_sum:
            return math.prod(self._plan.shape(matrix, 0)) if sender.ended else 0
        rows = sender.rows_sent
        if rows != sender.m:
            rows -= rows % sender.block_rows
        return rows * matrix.row_length(self._plan.n, self._plan.k)


def check_crc32c(
    options: Options, matrix: Matrix, crc32c: int | None, payload: memoryview
) -> None:
    """Check the checksum of a payload.

    Raises:
        ProtocolError: The checksum is missing, or was not requested.
        ChecksumError: The payload was damaged in transit.
    """
    wanted = options.checksum
    if wanted != (crc32c is not None):
        which = "without" if wanted else "with"
        raise ProtocolError(
            f"the server sent {matrix.label} {which} a checksum, contrary to the job"
        )
    if wanted and checksum.crc32c(payload) != crc32c:
        raise ChecksumError(
            f"a chunk of {matrix.label} was damaged in transit: its checksum is wrong",
            status=Reason.CHECKSUM_MISMATCH.status,
            attached=ErrorDetails(reason=Reason.CHECKSUM_MISMATCH),
            job_id=options.job_id,
        )
