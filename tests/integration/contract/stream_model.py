"""Which request streams are valid: a reference, read off the contract alone."""

from __future__ import annotations

from typing import Any

import google_crc32c
import numpy as np
from google.protobuf.message import DecodeError

from gradwire.v1 import gradient_service_pb2 as service_pb2
from gradwire.v1 import job_pb2, matrix_pb2
from tests.raw import DTYPES, NEEDS, Problem

MAX_PAYLOAD = 4 << 20
OPERAND_OF = {
    matrix_pb2.MATRIX_X: "x",
    matrix_pb2.MATRIX_W: "w",
    matrix_pb2.MATRIX_DY: "dy",
}


class StreamModel:
    """What has come of one connection's stream after an accepted header.

    Args:
        accepted: What the server answered to it.
        connection: Which of the job's connections it is.
    """

    def __init__(self, accepted: job_pb2.Accepted, connection: int = 0) -> None:
        self.job = job = accepted.effective_job
        self.window_rows = accepted.window_rows
        self.block_rows = accepted.block_rows
        self.connection = connection
        self.dtype = DTYPES[matrix_pb2.Dtype.Name(job.dtype)[6:].lower()]
        self.columns = {"x": job.n, "w": job.k, "dy": job.k}
        self.received = {
            name: bytearray()
            for name in self.columns
            if job.HasField(name) and not (name == "w" and connection)
        }
        self.wrong: set[str] = set()
        """Reasons for which the stream may be refused; empty while valid."""
        self.m: int | None = None
        self.closed = False

    def count(self, name: str) -> int:
        """Elements of an operand that came."""
        return len(self.received[name]) // self.dtype.itemsize

    def row(self, number: int) -> int:
        """Which row of the job is the connection's `number`-th."""
        block, within = divmod(number, self.block_rows)
        block = block * self.job.connections + self.connection
        return block * self.block_rows + within

    def next_index(self, name: str) -> int:
        """Index of the element of an operand that is due."""
        if name == "w" or not self.columns[name]:
            return self.count(name)
        number, within = divmod(self.count(name), self.columns[name])
        return self.row(number) * self.columns[name] + within

    def rows_of(self, m: int) -> int:
        """How many of a job's m rows are the connection's."""
        turns, rest = divmod(m, self.block_rows * self.job.connections)
        last = rest - self.connection * self.block_rows
        return turns * self.block_rows + min(max(last, 0), self.block_rows)

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
        elif (
            kind in {"job", "join"}
            or self.m is not None
            or (kind == "end" and self.connection)
        ):
            self.wrong.add("MESSAGE_UNEXPECTED")
        elif kind == "end":
            self.end(request.end.m)
        else:
            self._block(request.block)

    def close(self) -> None:
        """The client half-closes; a joined connection has no End of its own.

        Its share is known before End comes if the header says m.
        """
        if self.wrong or self.m is not None:
            return
        self.closed = True
        if not self.connection:
            self.wrong.add("END_MISSING")
        elif self.job.HasField("m"):
            self.end(self.job.m)
        elif any(
            self.count(each) != self._rows_complete * self.columns[each]
            for each in self._rows_came
        ):
            self.wrong.add("PAYLOAD_MISSING")

    @property
    def _rows_came(self) -> list[str]:
        """Operands whose elements say how many rows came."""
        return [each for each in self.received if each != "w" and self.columns[each]]

    @property
    def _rows_complete(self) -> int:
        return min(
            (self.count(each) // self.columns[each] for each in self._rows_came),
            default=0,
        )

    @property
    def least_m(self) -> int:
        """Rows that the job has at least, by the elements that came."""
        return max(
            (
                self.row((self.count(each) - 1) // self.columns[each]) + 1
                for each in self._rows_came
                if self.count(each)
            ),
            default=0,
        )

    @property
    def most_m(self) -> int | None:
        """Rows that the job has at most, because the stream brought no more."""
        if not (self.closed and self.connection and self._rows_came):
            return None
        return self.row(self._rows_complete)

    def _rows(self, name: str) -> int | None:
        if name == "w":
            return self.job.n
        return self.rows_of(self.job.m) if self.job.HasField("m") else None

    def end(self, m: int) -> None:
        """The job is complete, and has m rows."""
        if m < 0:
            self.wrong.add("SHAPE_INVALID")
        elif self.job.HasField("m") and m != self.job.m:
            self.wrong.add("M_MISMATCH")
        for name in self.received:
            rows = self.job.n if name == "w" else self.rows_of(m)
            due = rows * self.columns[name]
            if self.count(name) < due:
                self.wrong.add("PAYLOAD_MISSING")
            elif self.count(name) > due:
                self.wrong.add("M_MISMATCH")
        if not self.wrong:
            self.m = m

    def _block(self, block: matrix_pb2.Block) -> None:
        name = OPERAND_OF.get(block.matrix)
        if name is None:
            self.wrong.add("MATRIX_INVALID")
        elif name == "w" and self.connection:
            self.wrong.add("ORDER_INVALID")
        elif name not in self.received:
            self.wrong.add("OPERAND_UNEXPECTED")
        elif not block.HasField("data"):
            self.wrong.add("OPTION_UNKNOWN")
            if block.index != self.next_index(name):
                self.wrong.add("INDEX_INVALID")
        else:
            self._elements(name, block)

    def _elements(self, name: str, block: matrix_pb2.Block) -> None:
        size, itemsize = len(block.data), self.dtype.itemsize
        wanted = self.job.checksum == matrix_pb2.CHECKSUM_CRC32C
        if block.index != self.next_index(name):
            self.wrong.add("INDEX_INVALID")
        if size % itemsize or size > MAX_PAYLOAD:
            self.wrong.add("PAYLOAD_INVALID")
        if block.HasField("crc32c") != wanted:
            self.wrong.add("PAYLOAD_INVALID")
        elif wanted and block.crc32c != google_crc32c.value(block.data):
            self.wrong.add("CHECKSUM_MISMATCH")
        rows, columns = self._rows(name), self.columns[name]
        elements = self.count(name) + size // itemsize
        if (
            size and (not columns or (rows is not None and elements > rows * columns))
        ) or (name != "w" and self._leaves_its_block(name, size // itemsize)):
            self.wrong.add("PAYLOAD_EXCESS")
        elif name != "w" and size >= itemsize:
            self._order(name, elements)
        if not self.wrong:
            self.received[name] += block.data

    def _leaves_its_block(self, name: str, elements: int) -> bool:
        """Whether a message goes on in a row block of another connection."""
        if self.job.connections == 1 or not elements:
            return False
        block_elements = self.block_rows * self.columns[name]
        return self.count(name) % block_elements + elements > block_elements

    def _order(self, name: str, elements: int) -> None:
        if "w" in self.received and self.count("w") < self.job.n * self.job.k:
            self.wrong.add("ORDER_INVALID")
        other = "dy" if name == "x" else "x"
        if other in self.received and self.columns[other]:
            begun = -(-elements // self.columns[name])
            if begun - self.count(other) // self.columns[other] > self.window_rows:
                self.wrong.add("LEAD_EXCEEDED")


class JobModel:
    """What has come of a job over all of its connections.

    What is wrong on one of them fails the job on all. Messages of different
    connections are not ordered, so where several are wrong any of their
    reasons may be the job's.
    """

    def __init__(self, accepted: job_pb2.Accepted) -> None:
        self.job = accepted.effective_job
        connections = range(self.job.connections)
        self.streams = [StreamModel(accepted, each) for each in connections]

    @property
    def wrong(self) -> set[str]:
        """Reasons for which the job may be refused; empty while it is valid."""
        wrong = set[str]().union(*(stream.wrong for stream in self.streams))
        least = max(stream.least_m for stream in self.streams)
        if self.m is not None and least > self.m:
            wrong.add("M_MISMATCH")
        if any(
            stream.most_m is not None and least > stream.most_m
            for stream in self.streams
        ):
            wrong.add("PAYLOAD_MISSING")
        return wrong

    @property
    def m(self) -> int | None:
        """Rows of the job, once End said so."""
        return self.streams[0].m

    def finish(self) -> None:
        """Every connection has been half-closed."""
        for stream in self.streams[1:]:
            if self.m is not None and not stream.wrong:
                stream.end(self.m)

    def problem(self) -> Problem:
        """The operands that came, of a complete job."""
        m, n, k = self.m or 0, self.job.n, self.job.k
        shapes = {"x": (m, n), "w": (n, k), "dy": (m, k)}
        dtype = self.streams[0].dtype
        arrays: dict[str, Any] = {
            name: np.zeros(shape, dtype) for name, shape in shapes.items()
        }
        for stream in self.streams:
            for name, data in stream.received.items():
                rows = np.frombuffer(bytes(data), dtype).reshape(
                    -1, max(stream.columns[name], 1)
                )
                for number, row in enumerate(rows):
                    at = number if name == "w" else stream.row(number)
                    arrays[name][at] = row
        results = tuple(name for name in NEEDS if self.job.HasField(name))
        return Problem(**arrays, results=results)
