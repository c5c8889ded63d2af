"""Which request streams are valid: a reference, read off the contract alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import google_crc32c
import numpy as np
from google.protobuf.message import DecodeError

from gradwire.v1 import gradient_service_pb2 as service_pb2
from gradwire.v1 import job_pb2, matrix_pb2
from tests.support.raw import DTYPES, NEEDS, Problem, is_sent

MAX_PAYLOAD = 4 << 20
OPERAND_OF = {
    matrix_pb2.MATRIX_X: "x",
    matrix_pb2.MATRIX_W: "w",
    matrix_pb2.MATRIX_DY: "dy",
}


class StreamModel:
    """What has come of a job's stream after an accepted header.

    Args:
        accepted: What the server answered to it.
        kept: The operands that its session has.
    """

    def __init__(
        self,
        accepted: job_pb2.Accepted,
        kept: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self.kept = dict(kept or {})
        self.job = job = accepted.effective_job
        self.window_rows = accepted.window_rows
        self.dtype = DTYPES[matrix_pb2.Dtype.Name(job.dtype)[6:].lower()]
        self.columns = {"x": job.n, "w": job.k, "dy": job.k}
        self.received = {
            name: bytearray() for name in self.columns if is_sent(job, name)
        }
        self.wrong: set[str] = set()
        """Reasons for which the job may be refused; empty while it is valid."""
        self.m: int | None = None
        """Rows of the job, once End said so."""

    def count(self, name: str) -> int:
        """Elements of an operand that came."""
        return len(self.received[name]) // self.dtype.itemsize

    def apply(self, message: bytes) -> None:
        """A message comes; after a wrong one nothing counts."""
        if self.wrong:
            return
        try:
            request = service_pb2.ComputeStreamRequest.FromString(message)
        except DecodeError:
            self.wrong.add("MESSAGE_MALFORMED")
            return
        kind = request.WhichOneof("message")
        if kind is None:
            self.wrong.add("MESSAGE_MALFORMED")
        elif kind == "job" or self.m is not None:
            self.wrong.add("MESSAGE_UNEXPECTED")
        elif kind == "end":
            self._end(request.end.m)
        else:
            self._chunk(request.chunk)

    def close(self) -> None:
        """The client half-closes."""
        if not self.wrong and self.m is None:
            self.wrong.add("END_MISSING")

    def _rows(self, name: str) -> int | None:
        if name == "w":
            return self.job.n
        return self.job.m if self.job.HasField("m") else None

    def _end(self, m: int) -> None:
        if m < 0:
            self.wrong.add("SHAPE_INVALID")
        elif self.job.HasField("m") and m != self.job.m:
            self.wrong.add("M_MISMATCH")
        for name in self.received:
            rows = self.job.n if name == "w" else m
            due = rows * self.columns[name]
            if self.count(name) < due:
                self.wrong.add("PAYLOAD_MISSING")
            elif self.count(name) > due:
                self.wrong.add("M_MISMATCH")
        if not self.wrong:
            self.m = m

    def _chunk(self, chunk: matrix_pb2.Chunk) -> None:
        name = OPERAND_OF.get(chunk.matrix)
        if name is None:
            self.wrong.add("MATRIX_INVALID")
        elif name not in self.received:
            self.wrong.add("OPERAND_UNEXPECTED")
        elif not chunk.HasField("data"):
            self.wrong.add("OPTION_UNKNOWN")
            if chunk.index != self.count(name):
                self.wrong.add("INDEX_INVALID")
        else:
            self._elements(name, chunk)

    def _elements(self, name: str, chunk: matrix_pb2.Chunk) -> None:
        size, itemsize = len(chunk.data), self.dtype.itemsize
        wanted = self.job.checksum == matrix_pb2.CHECKSUM_CRC32C
        if chunk.index != self.count(name):
            self.wrong.add("INDEX_INVALID")
        if size % itemsize or size > MAX_PAYLOAD:
            self.wrong.add("PAYLOAD_INVALID")
        if chunk.HasField("crc32c") != wanted:
            self.wrong.add("PAYLOAD_INVALID")
        elif wanted and chunk.crc32c != google_crc32c.value(chunk.data):
            self.wrong.add("CHECKSUM_MISMATCH")
        rows, columns = self._rows(name), self.columns[name]
        elements = self.count(name) + size // itemsize
        if size and (not columns or (rows is not None and elements > rows * columns)):
            self.wrong.add("PAYLOAD_EXCESS")
        elif name != "w" and size >= itemsize:
            self._order(name, elements)
        if not self.wrong:
            self.received[name] += chunk.data

    def _order(self, name: str, elements: int) -> None:
        if "w" in self.received and self.count("w") < self.job.n * self.job.k:
            self.wrong.add("ORDER_INVALID")
        other = "dy" if name == "x" else "x"
        if other in self.received and self.columns[other]:
            begun = -(-elements // self.columns[name])
            if begun - self.count(other) // self.columns[other] > self.window_rows:
                self.wrong.add("LEAD_EXCEEDED")

    def problem(self) -> Problem:
        """The operands that came, of a complete job."""
        m, n, k = self.m or 0, self.job.n, self.job.k
        shapes = {"x": (m, n), "w": (n, k), "dy": (m, k)}
        arrays: dict[str, Any] = {
            name: np.zeros(shape, self.dtype) for name, shape in shapes.items()
        }
        for name, data in self.received.items():
            arrays[name] = np.frombuffer(bytes(data), self.dtype).reshape(shapes[name])
        arrays |= self.kept
        results = tuple(name for name in NEEDS if self.job.HasField(name))
        return Problem(**arrays, results=results)
