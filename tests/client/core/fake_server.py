"""A server without I/O, which holds a client to the contract's order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from gradwire.v1.job_pb2 import Accepted, End, Job, Receipt
from gradwire_protocol import framing
from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.matrices import RESULTS, ROW_OPERANDS, Matrix


class ContractError(AssertionError):
    """The client sent what it must not."""


def accepted(job: Job, block_rows: int, window_rows: int) -> Accepted:
    """What a server answers to a header."""
    effective = Job()
    effective.CopyFrom(job)
    if not effective.numerics.dw_accumulator:
        effective.numerics.dw_accumulator = (
            Dtype.FLOAT64
            if job.dtype in {Dtype.FLOAT32, Dtype.FLOAT64}
            else Dtype.FLOAT32
        )
    return Accepted(
        server_instance="fake",
        block_rows=block_rows,
        window_rows=window_rows,
        effective_job=effective,
    )


class FakeServer:
    """Takes a client's requests one by one, and computes at their end."""

    def __init__(self, block_rows: int = 4, window_rows: int = 8) -> None:
        self.block_rows = block_rows
        self.window_rows = window_rows
        self.job: Job | None = None
        self.payload_sizes: list[int] = []
        self.order: list[str] = []
        self._parts: dict[Matrix, bytearray] = {}
        self._ended: int | None = None

    def open(self, message: bytes) -> list[bytes]:
        job = framing.decode_request(message)
        assert isinstance(job, Job)
        self.job = job
        self._parts = {
            matrix: bytearray()
            for matrix in (Matrix.X, Matrix.W, Matrix.DY)
            if job.HasField(matrix.label)
        }
        taken = accepted(job, self.block_rows, self.window_rows)
        return [framing.encode_queued(1), framing.encode_accepted(taken)]

    def take(self, message: bytes) -> None:
        if self._ended is not None:
            raise ContractError("a message after End")
        request = framing.decode_request(message)
        if isinstance(request, End):
            self._end(request.m)
            return
        assert isinstance(request, framing.Chunk)
        matrix = Matrix(request.matrix)
        payload = request.payload
        assert payload is not None
        if request.index * self.itemsize != len(self._parts[matrix]):
            raise ContractError(f"{matrix.label} from {request.index}")
        if not payload or len(payload) % self.itemsize:
            raise ContractError(f"{len(payload)} bytes")
        self._check_turn(matrix)
        self._parts[matrix] += payload
        self.payload_sizes.append(len(payload))
        self.order.append(matrix.label)
        self._check_window()

    def responses(self) -> Iterator[bytes]:
        job, m = self.job, self._ended
        assert job is not None
        assert m is not None
        operands = {
            matrix: np.frombuffer(bytes(part), self.dtype).reshape(
                -1 if self._columns(matrix) else self._rows(matrix, m),
                self._columns(matrix),
            )
            for matrix, part in self._parts.items()
        }
        results = self._compute(operands)
        for first in range(0, m, self.block_rows):
            for matrix in (Matrix.Y, Matrix.DX):
                if matrix in results:
                    columns = self._columns(matrix)
                    rows = results[matrix][first : first + self.block_rows]
                    yield from self._blocks(job, matrix, rows, first * columns)
        if Matrix.DW in results:
            yield from self._blocks(job, Matrix.DW, results[Matrix.DW], 0)
        yield framing.encode_receipt(Receipt(job_id=job.job_id, m=m))

    @property
    def dtype(self) -> Any:
        assert self.job is not None
        return Dtype(self.job.dtype).numpy

    @property
    def itemsize(self) -> int:
        return int(self.dtype.itemsize)

    def _columns(self, matrix: Matrix) -> int:
        assert self.job is not None
        return matrix.row_length(self.job.n, self.job.k)

    def _rows(self, matrix: Matrix, m: int) -> int:
        assert self.job is not None
        return int(self.job.n) if matrix is Matrix.W else m

    def _check_turn(self, matrix: Matrix) -> None:
        if matrix is Matrix.W:
            if any(self._parts.get(m) for m in ROW_OPERANDS):
                raise ContractError("w after rows")
            return
        whole_w = self._columns(Matrix.W) * int(self.job.n) * self.itemsize  # type: ignore[union-attr]
        if Matrix.W in self._parts and len(self._parts[Matrix.W]) != whole_w:
            raise ContractError("rows before all of w")

    def _check_window(self) -> None:
        counts = []
        for matrix in ROW_OPERANDS:
            columns = self._columns(matrix)
            if matrix not in self._parts or not columns:
                return
            elements = len(self._parts[matrix]) // self.itemsize
            counts.append((elements // columns, -(-elements // columns)))
        (x_whole, x_begun), (dy_whole, dy_begun) = counts
        if max(x_begun - dy_whole, dy_begun - x_whole) > self.window_rows:
            raise ContractError(f"a lead: {counts}")

    def _end(self, m: int) -> None:
        assert self.job is not None
        if self.job.HasField("m") and self.job.m != m:
            raise ContractError(f"m is {self.job.m} and then {m}")
        for matrix, part in self._parts.items():
            rows = self._rows(matrix, m)
            if len(part) != rows * self._columns(matrix) * self.itemsize:
                raise ContractError(f"{len(part)} bytes of {matrix.label}")
        self._ended = m

    def _compute(self, operands: dict[Matrix, Any]) -> dict[Matrix, Any]:
        assert self.job is not None
        wide = {m: a.astype(np.float64) for m, a in operands.items()}
        results = {}
        for matrix in RESULTS:
            if not self.job.HasField(matrix.label):
                continue
            if matrix is Matrix.Y:
                result = wide[Matrix.X] @ wide[Matrix.W]
            elif matrix is Matrix.DX:
                result = wide[Matrix.DY] @ wide[Matrix.W].T
            else:
                result = wide[Matrix.X].T @ wide[Matrix.DY]
            wanted = getattr(self.job, matrix.label).dtype or self.job.dtype
            results[matrix] = result.astype(Dtype(wanted).numpy)
        return results

    def _blocks(self, job: Job, matrix: Matrix, rows: Any, index: int) -> Any:
        payload = np.ascontiguousarray(rows).tobytes()
        itemsize = rows.dtype.itemsize
        step = max(1, job.max_chunk_bytes // itemsize) * itemsize
        for at in range(0, len(payload), step):
            part = payload[at : at + step]
            yield framing.encode_chunk(matrix, index + at // itemsize, part)


def converse(
    exchange: Any, messages: Iterable[bytes], server: FakeServer
) -> list[bytes]:
    """Play a whole conversation; everything is answered at the end."""
    answers = server.open(exchange.opening())
    for answer in answers:
        exchange.receive(answer)
    for message in messages:
        server.take(message)
    return list(server.responses())
