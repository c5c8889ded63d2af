"""Anything at all on direct connections is answered: with results, or with an error.

A reference model, read off the contract alone, says which, for each connection.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import google_crc32c
import grpc
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from gradwire.v1 import job_pb2
from tests.contract.conftest import assert_untroubled
from tests.contract.stream_machine import REFUSALS, int64s, problems
from tests.support.direct_client import (
    CHECKPOINT,
    COMPLETE,
    ELEMENTS,
    DirectCall,
    frame,
    is_sent_operand,
)
from tests.support.raw import DTYPES, Problem, assert_exact, end, matrix_number
from tests.support.serving import running_server

MAX_PAYLOAD = 4 << 20
ANSWER_S = 10.0


class ShareModel:
    """What has come on one connection.

    Args:
        job: The effective job.
        block_rows: Rows of a block.
        connection: Number of the connection.
        connections: Number of connections.
    """

    def __init__(
        self, job: job_pb2.Job, block_rows: int, connection: int, connections: int
    ) -> None:
        self.job = job
        self.columns = {"x": job.n, "dy": job.k}
        names = [name for name in ("x", "dy") if is_sent_operand(job, name)]
        self.rows = {name: 0 for name in names if self.columns[name]}
        """Elements of the current block."""
        self.w: int | None = None
        if not connection and is_sent_operand(job, "w"):
            self.w = 0
        self.block = connection
        self.step = connections
        self.block_rows = block_rows
        self.wrong: set[str] = set()
        self.complete: int | None = None
        self.itemsize = DTYPES[
            {1: "float16", 2: "bfloat16", 3: "float32", 4: "float64"}[job.dtype]
        ].itemsize

    @property
    def w_missing(self) -> int:
        return 0 if self.w is None else self.job.n * self.job.k - self.w

    def first(self, name: str) -> int:
        """Index of the next element of an operand."""
        if name == "w":
            return self.w or 0
        return self.block * self.block_rows * self.columns[name] + self.rows[name]

    def due(self, name: str) -> int:
        """Elements that an operand's block, or W, still lacks."""
        if name == "w":
            return self.w_missing
        rows = self.block_rows
        if self.job.HasField("m"):
            rows = min(rows, max(self.job.m - self.block * rows, 0))
        return rows * self.columns[name] - self.rows[name]

    def elements(
        self, name: str, index: int, size: int, crc: int | None, right: int
    ) -> None:
        """A frame with elements comes."""
        if self.wrong or self.complete is not None:
            return
        if index < 0:
            self.wrong.add("MESSAGE_MALFORMED")
            return
        if name not in self.rows and not (name == "w" and self.w is not None):
            self.wrong.add("MATRIX_INVALID")
            return
        if not size or size % self.itemsize or size > MAX_PAYLOAD:
            self.wrong.add("PAYLOAD_INVALID")
        if (crc is not None) != bool(self.job.checksum):
            self.wrong.add("PAYLOAD_INVALID")
        elif crc is not None and crc != right:
            self.wrong.add("CHECKSUM_MISMATCH")
        if name != "w" and self.w_missing:
            self.wrong.add("ORDER_INVALID")
        if index != self.first(name):
            self.wrong.add("INDEX_INVALID")
        if size // self.itemsize > self.due(name):
            self.wrong.add("PAYLOAD_EXCESS")
        if self.wrong:
            return
        count = size // self.itemsize
        if name == "w":
            self.w = (self.w or 0) + count
            return
        self.rows[name] += count
        if not any(self.due(each) for each in self.rows):
            self.block += self.step
            self.rows = dict.fromkeys(self.rows, 0)

    def completes(self, m: int) -> None:
        """COMPLETE comes."""
        if self.wrong or self.complete is not None:
            return
        if m < 0:
            self.wrong.add("MESSAGE_MALFORMED")
            return
        if self.job.HasField("m") and m != self.job.m:
            self.wrong.add("M_MISMATCH")
        if self.w_missing:
            self.wrong.add("PAYLOAD_MISSING")
        rows = min(max(m - self.block * self.block_rows, 0), self.block_rows)
        for name, came in self.rows.items():
            if came < rows * self.columns[name]:
                self.wrong.add("PAYLOAD_MISSING")
            elif came > rows * self.columns[name]:
                self.wrong.add("M_MISMATCH")
        if not self.wrong:
            self.complete = m

    def malformed(self) -> None:
        """A frame comes that is none of a client's."""
        if not self.wrong and self.complete is None:
            self.wrong.add("MESSAGE_MALFORMED")


class AnyDirectStream(RuleBasedStateMachine):
    """Writes on the connections of a job."""

    channel: ClassVar[grpc.Channel]

    @initialize(
        problem=problems(),
        open_m=st.booleans(),
        checksum=st.booleans(),
        connections=st.integers(1, 3),
        behaves=st.sampled_from([True, False, False]),
    )
    def begin(self, problem, open_m, checksum, connections, behaves):
        self.problem: Problem = problem
        self.behaves = behaves
        self.call = DirectCall(
            self.channel,
            problem,
            connections=connections,
            timeout_s=ANSWER_S,
            open_m=open_m,
            checksum=int(checksum),
            job_id="any",
        )
        self.count = self.call.access.connections
        if not self.count:  # no row has an element
            self.call.__exit__()
            return
        self.call.attach()
        args = self.call.job, self.call.accepted.block_rows
        self.shares = [ShareModel(*args, i, self.count) for i in range(self.count)]
        self.ended: int | None = None
        self.extra: set[str] = set()
        self.foreign = False

    @property
    def going(self) -> bool:
        return hasattr(self, "shares") and bool(self.count)

    def _send(self, number: int, name: str, index: int, data: bytes, crc=...) -> None:
        right = google_crc32c.value(data)
        if crc is ...:
            crc = right if self.call.job.checksum else None
        self.shares[number].elements(name, index, len(data), crc, right)
        self.call.send(frame(ELEMENTS, name, index, data, crc=crc), number)

    def _next(self, number: int, most: int) -> bool:
        """Sends up to so many of the elements that are due on a connection."""
        share = self.shares[number]
        names = ["w"] if share.w_missing else [*share.rows]
        for name in names:
            at, operand = share.first(name), getattr(self.problem, name).reshape(-1)
            count = min(most, share.due(name), operand.size - at)
            if count > 0:
                self._send(number, name, at, operand[at : at + count].tobytes())
                return True
        return False

    def _complete(self, number: int) -> None:
        m = self.problem.shape[0]
        self.shares[number].completes(m)
        self.call.send(frame(COMPLETE, 0, m), number)

    def _end(self, m: int) -> None:
        if self.ended is not None:
            self.extra.add("MESSAGE_UNEXPECTED")
        elif m < 0:
            self.extra |= {"SHAPE_INVALID", "M_MISMATCH"}
        self.ended = m if self.ended is None else self.ended
        self.call.stream.send(end(m))

    # What a good client does.

    @precondition(lambda self: self.going)
    @rule(number=st.integers(0, 2), most=st.integers(1, 40))
    def send_what_is_due(self, number, most):
        self._next(number % self.count, most)

    @precondition(lambda self: not self.going)
    @rule()
    def send_nothing(self):
        pass

    # What a bad one does.

    @precondition(lambda self: self.going and not self.behaves)
    @rule(
        number=st.integers(0, 2),
        name=st.sampled_from(["x", "w", "dy", "dw"]),
        index=int64s,
        data=st.binary(max_size=24),
    )
    def send_any_elements(self, number, name, index, data):
        self.foreign = True
        self._send(number % self.count, name, index, data)

    @precondition(lambda self: self.going and not self.behaves)
    @rule(number=st.integers(0, 2), crc=st.none() | st.integers(0, 2**32 - 1))
    def send_any_checksum(self, number, crc):
        share = self.shares[number % self.count]
        names = ["w"] if share.w_missing else [*share.rows]
        data = bytes(share.itemsize)
        self.foreign = True
        self._send(number % self.count, names[0], share.first(names[0]), data, crc)

    @precondition(lambda self: self.going and not self.behaves)
    @rule(number=st.integers(0, 2), length=int64s)
    def send_any_length(self, number, length):
        """Without so many bytes: the header alone must be refused, or more is due."""
        share = self.shares[number % self.count]
        if share.wrong or share.complete is not None or 0 < length <= MAX_PAYLOAD:
            return
        if length < 0:
            share.malformed()
        else:
            share.wrong |= {"PAYLOAD_INVALID", "MATRIX_INVALID"}
        self.call.send(frame(ELEMENTS, "x", 0, length=length), number % self.count)

    @precondition(lambda self: self.going and not self.behaves)
    @rule(number=st.integers(0, 2), m=int64s)
    def complete_with_any_m(self, number, m):
        self.shares[number % self.count].completes(m)
        self.call.send(frame(COMPLETE, 0, m), number % self.count)

    @precondition(lambda self: self.going and not self.behaves)
    @rule(
        number=st.integers(0, 2),
        wrong=st.sampled_from(
            [
                frame(CHECKPOINT, 0, 8),
                frame(0),
                frame(200),
                frame(COMPLETE, 1),
                frame(COMPLETE, length=1),
                frame(ELEMENTS, "x", magic=b"GWDA"),
                frame(ELEMENTS, "x", version=0),
                frame(ELEMENTS, "x", zero=1),
                bytes(40),
            ]
        ),
    )
    def send_no_frame(self, number, wrong):
        self.shares[number % self.count].malformed()
        self.call.send(wrong, number % self.count)

    @precondition(lambda self: self.going and not self.behaves)
    @rule(number=st.integers(0, 2), size=st.integers(0, 31), down=st.booleans())
    def close_a_socket(self, number, size, down):
        number %= self.count
        self.extra.add("CONNECTION_LOST")
        if not down:
            self.call.send(frame(ELEMENTS, "x")[:size], number)
        (self.call.downs if down else self.call.ups)[number].close()
        for each in self.shares:
            each.wrong = each.wrong or set()

    @precondition(lambda self: self.going and not self.behaves)
    @rule(m=int64s)
    def end_with_any_m(self, m):
        self._end(m)

    def teardown(self):
        if not self.going:
            return
        with self.call:
            if self.behaves:
                self._finish()
            else:
                self._leave()

    def _finish(self) -> None:
        for number in range(self.count):
            while self._next(number, 50):
                pass
            self._complete(number)
        self._end(self.problem.shape[0])
        self.call.stream.half_close()
        assert not any(each.wrong for each in self.shares)
        assert_exact(self.call.results(), self.problem)

    def _leave(self) -> None:
        """Close everything: what was wrong before is told, or that it was closed."""
        self.call.stream.half_close()
        for sock in self.call.ups:
            sock.close()
        ms = {each.complete for each in self.shares} | {self.ended} - {None}
        ms |= {self.call.job.m} if self.call.job.HasField("m") else set()
        allowed = {"CONNECTION_LOST", "END_MISSING"} | self.extra
        for each in self.shares:
            allowed |= each.wrong
        if len(ms - {None}) > 1:
            allowed.add("M_MISMATCH")
        if all(each.complete is not None for each in self.shares):
            return  # it may have ended well
        failure = self.call.stream.failure()
        assert failure.reason in allowed, (failure, allowed)
        assert failure.status in REFUSALS | {grpc.StatusCode.UNAVAILABLE}
        assert failure.metadata["job_id"] == "any"


@pytest.fixture(scope="module")
def channel() -> Iterator[grpc.Channel]:
    with (
        running_server(row_block_bytes=256) as process,
        grpc.insecure_channel(process.address) as opened,
    ):
        yield opened
        assert_untroubled(process)


@pytest.mark.parametrize(
    "examples",
    [
        pytest.param(40, marks=pytest.mark.thorough),
        pytest.param(2000, marks=pytest.mark.big),
    ],
)
def test_connections_written_frame_by_frame(
    channel: grpc.Channel, examples: int
) -> None:
    assert matrix_number("x")
    AnyDirectStream.channel = channel
    run_state_machine_as_test(
        AnyDirectStream,
        settings=settings(
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
            max_examples=examples,
            stateful_step_count=12,
        ),
    )
