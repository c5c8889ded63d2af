"""Tensors of sessions on direct connections, sent and received without the SDK."""

from __future__ import annotations

import hashlib
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from gradwire.v1 import session_service_pb2 as pb2
from tests.contract.conftest import assert_untroubled
from tests.support.direct_client import (
    CHECKPOINT,
    COMPLETE,
    ELEMENTS,
    closed,
    frame,
    receive_frame,
)
from tests.support.direct_tensors import DirectGet, DirectPut
from tests.support.metrics import scrape
from tests.support.observing import wait_until
from tests.support.oracle import same_bits
from tests.support.raw import DTYPES, CallError
from tests.support.serving import BACKEND, ServerProcess, running_server
from tests.support.sessions import (
    GRADIENT,
    MIB,
    RawSessions,
    chunks,
    header,
    refusal,
)

W = 1
IDLE_S = 1.0
ROWS, COLUMNS = 300, 7


def serving(backend: str) -> Iterator[ServerProcess]:
    with running_server(
        backend=backend, idle_timeout=IDLE_S, metrics_listen="0"
    ) as process:
        yield process
        assert_untroubled(process)


def opened(server: ServerProcess) -> Iterator[RawSessions]:
    with grpc.insecure_channel(server.address) as channel:
        session = RawSessions(channel).open(64 * MIB)
        yield session
        session.close()


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    yield from serving(BACKEND)


@pytest.fixture(scope="module")
def with_device() -> Iterator[ServerProcess]:
    """A server with tensors in a device's own memory."""
    yield from serving("simulated")


@pytest.fixture
def session(server: ServerProcess) -> Iterator[RawSessions]:
    yield from opened(server)


@pytest.fixture(
    params=["server", pytest.param("with_device", marks=pytest.mark.thorough)]
)
def any_session(request: pytest.FixtureRequest) -> Iterator[RawSessions]:
    yield from opened(request.getfixturevalue(request.param))


def numbers(rows: int = ROWS, dtype: str = "float32", seed: int = 0) -> np.ndarray:
    made = np.random.default_rng(seed).standard_normal((rows, COLUMNS), np.float32)
    return made.astype(DTYPES[dtype])


def put(session: RawSessions, array: np.ndarray, most: int = MIB, **fields: Any) -> Any:
    """Put an array on a direct connection; return the answer."""
    with DirectPut(session, W, array, **fields) as call:
        assert call.first.accepted
        return call.attach().send_all(most)


def get(session: RawSessions, **fields: Any) -> np.ndarray:
    with DirectGet(session, W, **fields) as call:
        array: np.ndarray = call.attach().frames()
        return array


@pytest.mark.parametrize(
    ("dtype", "checksum", "most"),
    [("float32", 0, MIB), ("bfloat16", 1, 6), ("float64", 1, 1000)],
)
def test_elements_are_those_that_were_sent(
    any_session: RawSessions, dtype: str, checksum: int, most: int
) -> None:
    session = any_session
    array = numbers(dtype=dtype)
    answer = put(session, array, most, checksum=checksum)
    assert answer.used_bytes == array.nbytes
    assert not answer.accepted
    assert same_bits(session.get(W), array)
    got = get(session, checksum=checksum, max_chunk_bytes=most)
    assert same_bits(got, array)


def test_a_tensor_may_be_larger_than_any_frame(any_session: RawSessions) -> None:
    """On a device, it passes a window of the host's memory in several pieces."""
    session = any_session
    array = numbers(350_000)
    put(session, array, most=3 * MIB + 4)
    with DirectGet(session, W) as call:
        assert same_bits(call.attach().frames(), array)
        assert call.most <= MIB
    assert same_bits(session.get(W), array)


def test_sockets_serve_call_after_call(session: RawSessions) -> None:
    array = numbers()
    with DirectPut(session, W, array, connections=5) as call:
        assert call.access.connections == 1
        call.attach().send_all()
        sockets = call.keep_sockets()
    for seed in range(2):
        with DirectGet(session, W) as reading:
            assert same_bits(reading.attach(sockets).frames(), array)
            reading.keep_sockets()
        array = numbers(seed=seed)
        with DirectPut(session, W, array) as call:
            call.attach(sockets).send_all()
            call.keep_sockets()
    for each in sockets:
        each.close()


def test_a_client_may_stay_with_messages(session: RawSessions) -> None:
    array = numbers()
    for attached in False, True:
        with DirectPut(session, W, array) as call:
            if attached:  # one of two sockets
                call.attach_one()
            for message in chunks(array, 4000):
                call.send(message)
            call.half_close()
            assert call.receive().used_bytes == array.nbytes
            assert call.receive() is None
            assert closed(call.sockets)
        with DirectGet(session, W) as reading:
            if attached:
                reading.attach_one()
            reading.half_close()
            assert same_bits(reading.chunks(), array)
            assert closed(reading.sockets)


def test_nothing_is_offered_where_nothing_is_to_move(session: RawSessions) -> None:
    zeros = np.zeros((ROWS, COLUMNS), np.float32)
    empty = np.empty((0, COLUMNS), np.float32)
    for array, fields in ((zeros, {"zeros": True, "role": GRADIENT}), (empty, {})):
        with DirectPut(session, W, array, **fields) as call:
            assert call.first.accepted
            assert call.access is None
            call.half_close()
            assert call.receive().used_bytes == array.nbytes
            assert call.receive() is None
        with DirectGet(session, W, connections=int(array is empty)) as reading:
            assert reading.access is None
            assert same_bits(reading.chunks(), array)
        session.drop(W)


@pytest.mark.thorough
def test_a_server_without_direct_connections_takes_messages() -> None:
    array = numbers()
    with (
        running_server(data_listen="off") as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        session = RawSessions(channel).open(MIB)
        with DirectPut(session, W, array) as call:
            assert call.first.accepted
            assert call.access is None
            for message in chunks(array):
                call.send(message)
            call.half_close()
            assert call.receive().used_bytes == array.nbytes
        with DirectGet(session, W) as reading:
            assert reading.access is None
            assert same_bits(reading.chunks(), array)


def test_a_gradient_without_contributions_is_zero(any_session: RawSessions) -> None:
    session = any_session
    session.zeros(W, (ROWS, COLUMNS))
    assert same_bits(get(session), np.zeros((ROWS, COLUMNS), np.float32))


def test_calls_count_as_direct(session: RawSessions, server: ServerProcess) -> None:
    def counted(name: str, method: str) -> float:
        metrics = scrape(server.metrics_url)
        return metrics.sum(name, method=method, transport="direct")

    array = numbers()
    before = [
        counted("received_bytes_total", "PutTensor"),
        counted("sent_bytes_total", "GetTensor"),
    ]
    put(session, array)
    get(session)
    wait_until(
        lambda: (
            counted("received_bytes_total", "PutTensor") - before[0] == array.nbytes
            and counted("sent_bytes_total", "GetTensor") - before[1] == array.nbytes
        ),
        "bytes of direct calls",
    )


ROW = COLUMNS * 4
SIZE = ROWS * ROW
ONE = frame(ELEMENTS, 0, 0, bytes(ROW))
ALL = frame(ELEMENTS, 0, 0, bytes(SIZE))


def case(name: str, sent: bytes, reason: str, field: str = "", **fields: Any) -> Any:
    return name, sent, reason, field, fields


WRONG = [
    case("no-frame", b"GWDX" + ONE[4:], "MESSAGE_MALFORMED"),
    case("a-checkpoint", frame(CHECKPOINT, 0, 1), "MESSAGE_MALFORMED"),
    case("matrix", frame(ELEMENTS, 1, 0, bytes(4)), "MATRIX_INVALID", "frame.matrix"),
    case(
        "half-an-element",
        frame(ELEMENTS, 0, 0, bytes(6)),
        "PAYLOAD_INVALID",
        "frame.length",
    ),
    case("no-element", frame(ELEMENTS, 0, 0), "PAYLOAD_INVALID", "frame.length"),
    case(
        "too-long",
        frame(ELEMENTS, 0, 0, length=4 * MIB + 4),
        "PAYLOAD_INVALID",
        "frame.length",
    ),
    case(
        "a-gap",
        ONE + frame(ELEMENTS, 0, COLUMNS + 1, bytes(4)),
        "INDEX_INVALID",
        "frame.index",
    ),
    case("again", ONE + ONE, "INDEX_INVALID", "frame.index"),
    case(
        "too-many",
        ALL + frame(ELEMENTS, 0, SIZE // 4, bytes(4)),
        "PAYLOAD_EXCESS",
        "frame.length",
    ),
    case(
        "too-few",
        ONE + frame(COMPLETE, 0, SIZE // 4),
        "PAYLOAD_MISSING",
        "frame.length",
    ),
    case(
        "another-number",
        ALL + frame(COMPLETE, 0, 3),
        "INDEX_INVALID",
        "frame.index",
    ),
    case(
        "unwanted-checksum",
        frame(ELEMENTS, 0, 0, bytes(4), crc=7),
        "PAYLOAD_INVALID",
        "frame.crc32c",
    ),
    case("no-checksum", ONE, "PAYLOAD_INVALID", "frame.crc32c", checksum=1),
    case(
        "wrong-checksum",
        frame(ELEMENTS, 0, 0, bytes(4), crc=7),
        "CHECKSUM_MISMATCH",
        "frame.crc32c",
        checksum=1,
    ),
]


def test_what_is_no_tensor_is_refused_and_changes_nothing(session: RawSessions) -> None:
    earlier = numbers(5)
    used = session.put(W, earlier)
    for name, sent, reason, field, fields in WRONG:
        with DirectPut(session, W, numbers(), **fields) as call:
            call.attach().up.sendall(sent)
            call.half_close()
            error = refusal(call.receive)
            found = error.reason, list(error.fields)
            assert found == (reason, [field] if field else []), name
            assert closed(call.sockets)
    assert session.used_bytes == used
    assert same_bits(session.get(W), earlier)
    put(session, numbers())


def test_elements_in_the_call_beside_the_connection_are_refused(
    session: RawSessions,
) -> None:
    array = numbers()
    with DirectPut(session, W, array) as call:
        call.attach()
        call.send(next(chunks(array)))
        assert refusal(call.receive).reason == "CONNECTION_LOST"
        assert closed(call.sockets)
    session.put(W, array)
    with DirectGet(session, W) as reading:
        reading.send(pb2.GetTensorRequest())
        assert refusal(reading.receive).reason == "MESSAGE_UNEXPECTED"


@pytest.mark.parametrize("sent", [20, 32 + 100])
def test_a_connection_that_breaks_ends_the_call_alone(
    any_session: RawSessions, sent: int
) -> None:
    session = any_session
    array = numbers()
    with DirectPut(session, W, array) as call:
        call.attach().up.sendall(next(call.frames())[:sent])
        call.up.shutdown(socket.SHUT_RDWR)
        assert refusal(call.receive).reason == "CONNECTION_LOST"
    assert not session.used_bytes
    put(session, array)
    large = numbers(700_000)
    session.put(2, large)
    with DirectGet(session, 2) as reading:
        reading.attach().half_close()
        receive_frame(reading.down)
        reading.down.close()
        assert refusal(reading.receive).reason == "CONNECTION_LOST"


def test_a_cancelled_call_gives_its_memory_back(any_session: RawSessions) -> None:
    session = any_session
    array = numbers(700_000)
    with DirectPut(session, W, array) as call:
        call.attach().up.sendall(next(call.frames())[: MIB // 2])
        assert session.used_bytes == array.nbytes
        call.call.cancel()
        assert closed(call.sockets)
    wait_until(lambda: not session.used_bytes, "memory of a cancelled put")
    session.put(W, array, role=GRADIENT)
    with DirectGet(session, W) as reading:
        reading.attach().half_close()
        reading.call.cancel()
        assert closed(reading.sockets)
    # The gradient was read alone.
    assert same_bits(session.get(W), array)


def idle(call: Any) -> tuple[str | None, float]:
    """The reason with which a call ends whose client does nothing, and when."""
    begun = time.monotonic()
    reason = refusal(call.receive).reason
    return reason, time.monotonic() - begun


@pytest.mark.thorough
def test_an_idle_client_is_not_waited_for(
    session: RawSessions, server: ServerProcess
) -> None:
    array, large = numbers(), numbers(1_200_000)
    session.put(2, large)
    calls: list[Callable[[], Any]] = [
        lambda: DirectPut(session, W, array),
        lambda: DirectPut(session, W, array).attach(),
        lambda: DirectGet(session, 2),
        lambda: DirectGet(session, 2).attach(),
    ]
    opened = [each() for each in calls]
    # Some of a frame, and then nothing; a call that reads, and then does not.
    opened[1].up.sendall(next(opened[1].frames())[:100])
    opened[3].half_close()
    for call in opened:
        reason, took_s = idle(call)
        assert reason == "CLIENT_IDLE"
        assert took_s < 3 * IDLE_S
        call.__exit__()
    assert session.used_bytes == large.nbytes


def test_a_refused_put_opens_nothing(session: RawSessions) -> None:
    with pytest.raises(CallError) as full:
        DirectPut(session, W, numbers(3_000_000))
    assert full.value.reason == "SESSION_FULL"
    with pytest.raises(CallError) as unknown:
        DirectGet(session, W)
    assert unknown.value.reason == "TENSOR_UNKNOWN"
    with pytest.raises(CallError) as other:
        DirectPut(session, W, numbers(), role=0)
    assert other.value.reason == "OPTION_INVALID"


def test_a_put_that_is_repeated_is_made_once(session: RawSessions) -> None:
    array, key = numbers(), secrets.token_bytes(16)
    with DirectPut(session, W, array, idempotency_key=key) as first:
        first.attach().up.sendall(next(first.frames())[:200])
        # The same put comes again, and its first call is given up.
        put(session, array, idempotency_key=key)
        assert refusal(first.receive).reason == "JOB_CANCELLED"
    # Again, without elements: the offer makes no other put of it.
    again = header(array, session=session.token, tensor=W, idempotency_key=key)
    question = pb2.PutTensorRequest(header=again)
    assert session.put_messages([question]).used_bytes == array.nbytes
    with DirectPut(session, W, array, idempotency_key=key) as made:
        assert not made.first.accepted
        assert made.first.used_bytes == array.nbytes
        made.half_close()
        assert made.receive() is None


def test_a_frozen_tensor_is_found_by_its_hash(
    session: RawSessions, server: ServerProcess
) -> None:
    array = numbers(seed=9)
    fields = {"frozen": True, "sha256": hashlib.sha256(array.tobytes()).digest()}
    put(session, array, most=1000, **fields)
    wrong = fields | {"sha256": bytes(32)}
    with DirectPut(session, W, array, **wrong) as call:
        call.attach()
        for each in call.frames():
            call.up.sendall(each)
        call.half_close()
        assert refusal(call.receive).reason == "CHECKSUM_MISMATCH"
    with grpc.insecure_channel(server.address) as channel:
        other = RawSessions(channel).open(MIB)
        question = header(array, session=other.token, tensor=5, **fields)
        other.put_messages([pb2.PutTensorRequest(header=question)])
        assert same_bits(other.get(5), array)
        other.close()
