"""Validation of the operands on one direct connection, without I/O.

Connection c of N carries the row blocks b with b mod N = c in order, each with all rows
of its operands in any turn. Connection 0 first carries the matrices before all rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from gradwire_protocol.data_plane.frames import FrameHeader
from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.job_spec import JobSpec
from gradwire_protocol.limits import MAX_PAYLOAD_BYTES
from gradwire_protocol.matrices import Matrix
from gradwire_server.backends.row_blocks import RowBlockPlan
from gradwire_server.errors import JobError
from gradwire_server.jobs.stream.span import Span


class ShareValidator:
    """The state of the operands on one connection.

    Args:
        spec: The job, with at least one sent operand whose rows have elements.
        plan: Its row blocks.
        before_rows: The matrices that precede all rows.
        connection: Number of the connection.
        connections: Number of connections.

    Attributes:
        block: The row block that is being received, or comes next.
    """

    def __init__(
        self,
        spec: JobSpec,
        plan: RowBlockPlan,
        before_rows: Sequence[Matrix],
        connection: int,
        connections: int,
    ) -> None:
        self._spec = spec
        self._plan = plan
        self._connection = connection
        self._step = connections
        first = spec.first_row // plan.block_rows
        self.block = first + (connection - first) % connections
        self._before_rows = (
            {each: math.prod(each.shape(0, spec.n, spec.k)) for each in before_rows}
            if connection == 0
            else {}
        )
        self._received_before = dict.fromkeys(self._before_rows, 0)
        self._row_lengths = {
            operand: spec.row_length(operand)
            for operand in spec.sent_operands
            if operand.row_wise
        }
        self._received = dict.fromkeys(self._row_lengths, 0)
        """Elements of `block` by operand."""

    @property
    def missing_before_rows(self) -> Matrix | None:
        """The first matrix before all rows that is not complete."""
        for matrix, elements in self._before_rows.items():
            if self._received_before[matrix] < elements:
                return matrix
        return None

    def accept(self, frame: FrameHeader) -> Span:
        """Check the header of a frame with elements.

        Returns:
            Where its payload belongs.

        Raises:
            JobError: The frame does not continue the share.
        """
        matrix = self._matrix(frame.matrix)
        itemsize = self._spec.dtype_of(matrix).itemsize
        self._check_payload(frame, itemsize)
        count = frame.length // itemsize
        missing = self.missing_before_rows
        if missing is not None and missing is not matrix:
            raise JobError(
                Reason.ORDER_INVALID,
                f"frame.matrix is {matrix.name}, but {missing.label} is not complete: "
                f"{self._received_before[missing]} of {self._before_rows[missing]} "
                f"elements came",
                field="frame.matrix",
            )
        if matrix in self._before_rows:
            received, due = self._received_before[matrix], self._before_rows[matrix]
            base = block = 0
        else:
            block = self.block
            base = block * self._plan.block_rows * self._row_lengths[matrix]
            received, due = self._received[matrix], self._due(matrix)
        if frame.position != base + received:
            raise JobError(
                Reason.INDEX_INVALID,
                f"frame.index is {frame.position}: the next element of {matrix.label} "
                f"on direct connection {self._connection} is {base + received}",
                field="frame.index",
            )
        if received + count > due:
            raise JobError(
                Reason.PAYLOAD_EXCESS,
                f"frame.length brings {matrix.label} to element "
                f"{base + received + count}: its row block ends at {base + due}, and a "
                f"frame is of one row block",
                field="frame.length",
            )
        return Span(matrix, block, received * itemsize)

    def commit(self, span: Span, size_bytes: int) -> bool:
        """Count the payload of an accepted frame as received.

        Returns:
            Whether it completes the row block, or the matrices before all rows.
        """
        matrix = span.matrix
        count = size_bytes // self._spec.dtype_of(matrix).itemsize
        if matrix in self._before_rows:
            self._received_before[matrix] += count
            return self.missing_before_rows is None
        self._received[matrix] += count
        if any(self._received[each] < self._due(each) for each in self._received):
            return False
        self._next_block()
        return True

    def complete(self, m: int) -> int:
        """End the share of a job with m rows.

        Returns:
            Rows of a last, short row block that is complete with this; 0: none.

        Raises:
            JobError: Elements are missing, or there are too many.
        """
        spec, size = self._spec, self._plan.block_rows
        if m < spec.first_row or (spec.m is not None and m != spec.m):
            expected = (
                f"at least {spec.first_row}" if spec.m is None else f"job.m, {spec.m}"
            )
            raise JobError(
                Reason.M_MISMATCH,
                f"frame.index is {m}, the number of rows: expected {expected}",
                field="frame.index",
            )
        missing = self.missing_before_rows
        if missing is not None:
            raise self._incomplete(
                missing, self._before_rows[missing], self._received_before[missing]
            )
        first = self.block * size
        rows = min(max(m - first, 0), size)
        for operand, row_length in self._row_lengths.items():
            due = rows * row_length
            if self._received[operand] != due:
                start = first * row_length
                raise self._incomplete(
                    operand, start + due, start + self._received[operand]
                )
        return rows

    def _matrix(self, number: int) -> Matrix:
        for matrix in (*self._before_rows, *self._row_lengths):
            if matrix == number:
                return matrix
        expected = ", ".join(
            f"{each.name} ({each.value})"
            for each in (*self._before_rows, *self._row_lengths)
        )
        raise JobError(
            Reason.MATRIX_INVALID,
            f"frame.matrix is {number} on direct connection {self._connection}: "
            f"expected one of {expected or 'none'}",
            field="frame.matrix",
        )

    def _check_payload(self, frame: FrameHeader, itemsize: int) -> None:
        if not frame.length or frame.length % itemsize:
            raise JobError(
                Reason.PAYLOAD_INVALID,
                f"frame.length is {frame.length} bytes: expected a multiple of "
                f"{itemsize}, and at least one element",
                field="frame.length",
            )
        if frame.length > MAX_PAYLOAD_BYTES:
            raise JobError(
                Reason.PAYLOAD_INVALID,
                f"frame.length is {frame.length} bytes: expected at most "
                f"{MAX_PAYLOAD_BYTES}",
                field="frame.length",
            )
        if (frame.crc32c is not None) != self._spec.checksum:
            raise JobError(
                Reason.PAYLOAD_INVALID,
                "frame.crc32c is absent, but the job asks for checksums"
                if self._spec.checksum
                else "frame.crc32c is present, but the job asks for no checksums",
                field="frame.crc32c",
            )

    def _due(self, operand: Matrix) -> int:
        """Return how many elements of an operand `block` can have."""
        rows = self._plan.block_rows
        if self._spec.m is not None:
            rows = min(rows, max(self._spec.m - self.block * rows, 0))
        return rows * self._row_lengths[operand]

    def _next_block(self) -> None:
        self.block += self._step
        self._received = dict.fromkeys(self._received, 0)

    def _incomplete(self, matrix: Matrix, due: int, received: int) -> JobError:
        return JobError(
            Reason.PAYLOAD_MISSING if received < due else Reason.M_MISMATCH,
            f"direct connection {self._connection} is complete with {matrix.label} up "
            f"to element {received}: expected {due}",
            field="frame.index",
        )
