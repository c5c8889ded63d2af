"""A client that writes a job's stream message by message, well or badly.

It says the same to two servers: one reads messages as servers do, the other
all of them by the generated class. Both have to answer what the model says, and
the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import google_crc32c
import grpc
import numpy as np
from grpc import StatusCode
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from gradwire.v1 import job_pb2
from tests.contract.stream_model import StreamModel
from tests.support.raw import (
    DTYPES,
    NEEDS,
    Problem,
    Request,
    Stream,
    assert_exact,
    chunk,
    end,
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


def opened(channel: grpc.Channel, header: job_pb2.Job) -> Stream:
    """The stream of a job that was accepted."""
    stream = Stream(channel, timeout_s=GOOD_TIME_S)
    stream.send(header)
    stream.receive_accepted()
    return stream


def assert_answered(
    streams: Sequence[Stream], model: StreamModel, sent: Problem
) -> None:
    """The rest of the answers is what the model says.

    Args:
        streams: On which the same was said.
        model: What came of it.
        sent: What was meant to be sent.
    """
    causes = set()
    for stream in streams:
        assert stream.outcome is not None
        if model.wrong:
            failure = stream.failure()
            causes.add((failure.status, failure.reason, failure.text))
            assert failure.metadata["job_id"] == model.job.job_id
            assert failure.status in REFUSALS, failure
            assert failure.reason in model.wrong
            continue
        outcome = stream.receive_results(stream.outcome)
        came = model.problem()
        assert outcome.receipt.m == came.shape[0]
        if all(
            getattr(came, name).tobytes() == getattr(sent, name).tobytes()
            for name in came.operands
        ):
            assert_exact(outcome, came)
    assert len(causes) <= 1, causes


class AnyStream(RuleBasedStateMachine):
    """Writes the stream of a job."""

    channels: Sequence[grpc.Channel]
    """To the servers that are told the same."""

    @initialize(
        problem=problems(),
        open_m=st.booleans(),
        checksum=st.booleans(),
        segment_rows=st.sampled_from([0, 0, 1, 16, 1 << 62]),
        behaves=st.sampled_from([True, False, False]),
    )
    def begin(self, problem, open_m, checksum, segment_rows, behaves):
        header = problem.job(
            open_m=open_m,
            checksum=int(checksum),
            numerics=job_pb2.Numerics(dw_segment_rows=segment_rows),
            job_id="any",
        )
        self._begin(problem, [header] * len(self.channels), behaves)

    def _begin(
        self,
        problem: Problem,
        headers: Sequence[job_pb2.Job],
        behaves: bool,
        kept: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self.problem = problem
        self.behaves = behaves
        self.open = True
        self.last = b""
        self.stack = contextlib.ExitStack()
        self.streams = [
            self.stack.enter_context(opened(channel, header))
            for channel, header in zip(self.channels, headers, strict=True)
        ]
        outcome = self.streams[0].outcome
        assert outcome is not None
        self.model = StreamModel(outcome.accepted, kept)

    def _send(self, message: Request | bytes) -> None:
        if isinstance(message, Request):
            if self.model.job.checksum and message.HasField("chunk"):
                message.chunk.crc32c = google_crc32c.value(message.chunk.data)
            message = message.SerializeToString()
        self.last = message
        self.model.apply(message)
        for stream in self.streams:
            stream.send(message)

    def _send_next(self, name: str, elements: int, shift: int = 0) -> int:
        """Sends up to so many of the elements that are due."""
        at = self.model.count(name)
        operand = getattr(self.problem, name).reshape(-1)
        data = operand[at : at + elements].tobytes()
        if data and -(2**63) <= at + shift < 2**63:
            self._send(chunk(name, at + shift, data))
        return len(data)

    @property
    def _rows(self) -> list[str]:
        return [
            name
            for name in ("x", "dy")
            if name in self.model.received and self.model.columns[name]
        ]

    def _complete_rows(self, name: str) -> int:
        return self.model.count(name) // self.model.columns[name]

    def _half_close(self) -> None:
        self.open = False
        self.model.close()
        for stream in self.streams:
            stream.half_close()

    # What a good client does.

    @precondition(lambda self: self.open)
    @rule(elements=st.integers(1, 40))
    def send_what_is_due(self, elements):
        if "w" in self.model.received and self._send_next("w", elements):
            return
        if self._rows:
            self._send_next(min(self._rows, key=self._complete_rows), elements)

    @precondition(lambda self: self.open and not self.model.wrong)
    @rule()
    def complete(self):
        if "w" in self.model.received:
            while self._send_next("w", 50):
                pass
        for row in range(self.problem.shape[0]):
            for name in self._rows:
                due = (row + 1) * self.model.columns[name] - self.model.count(name)
                if due > 0:
                    self._send_next(name, due)
        if self.model.m is None:
            self._send(end(self.problem.shape[0]))
        self._half_close()

    @precondition(lambda self: not self.open)
    @rule()
    def send_nothing_more(self):
        pass

    # What a bad one does.

    @precondition(lambda self: self.open and not self.behaves)
    @rule()
    def half_close_early(self):
        self._half_close()

    @precondition(lambda self: self.open and not self.behaves)
    @rule(name=st.sampled_from(["x", "w", "dy"]), elements=st.integers(1, 100))
    def send_out_of_turn(self, name, elements):
        if name in self.model.received:
            self._send_next(name, elements)

    @precondition(lambda self: self.open and not self.behaves)
    @rule(
        name=st.sampled_from(["x", "w", "dy"]),
        shift=int64s.filter(bool),
        elements=st.integers(1, 5),
    )
    def send_from_elsewhere(self, name, shift, elements):
        if name in self.model.received:
            self._send_next(name, elements, shift)

    @precondition(lambda self: self.open and not self.behaves)
    @rule(number=int32s, index=int64s, data=st.binary(max_size=24))
    def send_any_block(self, number, index, data):
        self._send(chunk(number, index, data))

    @precondition(lambda self: self.open and not self.behaves and self.last)
    @rule()
    def repeat_the_last_message(self):
        self._send(self.last)

    @precondition(lambda self: self.open and not self.behaves)
    @rule(m=int64s)
    def end_with_any_m(self, m):
        self._send(end(m))

    @precondition(lambda self: self.open and not self.behaves)
    @rule()
    def send_another_header(self):
        self._send(Request(job=self.problem.job()))

    @precondition(lambda self: self.open and not self.behaves)
    @rule(message=st.binary(max_size=30))
    def send_random_bytes(self, message):
        self._send(message)

    def teardown(self):
        if not hasattr(self, "model"):
            return
        with self.stack:
            if self.open:
                if self.behaves:
                    self.complete()
                else:
                    self._half_close()
            assert_answered(self.streams, self.model, self.problem)
