"""Validation of a request stream: order, indices and byte counts.

It does no I/O and stores no elements. For each message it returns where the bytes
belong.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from gradwire_protocol.checksum import crc32c
from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.framing import Chunk
from gradwire_protocol.job_spec import JobSpec
from gradwire_protocol.limits import MAX_PAYLOAD_BYTES
from gradwire_protocol.matrices import OPERANDS, Matrix
from gradwire_server.backends.row_blocks import RowBlockPlan
from gradwire_server.errors import JobError
from gradwire_server.jobs.stream.span import Span


@dataclass(frozen=True, slots=True)
class Piece:
    """Received bytes, and where they belong."""

    span: Span
    payload: memoryview


class RequestValidator:
    """The state of one request stream.

    Args:
        spec: The stream's job.
        plan: Its row blocks.
    """

    def __init__(self, spec: JobSpec, plan: RowBlockPlan) -> None:
        self._spec = spec
        self._plan = plan
        self._received: dict[Matrix, int] = {
            operand: spec.first_row * spec.row_length(operand)
            for operand in spec.sent_operands
            if operand.row_wise
        }
        self._before_rows = {
            matrix: math.prod(matrix.shape(0, spec.n, spec.k))
            for matrix in matrices_before_rows(spec)
        }
        """Elements of the matrices that precede all rows, in their order."""
        self._received |= dict.fromkeys(self._before_rows, 0)
        self._rows: int | None = None
        """Rows of the job; None until the stream is complete."""

    @property
    def _missing_before_rows(self) -> Matrix | None:
        for matrix, elements in self._before_rows.items():
            if self._received[matrix] < elements:
                return matrix
        return None

    @property
    def blocks_complete(self) -> int:
        """Number of row blocks, in order, with all their rows.

        A shorter last block counts once the stream is complete. If rows have no
        elements, no block counts before that.
        """
        if self._rows is not None:
            return -(-self._rows // self._plan.block_rows)
        complete = [self._complete_rows(operand) for operand in self._row_operands]
        return min(complete, default=0) // self._plan.block_rows

    def rows_of(self, number: int) -> int:
        """Return the rows of the `number`-th block, which must be complete."""
        if self._rows is None:
            return self._plan.block_rows
        return min(self._plan.block_rows, self._rows - number * self._plan.block_rows)

    def accept(self, chunk: Chunk) -> Iterator[Piece]:
        """Check a message and yield its pieces, each with its destination.

        A piece counts as received after `commit`. A message may span several blocks,
        and a block is complete only when all of its pieces are committed.

        Raises:
            JobError: The message does not continue the stream; nothing was accepted.
        """
        operand, payload = self._check(chunk)
        itemsize = self._spec.dtype_of(operand).itemsize
        if not operand.row_wise:
            yield Piece(Span(operand, 0, chunk.index * itemsize), payload)
            return
        row_length = self._spec.row_length(operand)
        block_elements = self._plan.block_rows * row_length
        at = chunk.index
        while payload.nbytes:
            number, first = divmod(at, block_elements)
            piece = payload[: (block_elements - first) * itemsize]
            at += piece.nbytes // itemsize
            yield Piece(Span(operand, number, first * itemsize), piece)
            payload = payload[piece.nbytes :]

    def commit(self, piece: Piece) -> None:
        """Count a piece as received, once its bytes are stored."""
        matrix = piece.span.matrix
        itemsize = self._spec.dtype_of(matrix).itemsize
        self._received[matrix] += piece.payload.nbytes // itemsize

    def end(self, m: int) -> None:
        """Complete the stream, with m rows as stated by its End.

        Raises:
            JobError: The stream is not complete.
        """
        self._check_end(m)
        self._rows = m

    def _check_end(self, m: int) -> None:
        if m < 0:
            raise JobError(
                Reason.SHAPE_INVALID,
                f"end.m is {m}: expected at least 0",
                field="end.m",
            )
        if self._spec.m is not None and m != self._spec.m:
            raise JobError(
                Reason.M_MISMATCH,
                f"end.m is {m}, but job.m is {self._spec.m}",
                field="end.m",
            )
        if m < self._spec.first_row:
            raise JobError(
                Reason.M_MISMATCH,
                f"end.m is {m}, but job.resume.first_row is {self._spec.first_row}",
                field="end.m",
            )
        for operand, received in self._received.items():
            expected = self._elements(operand, m)
            if received != expected:
                short = received < expected
                raise JobError(
                    Reason.PAYLOAD_MISSING if short else Reason.M_MISMATCH,
                    f"end.m is {m}, so {operand.label} has {expected} elements, "
                    f"but {received} came",
                    field="end.m",
                )

    @property
    def _row_operands(self) -> list[Matrix]:
        """Row operands with at least one element per row."""
        return [
            operand
            for operand in self._received
            if operand.row_wise and self._spec.row_length(operand)
        ]

    def _complete_rows(self, operand: Matrix) -> int:
        return self._received[operand] // self._spec.row_length(operand)

    def _elements(self, operand: Matrix, m: int) -> int:
        if not operand.row_wise:
            return self._before_rows[operand]
        return m * self._spec.row_length(operand)

    def _check(self, chunk: Chunk) -> tuple[Matrix, memoryview]:
        operand = self._operand(chunk.matrix)
        received = self._received[operand]
        if chunk.index != received:
            raise JobError(
                Reason.INDEX_INVALID,
                f"chunk.index is {chunk.index}: the next element of {operand.label} "
                f"is {received}",
                field="chunk.index",
            )
        itemsize = self._spec.dtype_of(operand).itemsize
        payload = self._payload(chunk, itemsize)
        count = payload.nbytes // itemsize
        self._check_room(operand, count)
        if count:
            self._check_order(operand, received + count)
        return operand, payload

    def _operand(self, number: int) -> Matrix:
        try:
            operand = Matrix(number)
        except ValueError:
            operand = None
        known = operand in OPERANDS or operand in self._before_rows
        if operand is None or not known:
            names = ", ".join(f"{each.name} ({each.value})" for each in OPERANDS)
            raise JobError(
                Reason.MATRIX_INVALID,
                f"chunk.matrix is {number}: expected one of {names}",
                field="chunk.matrix",
            )
        if operand not in self._received:
            wanted = ", ".join(result.label for result in self._spec.results)
            raise JobError(
                Reason.OPERAND_UNEXPECTED,
                f"chunk.matrix is {operand.name}, but no wanted result ({wanted}) "
                f"needs it"
                if operand not in self._spec.kept
                else f"chunk.matrix is {operand.name}, which is a kept tensor",
                field="chunk.matrix",
            )
        return operand

    def _payload(self, chunk: Chunk, itemsize: int) -> memoryview:
        payload = chunk.payload
        if payload is None:
            raise JobError(
                Reason.OPTION_UNKNOWN,
                "chunk.payload is not set, or is of a kind that this server does not "
                "know: expected data",
                field="chunk.payload",
            )
        if payload.nbytes % itemsize or payload.nbytes > MAX_PAYLOAD_BYTES:
            raise JobError(
                Reason.PAYLOAD_INVALID,
                f"chunk.data has {payload.nbytes} bytes: expected a multiple of "
                f"{itemsize}, at most {MAX_PAYLOAD_BYTES}",
                field="chunk.data",
            )
        if (chunk.crc32c is not None) != self._spec.checksum:
            raise JobError(
                Reason.PAYLOAD_INVALID,
                "chunk.crc32c is absent, but the job asks for checksums"
                if self._spec.checksum
                else "chunk.crc32c is present, but the job asks for no checksums",
                field="chunk.crc32c",
            )
        if chunk.crc32c is not None and crc32c(payload) != chunk.crc32c:
            raise JobError(
                Reason.CHECKSUM_MISMATCH,
                f"chunk.crc32c is {chunk.crc32c:#010x}, but the payload that came has "
                f"{crc32c(payload):#010x}",
                field="chunk.crc32c",
            )
        return payload

    def _check_room(self, operand: Matrix, count: int) -> None:
        m = self._spec.m
        if m is None:
            if operand.row_wise and self._spec.row_length(operand):
                return
            m = 0
        received = self._received[operand]
        expected = self._elements(operand, m)
        if received + count > expected:
            raise JobError(
                Reason.PAYLOAD_EXCESS,
                f"chunk.data brings {operand.label} to {received + count} elements: "
                f"it has {expected}",
                field="chunk.data",
            )

    def _check_order(self, operand: Matrix, elements: int) -> None:
        missing = self._missing_before_rows
        if missing is not None and missing is not operand:
            raise JobError(
                Reason.ORDER_INVALID,
                f"chunk.matrix is {operand.name}, but {missing.label} is not "
                f"complete: {self._received[missing]} of "
                f"{self._before_rows[missing]} elements came",
                field="chunk.matrix",
            )
        if not operand.row_wise:
            return
        touched = -(-elements // self._spec.row_length(operand))
        window = self._plan.window_rows
        for other in self._row_operands:
            lead = touched - self._complete_rows(other)
            if other is not operand and lead > window:
                raise JobError(
                    Reason.LEAD_EXCEEDED,
                    f"{operand.label} would be {lead} rows ahead of {other.label}: "
                    f"at most {window}",
                    field="chunk.matrix",
                )


def matrices_before_rows(spec: JobSpec) -> list[Matrix]:
    """Return the matrices that precede all rows."""
    weights = [operand for operand in spec.sent_operands if not operand.row_wise]
    sums = spec.sums if spec.brings_sums else ()
    return weights + [result.partial for result in sums]
