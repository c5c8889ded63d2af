"""Any stream at all is answered: valid ones with results, others with an error.

A reference model says which is which. Nothing that a client can send makes
the server hang, fail unforeseen, or grow.
"""

from __future__ import annotations

from collections.abc import Iterator

import google_crc32c
import grpc
import psutil
import pytest
from grpc import StatusCode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from gradwire.v1 import job_pb2
from tests.integration.contract.conftest import assert_untroubled
from tests.integration.contract.stream_model import StreamModel
from tests.raw import (
    DTYPES,
    INLINE,
    NEEDS,
    CallError,
    Problem,
    Request,
    Stream,
    assert_exact,
    block,
    compute_job,
    end,
    result,
    stream_job,
    whole_numbers,
)
from tests.serving import ServerProcess, running_server

GOOD_TIME_S = 10.0
MAY_GROW_BYTES = 32 << 20
REFUSALS = {
    StatusCode.INVALID_ARGUMENT,
    StatusCode.UNIMPLEMENTED,
    StatusCode.DATA_LOSS,
}
QUICK = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)

int64s = st.one_of(
    st.integers(-2, 300),
    st.sampled_from([2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, -(2**63)]),
)
int32s = st.one_of(st.integers(-1, 8), st.integers(-(2**31), 2**31 - 1))


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    """A server of small blocks, which must not grow nor fail unforeseen."""
    with running_server(block_bytes=256) as process:
        with grpc.insecure_channel(process.address) as channel:
            for _ in range(20):
                problem = whole_numbers(300, 6, 6)
                stream_job(channel, problem)
                compute_job(channel, problem)
        before = psutil.Process(process.pid).memory_info().rss
        yield process
        assert psutil.Process(process.pid).memory_info().rss < before + MAY_GROW_BYTES
        assert_untroubled(process)


@pytest.fixture(scope="module")
def channel(server) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as opened:
        yield opened


@st.composite
def problems(draw) -> Problem:
    sizes = (draw(st.integers(0, limit)) for limit in (60, 6, 6))
    wanted = draw(st.sets(st.sampled_from(list(NEEDS)), min_size=1))
    results = tuple(name for name in NEEDS if name in wanted)
    return whole_numbers(*sizes, draw(st.sampled_from(list(DTYPES))), results)


def assert_answered(stream: Stream, model: StreamModel, sent: Problem) -> None:
    """The rest of the answer is what the model says."""
    assert stream.outcome is not None
    if model.wrong:
        failure = stream.failure()
        assert failure.status in REFUSALS, failure
        assert failure.reason in model.wrong
        assert failure.metadata["job_id"] == model.job.job_id
        return
    outcome = stream.receive_results(stream.outcome)
    came = model.problem()
    assert outcome.receipt.m == came.shape[0]
    if all(
        getattr(came, name).tobytes() == getattr(sent, name).tobytes()
        for name in came.operands
    ):
        assert_exact(outcome, came)


class AnyStream(RuleBasedStateMachine):
    """Writes a stream message by message, well or badly."""

    channel: grpc.Channel

    @initialize(
        problem=problems(),
        open_m=st.booleans(),
        checksum=st.booleans(),
        behaves=st.sampled_from([True, False, False]),
    )
    def begin(self, problem, open_m, checksum, behaves):
        self.problem = problem
        self.behaves = behaves
        self.closed = False
        self.last = b""
        self.stream = Stream(self.channel, timeout_s=GOOD_TIME_S)
        self.stream.send(problem.job(open_m=open_m, checksum=int(checksum)))
        accepted = self.stream.receive_accepted().accepted
        self.model = StreamModel(accepted.effective_job, accepted.window_rows)

    def _send(self, message: Request | bytes) -> None:
        if isinstance(message, Request):
            if self.model.job.checksum and message.HasField("block"):
                message.block.crc32c = google_crc32c.value(message.block.data)
            message = message.SerializeToString()
        self.last = message
        self.model.apply(message)
        self.stream.send(message)

    def _send_next(self, name: str, elements: int, shift: int = 0) -> int:
        """Sends up to so many of the elements that are due."""
        at = self.model.count(name)
        data = getattr(self.problem, name).reshape(-1)[at : at + elements]
        if data.size:
            self._send(block(name, at + shift, data.tobytes()))
        return data.size

    def _lead(self, name: str) -> str:
        """The row operand that is behind, if `name` has another beside it."""
        other = "dy" if name == "x" else "x"
        columns = self.model.columns
        if other not in self.model.received or not columns[other]:
            return name
        behind = self.model.count(other) // columns[other]
        return name if self.model.count(name) // columns[name] <= behind else other

    # What a good client does.

    @precondition(lambda self: not self.closed)
    @rule(elements=st.integers(1, 40))
    def send_what_is_due(self, elements):
        if "w" in self.model.received and self._send_next("w", elements):
            return
        for name in ("x", "dy"):
            if name in self.model.received and self.model.columns[name]:
                self._send_next(self._lead(name), elements)
                return

    @precondition(lambda self: not self.closed and not self.model.wrong)
    @rule()
    def complete(self):
        for name in self.model.received:
            if name == "w":
                while self._send_next("w", 50):
                    pass
        rows = [name for name in ("x", "dy") if name in self.model.received]
        for row in range(self.problem.shape[0]):
            for name in rows:
                columns = self.model.columns[name]
                self._send_next(name, (row + 1) * columns - self.model.count(name))
        self._send(end(self.problem.shape[0]))
        self.half_close_early()

    @precondition(lambda self: self.closed)
    @rule()
    def send_nothing_more(self):
        pass

    # What a bad one does.

    @precondition(lambda self: not self.closed and not self.behaves)
    @rule()
    def half_close_early(self):
        self.closed = True
        self.model.close()
        self.stream.half_close()

    @precondition(lambda self: not self.closed and not self.behaves)
    @rule(name=st.sampled_from(["x", "w", "dy"]), elements=st.integers(1, 100))
    def send_out_of_turn(self, name, elements):
        if name in self.model.received:
            self._send_next(name, elements)

    @precondition(lambda self: not self.closed and not self.behaves)
    @rule(
        name=st.sampled_from(["x", "w", "dy"]),
        shift=int64s.filter(bool),
        elements=st.integers(1, 5),
    )
    def send_from_elsewhere(self, name, shift, elements):
        if name in self.model.received and shift + self.model.count(name) < 2**63:
            self._send_next(name, elements, shift)

    @precondition(lambda self: not self.closed and not self.behaves)
    @rule(number=int32s, index=int64s, data=st.binary(max_size=24))
    def send_any_block(self, number, index, data):
        self._send(block(number, index, data))

    @precondition(lambda self: not self.closed and not self.behaves and self.last)
    @rule()
    def repeat_the_last_message(self):
        self._send(self.last)

    @precondition(lambda self: not self.closed and not self.behaves)
    @rule(m=int64s)
    def end_with_any_m(self, m):
        self._send(end(m))

    @precondition(lambda self: not self.closed and not self.behaves)
    @rule()
    def send_another_header(self):
        self._send(Request(job=self.problem.job()))

    @precondition(lambda self: not self.closed and not self.behaves)
    @rule(message=st.binary(max_size=30))
    def send_random_bytes(self, message):
        self._send(message)

    def teardown(self):
        if not hasattr(self, "model"):
            return
        with self.stream:
            if self.behaves and not self.closed:
                self.complete()
            elif not self.closed:
                self.half_close_early()
            assert_answered(self.stream, self.model, self.problem)


def test_streams_written_message_by_message(channel):
    AnyStream.channel = channel
    run_state_machine_as_test(
        AnyStream, settings=settings(QUICK, max_examples=300, stateful_step_count=12)
    )


@st.composite
def accidents(draw, messages: list[bytes]) -> list[bytes]:
    """The messages after one or two things went wrong."""
    messages = list(messages)
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(messages) - 1))
        match draw(st.sampled_from(["drop", "repeat", "swap", "cut", "flip", "join"])):
            case "drop" if len(messages) > 1:
                del messages[at]
            case "repeat":
                messages.insert(at, messages[at])
            case "swap":
                other = draw(st.integers(0, len(messages) - 1))
                messages[at], messages[other] = messages[other], messages[at]
            case "cut":
                size = draw(st.integers(0, len(messages[at])))
                messages[at] = messages[at][:size]
            case "flip" if messages[at]:
                changed = bytearray(messages[at])
                bit = draw(st.integers(0, 8 * min(len(changed), 24) - 1))
                changed[bit // 8] ^= 1 << bit % 8
                messages[at] = bytes(changed)
            case "join" if at + 1 < len(messages):
                # Protobuf merges them into one message.
                messages[at] += messages.pop(at + 1)
    return messages


@given(data=st.data(), problem=problems(), open_m=st.booleans())
@settings(QUICK, max_examples=200)
def test_good_streams_after_accidents(channel, data, problem, open_m):
    with Stream(channel, timeout_s=GOOD_TIME_S) as stream:
        stream.send(problem.job(open_m=open_m))
        accepted = stream.receive_accepted().accepted
        model = StreamModel(accepted.effective_job, accepted.window_rows)
        body = [
            message.SerializeToString()
            for message in problem.body(accepted.block_rows, 200)
        ]
        for message in data.draw(accidents(body)):
            model.apply(message)
            stream.send(message)
        model.close()
        stream.half_close()
        assert_answered(stream, model, problem)


@given(st.lists(st.binary(max_size=60), max_size=4))
@settings(QUICK, max_examples=100)
def test_streams_of_random_bytes(channel, messages):
    with Stream(channel, timeout_s=GOOD_TIME_S) as stream:
        stream.send(*messages)
        stream.half_close()
        failure = stream.failure()
    assert failure.status in REFUSALS
    assert failure.reason


operands = st.none() | st.just(INLINE) | st.just(job_pb2.Operand())
results = st.one_of(
    st.none(),
    st.builds(result, st.none() | st.sampled_from(list(DTYPES))),
    st.builds(job_pb2.Result, dtype=int32s),
)
headers = st.builds(
    job_pb2.Job,
    job_id=st.text(st.characters(exclude_categories=["Cs"]), max_size=140),
    m=st.none() | int64s,
    n=int64s,
    k=int64s,
    dtype=st.integers(1, 4) | int32s,
    x=operands,
    w=operands,
    dy=operands,
    y=results,
    dx=results,
    dw=results,
    numerics=st.none()
    | st.builds(
        job_pb2.Numerics,
        dw_accumulator=st.sampled_from([0, 3, 4]) | int32s,
        allow_tf32=st.booleans(),
    ),
    checksum=st.sampled_from([0, 1]) | int32s,
    max_block_bytes=st.just(0) | int64s,
    required_features=st.lists(st.sampled_from(["checksum-crc32c", "", "x"])),
)


@given(header=headers, data=st.data())
@settings(QUICK, max_examples=300)
def test_any_header_is_accepted_or_refused_for_a_reason(channel, header, data):
    good = whole_numbers(3, 2, 4).job()
    names = [field.name for field in good.DESCRIPTOR.fields]
    kept = data.draw(st.sets(st.sampled_from(names), max_size=3))
    job = job_pb2.Job()
    job.CopyFrom(good)
    for name in kept:
        job.ClearField(name)
    for name in set(names) - kept:
        header.ClearField(name)
    job.MergeFrom(header)
    with Stream(channel, timeout_s=GOOD_TIME_S) as stream:
        stream.send(job)
        try:
            accepted = stream.receive_accepted().accepted
        except CallError as error:
            assert error.status in REFUSALS | {StatusCode.RESOURCE_EXHAUSTED}, error  # noqa: PT017
            assert error.reason  # noqa: PT017
            return
    effective = accepted.effective_job
    assert (effective.n, effective.k) == (job.n, job.k)
    assert effective.HasField("m") == job.HasField("m")
    assert effective.dtype == job.dtype
    assert effective.checksum == job.checksum
    assert 0 < accepted.block_rows <= accepted.window_rows
    assert accepted.reserved_bytes > 0
