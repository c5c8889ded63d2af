"""A client that writes a job's streams message by message, well or badly.

It says the same to two servers: one reads messages as servers do, the other
all of them by the generated class. Both have to answer what the model says,
and where nothing is left to chance they have to answer the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import google_crc32c
import grpc
import numpy as np
from grpc import StatusCode
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from gradwire.v1 import job_pb2, matrix_pb2
from tests.integration.contract.stream_model import JobModel, StreamModel
from tests.raw import (
    DTYPES,
    NEEDS,
    CallError,
    Outcome,
    Problem,
    Request,
    Stream,
    assert_exact,
    block,
    end,
    result_dtype,
    whole_numbers,
)

GOOD_TIME_S = 10.0
REFUSALS = {
    StatusCode.INVALID_ARGUMENT,
    StatusCode.UNIMPLEMENTED,
    StatusCode.DATA_LOSS,
}

int64s = st.one_of(
    st.integers(-2, 300),
    st.sampled_from([2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, -(2**63)]),
)
int32s = st.one_of(st.integers(-1, 8), st.integers(-(2**31), 2**31 - 1))


@st.composite
def problems(draw) -> Problem:
    sizes = (draw(st.integers(0, limit)) for limit in (60, 6, 6))
    wanted = draw(st.sets(st.sampled_from(list(NEEDS)), min_size=1))
    results = tuple(name for name in NEEDS if name in wanted)
    return whole_numbers(*sizes, draw(st.sampled_from(list(DTYPES))), results)


def join(token: str, connection: int) -> Request:
    return Request(join=job_pb2.Join(token=token, connection=connection))


class Calls:
    """The calls of a job at one server."""

    def __init__(self, channel: grpc.Channel, header: job_pb2.Job) -> None:
        self._stack = contextlib.ExitStack()
        self._channel = channel
        self.causes: set[tuple[Any, ...]] = set()
        """Why the job failed, once that is known."""
        first = self.open()
        first.send(header)
        self.accepted = first.receive_accepted().accepted
        self.streams: dict[int, Stream] = {0: first}
        self.unjoined: dict[int, CallError] = {}
        """Why connections could not join: the job had failed."""

    def open(self) -> Stream:
        stream = Stream(self._channel, timeout_s=GOOD_TIME_S)
        return self._stack.enter_context(stream)

    def join(self, number: int) -> None:
        stream = self.open()
        stream.send(join(self.accepted.join_token, number))
        try:
            answer = stream.receive()
        except CallError as failure:
            self.unjoined[number] = failure
            return
        assert answer is not None
        assert answer.WhichOneof("message") == "joined"
        self.streams[number] = stream

    def join_wrongly(self, token: str | None, number: int) -> CallError:
        """Without a token that of the job is given."""
        with Stream(self._channel, timeout_s=GOOD_TIME_S) as stream:
            given = self.accepted.join_token if token is None else token
            stream.send(join(given, number))
            return stream.failure()

    def send(self, number: int, message: bytes) -> None:
        if number in self.streams:
            self.streams[number].send(message)

    def half_close(self, number: int) -> None:
        if number in self.streams:
            self.streams[number].half_close()

    def failures(self, may_end_well: set[int]) -> dict[int, CallError]:
        """How calls failed: all but those that may have ended well before that."""
        failures = {}
        for number, stream in self.streams.items():
            try:
                while stream.receive() is not None:
                    pass
            except CallError as failure:
                failures[number] = failure
            else:
                assert number in may_end_well, number
        return failures

    def results(self) -> Outcome:
        """What all calls of a job that went well gave, put together."""
        parts: dict[str, dict[int, bytes]] = {}
        outcome = Outcome(self.accepted)
        for number, stream in self.streams.items():
            while (message := stream.receive()) is not None:
                if message.WhichOneof("message") == "receipt":
                    assert number == 0
                    outcome.receipt = message.receipt
                    continue
                name = matrix_pb2.Matrix.Name(message.block.matrix)[7:].lower()
                of = parts.setdefault(name, {})
                assert message.block.index not in of
                of[message.block.index] = message.block.data
        job, m = self.accepted.effective_job, outcome.receipt.m
        shapes = {"y": (m, job.k), "dx": (m, job.n), "dw": (job.n, job.k)}
        for name, shape in shapes.items():
            if job.HasField(name):
                data = b"".join(each for _, each in sorted(parts.get(name, {}).items()))
                elements = np.frombuffer(data, result_dtype(job, name))
                outcome.arrays[name] = elements.reshape(shape)
        return outcome

    def close(self) -> None:
        self._stack.close()


def assert_answered(
    servers: Sequence[Calls], model: JobModel, sent: Problem, *, left: int | None = None
) -> None:
    """The rest of the answers is what the model says.

    Args:
        servers: Where the same was said.
        model: What came of it.
        sent: What was meant to be sent.
        left: Which connection was cancelled, if one was.
    """
    for calls in servers:
        if model.wrong or left is not None:
            assert_failed(calls, model, left)
        else:
            outcome = calls.results()
            came = model.problem()
            assert outcome.receipt.m == came.shape[0]
            assert outcome.receipt.connections == model.job.connections
            if all(
                getattr(came, name).tobytes() == getattr(sent, name).tobytes()
                for name in came.operands
            ):
                assert_exact(outcome, came)


def assert_failed(calls: Calls, model: JobModel, left: int | None) -> None:
    """All calls of a job failed, with one cause.

    After End one that joined is over as soon as its own share is complete.
    """
    failures = calls.failures(
        set()
        if model.m is None
        else {
            stream.connection
            for stream in model.streams[1:]
            if not stream.wrong and stream.connection != left
        }
    )
    causes = {
        (failure.status, failure.reason, failure.text)
        for number, failure in failures.items()
        if number != left
    }
    calls.causes = causes
    assert len(causes) <= 1, causes
    for number, failure in failures.items():
        if number == left:
            # Its own side says so, if the job did not fail before that.
            assert failure.status is StatusCode.CANCELLED or failure.status in REFUSALS
            continue
        assert failure.metadata["job_id"] == model.job.job_id
        if left is not None and failure.reason == "JOB_CANCELLED":
            assert failure.status is StatusCode.CANCELLED
            continue
        assert failure.status in REFUSALS, failure
        assert failure.reason in model.wrong
    for failure in calls.unjoined.values():
        # It came to hear why the job failed, or when that was over.
        assert failure.reason in model.wrong | {"JOIN_UNKNOWN", "JOB_CANCELLED"}


class AnyStream(RuleBasedStateMachine):
    """Writes the streams of a job, over one connection or several."""

    channels: Sequence[grpc.Channel]
    """To the servers that are told the same."""
    connections: Sequence[int] = (1,)
    """Of which a job may have any."""

    @initialize(
        problem=problems(),
        open_m=st.booleans(),
        checksum=st.booleans(),
        behaves=st.sampled_from([True, False, False]),
        joins_late=st.sampled_from([True, False, False]),
        data=st.data(),
    )
    def begin(self, problem, open_m, checksum, behaves, joins_late, data):
        self.problem = problem
        self.behaves = behaves
        self.left: int | None = None
        self.last = b""
        header = problem.job(
            open_m=open_m,
            checksum=int(checksum),
            connections=data.draw(st.sampled_from(list(self.connections))),
            job_id="any",
        )
        self.servers = [Calls(channel, header) for channel in self.channels]
        accepted = self.servers[0].accepted
        self.model = JobModel(accepted)
        self.joined = {0}
        self.closed: set[int] = set()
        while not joins_late and len(self.joined) < self.model.job.connections:
            self._join()

    @property
    def open(self) -> list[int]:
        """Connections on which more can be said."""
        return sorted(self.joined - self.closed)

    def _stream(self, pick: int) -> tuple[int, StreamModel]:
        number = self.open[pick % len(self.open)]
        return number, self.model.streams[number]

    def _send(self, number: int, message: Request | bytes) -> None:
        if isinstance(message, Request):
            if self.model.job.checksum and message.HasField("block"):
                message.block.crc32c = google_crc32c.value(message.block.data)
            message = message.SerializeToString()
        self.last = message
        self.model.streams[number].apply(message)
        for calls in self.servers:
            calls.send(number, message)

    def _due(self, stream: StreamModel, name: str, elements: int) -> bytes:
        """Up to so many of the elements that are due, within one row block."""
        operand = getattr(self.problem, name)
        at = stream.next_index(name)
        if name != "w" and self.model.job.connections > 1 and operand.shape[1]:
            block_elements = stream.block_rows * operand.shape[1]
            elements = min(elements, block_elements - at % block_elements)
        return operand.reshape(-1)[at : at + elements].tobytes()

    def _send_next(self, number: int, name: str, elements: int, shift: int = 0) -> int:
        """Sends up to so many of the elements that are due."""
        stream = self.model.streams[number]
        at = stream.next_index(name) + shift
        data = self._due(stream, name, elements)
        if data and -(2**63) <= at < 2**63:
            self._send(number, block(name, at, data))
        return len(data)

    def _rows(self, stream: StreamModel) -> list[str]:
        return [
            name
            for name in ("x", "dy")
            if name in stream.received and stream.columns[name]
        ]

    def _behind(self, stream: StreamModel) -> str:
        """The row operand of which fewer complete rows were sent."""
        return min(
            self._rows(stream),
            key=lambda name: stream.count(name) // stream.columns[name],
        )

    def _half_close(self, number: int) -> None:
        self.closed.add(number)
        self.model.streams[number].close()
        for calls in self.servers:
            calls.half_close(number)

    def _join(self) -> None:
        number = len(self.joined)
        self.joined.add(number)
        for calls in self.servers:
            calls.join(number)

    # What a good client does.

    @precondition(lambda self: len(self.joined) < self.model.job.connections)
    @rule()
    def join_next(self):
        self._join()

    @precondition(lambda self: self.open)
    @rule(elements=st.integers(1, 40), pick=st.integers(0, 5))
    def send_what_is_due(self, elements, pick):
        number, stream = self._stream(pick)
        if "w" in stream.received and self._send_next(number, "w", elements):
            return
        if self._rows(stream):
            self._send_next(number, self._behind(stream), elements)

    @precondition(lambda self: self.open and not self.model.wrong)
    @rule()
    def complete(self):
        while len(self.joined) < self.model.job.connections:
            self._join()
        for number in self.open:
            stream = self.model.streams[number]
            if "w" in stream.received:
                while self._send_next(number, "w", 50):
                    pass
            for row in range(stream.rows_of(self.problem.shape[0])):
                for name in self._rows(stream):
                    due = (row + 1) * stream.columns[name] - stream.count(name)
                    while due > 0:
                        count = stream.count(name)
                        if not self._send_next(number, name, due):
                            break
                        if stream.wrong:
                            break
                        due -= stream.count(name) - count
            if not number and self.model.m is None:
                self._send(number, end(self.problem.shape[0]))
        for number in self.open:
            self._half_close(number)

    @precondition(lambda self: not self.open)
    @rule()
    def send_nothing_more(self):
        pass

    # What a bad one does.

    @precondition(lambda self: self.open and not self.behaves)
    @rule(pick=st.integers(0, 5))
    def half_close_early(self, pick):
        self._half_close(self._stream(pick)[0])

    @precondition(lambda self: self.open and not self.behaves)
    @rule(
        name=st.sampled_from(["x", "w", "dy"]),
        elements=st.integers(1, 100),
        pick=st.integers(0, 5),
    )
    def send_out_of_turn(self, name, elements, pick):
        number, stream = self._stream(pick)
        if name in stream.received:
            self._send_next(number, name, elements)

    @precondition(lambda self: self.open and not self.behaves)
    @rule(
        name=st.sampled_from(["x", "w", "dy"]),
        shift=int64s.filter(bool),
        elements=st.integers(1, 5),
        pick=st.integers(0, 5),
    )
    def send_from_elsewhere(self, name, shift, elements, pick):
        number, stream = self._stream(pick)
        if name in stream.received:
            self._send_next(number, name, elements, shift)

    @precondition(lambda self: self.open and not self.behaves)
    @rule(
        number=int32s,
        index=int64s,
        data=st.binary(max_size=24),
        pick=st.integers(0, 5),
    )
    def send_any_block(self, number, index, data, pick):
        self._send(self._stream(pick)[0], block(number, index, data))

    @precondition(lambda self: self.open and not self.behaves and self.last)
    @rule(pick=st.integers(0, 5))
    def repeat_the_last_message(self, pick):
        """On any connection: what belongs to one is often wrong on another."""
        self._send(self._stream(pick)[0], self.last)

    @precondition(lambda self: self.open and not self.behaves)
    @rule(m=int64s, pick=st.integers(0, 5))
    def end_with_any_m(self, m, pick):
        self._send(self._stream(pick)[0], end(m))

    @precondition(lambda self: self.open and not self.behaves)
    @rule(pick=st.integers(0, 5))
    def send_another_header(self, pick):
        self._send(self._stream(pick)[0], Request(job=self.problem.job()))

    @precondition(lambda self: self.open and not self.behaves)
    @rule(pick=st.integers(0, 5))
    def join_with_a_later_message(self, pick):
        self._send(self._stream(pick)[0], join("token", 1))

    @precondition(lambda self: self.open and not self.behaves)
    @rule(message=st.binary(max_size=30), pick=st.integers(0, 5))
    def send_random_bytes(self, message, pick):
        self._send(self._stream(pick)[0], message)

    # What strangers do, who cannot harm the job.

    @rule(
        token=st.sampled_from([None, "", "x"]) | st.text("abc", min_size=32),
        number=st.sampled_from([-1, 0, 99]) | st.integers(-(2**31), 2**31 - 1),
    )
    def join_with_what_is_no_token_or_no_place(self, token, number):
        free = range(len(self.joined), self.model.job.connections)
        if token is None and number in free:
            return  # that would be no mistake
        for calls in self.servers:
            failure = calls.join_wrongly(token, number)
            reasons = {"JOIN_UNKNOWN"}
            if token is None and calls.accepted.join_token:
                ended = self.model.wrong or self.left is not None or not self.open
                reasons = {"OPTION_INVALID"} | (reasons if ended else set())
            assert failure.reason in reasons, failure

    @precondition(
        lambda self: (
            1 < len(self.joined) == self.model.job.connections
            and self.model.m is None
            and self.left is None
            and not self.behaves
        )
    )
    @rule(pick=st.integers(0, 5))
    def leave(self, pick):
        """Cancels one of the calls, before the job can be complete."""
        self.left = sorted(self.joined)[pick % len(self.joined)]
        self.closed |= self.joined
        for calls in self.servers:
            if self.left in calls.streams:
                calls.streams[self.left].call.cancel()

    def teardown(self):
        if not hasattr(self, "model"):
            return
        try:
            if self.behaves and self.open:
                self.complete()
            else:
                while len(self.joined) < self.model.job.connections:
                    self._join()
            for number in self.open:
                self._half_close(number)
            self.model.finish()
            assert_answered(self.servers, self.model, self.problem, left=self.left)
            if self.model.job.connections == 1 and self.left is None:
                causes = [calls.causes for calls in self.servers]
                assert all(each == causes[0] for each in causes)
        finally:
            for calls in self.servers:
                calls.close()
