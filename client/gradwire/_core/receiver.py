"""What a job receives: results, checked before a byte of them is used."""

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
    """Takes a result's elements in their order, each after the one before."""

    def seek(self, row: int) -> None:
        """The next elements are those from a row on; it begins a row block."""

    def write(self, payload: memoryview) -> None:
        """Take the next elements: whole ones, at least one."""

    def close(self) -> None:
        """There are no more."""


class BlockSink:
    """Puts a result's elements together to arrays, one for each row block.

    Args:
        columns: Elements of a row.
        array_dtype: The arrays' dtype.
        dtype: The elements', as they come.
        sender: Knows how many rows a block has.

    Attributes:
        columns: Elements of a row.
        complete: Row blocks that are complete and were not taken yet, by
            their first rows.
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
        """A new array for some rows."""
        return np.empty((rows, self.columns), self._array_dtype.numpy)

    def seek(self, row: int) -> None:
        """The next elements are those of the block that begins with a row."""
        self._first_row = row

    def write(self, payload: memoryview) -> None:
        """Take the next elements."""
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

    def close(self) -> None:
        """Nothing is left to do: the last element completed the last block."""

    def _rows(self) -> int:
        # A short block is sent only after End, so m is known by then.
        sender = self._sender
        if sender.m is None:
            return sender.block_rows
        return min(sender.block_rows, sender.m - self._first_row)


class Receiver:
    """The results of a job, as they come.

    Attributes:
        bytes_received: Bytes of results that were taken.
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
        """Y and dX come from a row on that begins a row block."""
        if not row:
            return
        rows = row if self._sender.m is None else min(row, self._sender.m)
        for matrix in self._next:
            if matrix.row_wise:
                columns = matrix.row_length(self._plan.n, self._plan.k)
                self._next[matrix] = rows * columns
                self._sinks[matrix].seek(row)

    def complete_row(self) -> int | None:
        """The first row of the first block that is not here, whole.

        None: no rows are wanted.
        """
        block_rows = self._sender.block_rows
        numbers = []
        for matrix, at in self._next.items():
            columns = matrix.row_length(self._plan.n, self._plan.k)
            if matrix.row_wise and columns:
                numbers.append(at // (block_rows * columns))
        return min(numbers) * block_rows if numbers else None

    def flush(self) -> None:
        """Have the whole rows that were taken in their places."""
        for sink in self._sinks.values():
            sink.close()

    def take(self, chunk: Chunk) -> None:
        """Use the elements of a message.

        Raises:
            ProtocolError: They are not what comes next, or cannot be yet.
            ChecksumError: They were damaged on the way.
        """
        matrix = _BY_NUMBER.get(chunk.matrix)
        if matrix is None or matrix not in self._next:
            name = matrix.label if matrix else f"matrix {chunk.matrix}"
            raise ProtocolError(f"the server sent {name}, which was not asked for")
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
                f"the server sent {len(payload)} bytes of {matrix.label}, whose"
                f" elements have {itemsize}"
            )
        at = self._next[matrix]
        if chunk.index != at:
            raise ProtocolError(
                f"the server sent {matrix.label} from element {chunk.index} on, and"
                f" element {at} is next"
            )
        if at + count > self._due(matrix):
            raise ProtocolError(
                f"the server sent {matrix.label} up to element {at + count}, and the"
                f" rows that it has make up {self._due(matrix)}"
            )
        self._next[matrix] = at + count
        self._sinks[matrix].write(payload)
        self.bytes_received += len(payload)

    def finish(self) -> None:
        """Check that nothing is missing.

        Raises:
            ProtocolError: Something is.
        """
        for matrix, at in self._next.items():
            if at != self._due(matrix) or not self._sender.ended:
                raise ProtocolError(
                    f"the server ended the job after {at} of {self._due(matrix)}"
                    f" elements of {matrix.label}"
                )
            self._sinks[matrix].close()

    def _due(self, matrix: Matrix) -> int:
        """Elements that can have been computed from what was sent."""
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
    """Check that a payload is as it was when the server sent it.

    Raises:
        ProtocolError: It has no checksum, or one that was not asked for.
        ChecksumError: It was damaged on the way.
    """
    wanted = options.checksum
    if wanted != (crc32c is not None):
        which = "without" if wanted else "with"
        raise ProtocolError(
            f"the server sent {matrix.label} {which} a checksum, against the job"
        )
    if wanted and checksum.crc32c(payload) != crc32c:
        raise ChecksumError(
            f"a chunk of {matrix.label} was damaged on the way: its checksum is wrong",
            status=Reason.CHECKSUM_MISMATCH.status,
            attached=ErrorDetails(reason=Reason.CHECKSUM_MISMATCH),
            job_id=options.job_id,
        )
