"""Any stream at all is answered: valid ones with results, others with an error.

A reference model says which is which. Nothing that a client can send makes
the server hang, fail unforeseen, or grow.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import grpc
import psutil
import pytest
from grpc import StatusCode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    run_state_machine_as_test,
)

from gradwire.v1 import job_pb2
from gradwire_server.admission.controller import CALL_BYTES
from tests.contract.conftest import assert_untroubled
from tests.contract.stream_machine import (
    GOOD_TIME_S,
    REFUSALS,
    AnyStream,
    assert_answered,
    int32s,
    int64s,
    opened,
    problems,
)
from tests.contract.stream_model import StreamModel
from tests.support.observing import CUDA_BYTES
from tests.support.raw import (
    DTYPES,
    INLINE,
    CallError,
    Stream,
    compute_job,
    result,
    stream_job,
    whole_numbers,
)
from tests.support.serving import ServerProcess, running_server

MAY_GROW_BYTES = 32 << 20
QUICK = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@contextlib.contextmanager
def serving(**settings: Any) -> Iterator[grpc.Channel]:
    """A server of small blocks, which must not grow nor fail unforeseen.

    What it holds must be given back as soon as a job has ended, whatever
    became of it: all of its memory goes to the largest job that it can have.
    """
    probe = whole_numbers(6, 6, 6).job(max_chunk_bytes=4 << 20)
    with running_server(row_block_bytes=256) as sizing, connected(sizing) as channel:
        reserved = reserved_by(channel, probe)
    with (
        running_server(
            row_block_bytes=256,
            memory_limit=reserved + CALL_BYTES,
            max_jobs=1,
            **settings,
        ) as process,
        connected(process) as channel,
    ):
        for _ in range(6):
            problem = whole_numbers(300, 6, 6)
            stream_job(channel, problem)
            compute_job(channel, problem)
        before = psutil.Process(process.pid).memory_info().rss
        yield channel
        wait_until_nothing_is_held(channel, probe)
        grown = psutil.Process(process.pid).memory_info().rss - before
        assert grown < MAY_GROW_BYTES + CUDA_BYTES
        assert_untroubled(process)


def connected(server: ServerProcess) -> grpc.Channel:
    return grpc.insecure_channel(server.address)


def reserved_by(channel: grpc.Channel, header: job_pb2.Job) -> int:
    """What a job reserves that need not wait."""
    with Stream(channel) as stream:
        stream.send(header)
        outcome = stream.receive_accepted()
        assert not outcome.queued
        return outcome.accepted.reserved_bytes


def wait_until_nothing_is_held(channel: grpc.Channel, largest: job_pb2.Job) -> None:
    """The end of a call is told a moment before its memory is free."""
    deadline = time.monotonic() + GOOD_TIME_S
    while True:
        try:
            reserved_by(channel, largest)
        except (CallError, AssertionError):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        else:
            return


@pytest.fixture(scope="module")
def channel() -> Iterator[grpc.Channel]:
    with serving() as opened:
        yield opened


@pytest.fixture(scope="module")
def slow_decoder() -> Iterator[grpc.Channel]:
    """To a server that reads all messages by the generated class."""
    with serving(slow_decoder=True) as opened:
        yield opened


@pytest.mark.thorough
def test_streams_written_message_by_message(channel, slow_decoder):
    AnyStream.channels = channel, slow_decoder
    run_state_machine_as_test(
        AnyStream, settings=settings(QUICK, max_examples=50, stateful_step_count=12)
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


@pytest.mark.thorough
@given(data=st.data(), problem=problems(), open_m=st.booleans())
@settings(QUICK, max_examples=60)
def test_good_streams_after_accidents(channel, slow_decoder, data, problem, open_m):
    header = problem.job(open_m=open_m, job_id="any")
    with contextlib.ExitStack() as stack:
        streams = [
            stack.enter_context(opened(each, header))
            for each in (channel, slow_decoder)
        ]
        assert streams[0].outcome is not None
        accepted = streams[0].outcome.accepted
        model = StreamModel(accepted)
        body = [
            message.SerializeToString()
            for message in problem.body(accepted.block_rows, 200)
        ]
        for message in data.draw(accidents(body)):
            model.apply(message)
            for stream in streams:
                stream.send(message)
        model.close()
        for stream in streams:
            stream.half_close()
        assert_answered(streams, model, problem)


@pytest.mark.thorough
@given(st.lists(st.binary(max_size=60), max_size=4))
@settings(QUICK, max_examples=60)
def test_streams_of_random_bytes(channel, slow_decoder, messages):
    failures = []
    for server in (channel, slow_decoder):
        with Stream(server, timeout_s=GOOD_TIME_S) as stream:
            stream.send(*messages)
            stream.half_close()
            failures.append(stream.failure())
    assert failures[0].status in REFUSALS
    assert failures[0].reason
    assert failures[0].text == failures[1].text


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
    max_chunk_bytes=st.just(0) | int64s,
    block_rows=st.integers(0, 62).map(lambda bit: 1 << bit) | int64s,
    required_features=st.lists(st.sampled_from(["checksum-crc32c", "", "x"])),
)


@given(header=headers, data=st.data())
@settings(QUICK, max_examples=80)
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
