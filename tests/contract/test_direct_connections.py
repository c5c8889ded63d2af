"""What a client on direct connections may send, and what becomes of everything else.

The client is written by hand, over sockets. Nothing that it does may make the server
hang, fail unforeseen, or harm another job.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import grpc
import numpy as np
import pytest
from grpc import StatusCode

from gradwire.v1 import job_pb2
from tests.contract.conftest import assert_untroubled
from tests.support.direct_client import (
    ATTACHED,
    CHECKPOINT,
    COMPLETE,
    DOWN,
    ELEMENTS,
    UP,
    DirectCall,
    Frame,
    attach,
    closed,
    connect,
    direct_job,
    frame,
    receive,
    receive_frame,
)
from tests.support.observing import descriptors, wait_until
from tests.support.raw import (
    Problem,
    assert_exact,
    chunk,
    end,
    normal_numbers,
    stream_job,
    whole_numbers,
)
from tests.support.serving import ServerProcess, running_server

IDLE_S = 1.0
SIZES = 37, 5, 4
ROWS = 8
"""Rows of a block of that size: five of them, the last short."""
X_ROW, DY_ROW = 5 * 4, 4 * 4
INVALID = StatusCode.INVALID_ARGUMENT


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    """One with short patience."""
    with running_server(row_block_bytes=1 << 16, idle_timeout=IDLE_S) as process:
        yield process
        assert_untroubled(process)


@pytest.fixture(scope="module")
def channel(server: ServerProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as opened:
        yield opened


@pytest.fixture
def good() -> Problem:
    return whole_numbers(*SIZES)


def call_of(channel: grpc.Channel, problem: Problem, **options: Any) -> DirectCall:
    """A call of a job with several row blocks."""
    return DirectCall(channel, problem, **({"block_rows": ROWS} | options))


def assert_serves(channel: grpc.Channel) -> None:
    """The server computes the next job right."""
    problem = whole_numbers(*SIZES)
    assert_exact(direct_job(channel, problem, block_rows=ROWS), problem)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("results", [("y", "dx", "dw"), ("db",), ("y",), ("dw",)])
def test_the_bits_are_those_of_messages(
    channel: grpc.Channel, dtype: str, results: tuple[str, ...]
) -> None:
    normal = normal_numbers(*SIZES, dtype)
    problem = Problem(normal.x, normal.w, normal.dy, results)
    expected = stream_job(channel, problem, block_rows=ROWS).bits
    for connections, most, checksum in ((1, 1 << 20, 0), (3, 24, 1), (2, 100, 1)):
        outcome = direct_job(
            channel,
            problem,
            connections=connections,
            most=most,
            checksum=checksum,
            block_rows=ROWS,
        )
        assert outcome.receipt.blocks == 5
        assert outcome.bits == expected
        assert outcome.receipt.transport == "direct"


W0 = frame(ELEMENTS, "w", 0, bytes(5 * 4 * 4))
X0 = frame(ELEMENTS, "x", 0, bytes(ROWS * X_ROW))
DY0 = frame(ELEMENTS, "dy", 0, bytes(ROWS * DY_ROW))


def case(name: str, sent: Any, reason: str, field: str, *says: str) -> Any:
    return pytest.param(sent, reason, field, says, id=name)


WRONG = [
    case("no-frame", b"GWDG" + W0[4:], "MESSAGE_MALFORMED", "", "GWDG"),
    case("attach-again", attach(UP, 0, bytes(32)), "MESSAGE_MALFORMED", "", "GWDA"),
    case(
        "version",
        frame(ELEMENTS, "w", 0, bytes(4), version=2),
        "MESSAGE_MALFORMED",
        "",
        "version 2",
    ),
    case("kind", frame(9), "MESSAGE_MALFORMED", "", "kind 9"),
    case("a-checkpoint", frame(CHECKPOINT, 0, 8), "MESSAGE_MALFORMED", "", "kind 3"),
    case("unused", frame(COMPLETE, zero=1), "MESSAGE_MALFORMED", "", "unused"),
    case(
        "complete-with-length",
        frame(COMPLETE, 0, 37, length=4),
        "MESSAGE_MALFORMED",
        "",
        "length 4",
    ),
    case("index-negative", frame(ELEMENTS, "w", -1, bytes(4)), "MESSAGE_MALFORMED", ""),
    case("length-negative", frame(ELEMENTS, "w", length=-8), "MESSAGE_MALFORMED", ""),
    case(
        "matrix-unknown",
        frame(ELEMENTS, 99, 0, bytes(4)),
        "MATRIX_INVALID",
        "frame.matrix",
        "99",
        "X (1)",
    ),
    case(
        "a-result",
        frame(ELEMENTS, "dw", 0, bytes(4)),
        "MATRIX_INVALID",
        "frame.matrix",
    ),
    case("order", X0, "ORDER_INVALID", "frame.matrix", "w is not complete"),
    case(
        "w-elsewhere",
        frame(ELEMENTS, "w", 4, bytes(4)),
        "INDEX_INVALID",
        "frame.index",
        "index is 4",
        "is 0",
    ),
    case(
        "row-elsewhere",
        W0 + X0 + frame(ELEMENTS, "x", 80, bytes(4)),
        "INDEX_INVALID",
        "frame.index",
    ),
    case("twice", W0 + DY0 + DY0, "INDEX_INVALID", "frame.index", "next element of dy"),
    case(
        "too-long",
        W0 + frame(ELEMENTS, "x", 0, bytes((ROWS + 1) * X_ROW)),
        "PAYLOAD_EXCESS",
        "frame.length",
        "its row block ends at 40",
    ),
    case(
        "w-too-long",
        frame(ELEMENTS, "w", 0, bytes(84)),
        "PAYLOAD_EXCESS",
        "frame.length",
    ),
    case(
        "half-an-element",
        frame(ELEMENTS, "w", 0, bytes(6)),
        "PAYLOAD_INVALID",
        "frame.length",
        "multiple of 4",
    ),
    case("no-element", frame(ELEMENTS, "w", 0), "PAYLOAD_INVALID", "frame.length", "0"),
    case(
        "longer-than-any",
        frame(ELEMENTS, "w", 0, length=(4 << 20) + 4),
        "PAYLOAD_INVALID",
        "frame.length",
        str(4 << 20),
    ),
    case(
        "as-long-as-can-be",
        frame(ELEMENTS, "w", 0, length=(1 << 63) - 4),
        "PAYLOAD_INVALID",
        "frame.length",
    ),
    case(
        "a-checksum",
        frame(ELEMENTS, "w", 0, bytes(4), crc=0),
        "PAYLOAD_INVALID",
        "frame.crc32c",
        "no checksums",
    ),
    case(
        "complete-at-once",
        frame(COMPLETE, 0, 37),
        "PAYLOAD_MISSING",
        "frame.index",
        "w up to element 0: expected 20",
    ),
    case(
        "complete-early",
        W0 + X0 + frame(COMPLETE, 0, 37),
        "PAYLOAD_MISSING",
        "frame.index",
        "dy up to element 0: expected 32",
    ),
    case(
        "m",
        W0 + frame(COMPLETE, 0, 36),
        "M_MISMATCH",
        "frame.index",
        "36",
        "37",
    ),
    case("chunk", chunk("w", 0, bytes(80)), "CONNECTION_LOST", "", "in the call"),
    case("end-m", end(36), "M_MISMATCH", "end.m", "36", "37"),
    case("a-job", whole_numbers(1, 1, 1).job(), "MESSAGE_UNEXPECTED", "", "end"),
    case("no-message", b"\xff\xff", "MESSAGE_MALFORMED", ""),
]


@pytest.mark.parametrize(("sent", "reason", "field", "says"), WRONG)
def test_what_is_wrong_is_told_and_the_server_goes_on(
    channel: grpc.Channel,
    good: Problem,
    sent: Any,
    reason: str,
    field: str,
    says: tuple[str, ...],
) -> None:
    with call_of(channel, good, job_id="wrong") as call:
        call.attach()
        if isinstance(sent, bytes) and sent != b"\xff\xff":
            call.send(sent)
        else:
            call.stream.send(sent)
        began = time.monotonic()
        failure = call.stream.failure()
        assert time.monotonic() - began < IDLE_S
        assert failure.reason == reason, failure
        assert failure.metadata["job_id"] == "wrong"
        assert set(failure.fields) == ({field} if field else set()), failure
        for each in says:
            assert each in failure.text
        assert closed(call.downs)
    assert_serves(channel)


@pytest.mark.parametrize("crc", [None, 1])
def test_a_checksum_is_asked_for_and_checked(
    channel: grpc.Channel, good: Problem, crc: int | None
) -> None:
    with call_of(channel, good, checksum=1) as call:
        call.attach().send(frame(ELEMENTS, "w", 0, bytes(80), crc=crc))
        failure = call.stream.failure()
    assert failure.reason == ("PAYLOAD_INVALID" if crc is None else "CHECKSUM_MISMATCH")
    assert "frame.crc32c" in failure.fields


def test_connections_must_agree_on_m(channel: grpc.Channel, good: Problem) -> None:
    with call_of(channel, good, open_m=True) as call:
        call.attach()
        shares = [list(call.frames(number)) for number in range(2)]
        for number, share in enumerate(shares):
            for each in share[:-1]:
                call.send(each, number)
        call.send(frame(COMPLETE, 0, 37), 0)
        call.send(frame(COMPLETE, 0, 32), 1)
        assert call.stream.failure().reason == "M_MISMATCH"


def test_end_may_come_before_the_elements(channel: grpc.Channel, good: Problem) -> None:
    with call_of(channel, good) as call:
        call.attach()
        call.stream.send(end(37))
        call.stream.half_close()
        for number in range(2):
            for each in call.frames(number):
                call.send(each, number)
        assert_exact(call.results(), good)


def test_a_connection_carries_its_own_row_blocks_in_any_turn(
    channel: grpc.Channel, good: Problem
) -> None:
    with call_of(channel, good, connections=3) as call:
        call.attach()
        for number in (2, 1, 0):  # the last first
            for each in call.frames(number, most=12):
                call.send(each, number)
        call.stream.send(end(37))
        call.stream.half_close()
        assert_exact(call.results(), good)


# Who may attach.


def refused(port: int, data: bytes) -> bool:
    """Whether a socket that begins so is closed without an answer."""
    with connect(port) as sock:
        sock.sendall(data)
        try:
            receive(sock, len(ATTACHED))
        except EOFError as ended:
            return ended.args == (0,)
        return False


def test_a_token_is_good_for_each_socket_of_its_call_once(
    channel: grpc.Channel, good: Problem
) -> None:
    with call_of(channel, good, connections=1) as call:
        token, port = call.access.token, call.port
        wrong = bytes([token[0] ^ 1]) + token[1:]
        assert refused(port, attach(UP, 0, wrong))
        assert refused(port, attach(UP, 1, token))  # there is no such connection
        assert refused(port, attach(3, 0, token))
        assert refused(port, b"GET / HTTP/1.1\r\nHost: 127.0.0.1:50052\r\n\r\n")
        up = call.attach_one(UP, 0)
        assert refused(port, attach(UP, 0, token))
        down = call.attach_one(DOWN, 0)
        assert refused(port, attach(DOWN, 0, token))
        call.ups, call.downs = [up], [down]
        call.send_all()
        assert_exact(call.results(), good)
        assert refused(port, attach(UP, 0, token))  # too late


def test_a_token_ends_with_its_call_and_with_the_choice_of_messages(
    channel: grpc.Channel, good: Problem
) -> None:
    with call_of(channel, good, connections=1) as call:
        up = call.attach_one(UP, 0)
        call.stream.send_all(good.body(1))  # in the call, rather
        call.stream.half_close()
        outcome = call.stream.receive_results(call.outcome)
        assert_exact(outcome, good)
        assert outcome.receipt.transport == "tcp"
        assert closed([up])
        assert refused(call.port, attach(DOWN, 0, call.access.token))
    with call_of(channel, good, connections=1) as call:
        up = call.attach_one(UP, 0)
        call.stream.call.cancel()
        assert closed([up])
        assert refused(call.port, attach(DOWN, 0, call.access.token))


def test_sockets_are_used_again_by_the_next_call(
    channel: grpc.Channel, good: Problem
) -> None:
    with call_of(channel, good) as first, call_of(channel, good) as second:
        first.attach().send_all()
        assert_exact(first.results(), good)
        second.ups, second.downs = first.ups, first.downs
        for number in range(2):
            second.ups[number].sendall(attach(UP, number, second.access.token))
            second.downs[number].sendall(attach(DOWN, number, second.access.token))
        second.send_all()
        for each in (*second.ups, *second.downs):
            assert receive(each, len(ATTACHED)) == ATTACHED
        assert_exact(second.results(), good)


# Clients that do not go on.


def until_idle(call: DirectCall) -> float:
    """How long the server waits for the client, which it then says."""
    began = time.monotonic()
    failure = call.stream.failure()
    assert failure.reason == "CLIENT_IDLE", failure
    assert failure.status is StatusCode.ABORTED
    assert closed(call.downs)
    return time.monotonic() - began


def leaves(sent: int, *, then: Callable[[DirectCall], object] = lambda _: None) -> Any:
    """A client that sends so many bytes of its first share, and then nothing."""

    def client(call: DirectCall) -> None:
        call.attach().send(b"".join(call.frames(0))[:sent])
        then(call)

    return client


def never_attaches_all(call: DirectCall) -> None:
    call.attach_one(UP, 0)


def never_ends(call: DirectCall) -> None:
    call.attach()
    for number in range(2):
        call.send(b"".join(call.frames(number)), number)


def one_is_silent(call: DirectCall) -> None:
    call.attach().send(b"".join(call.frames(1)), 1)


SILENT = {
    "attached": leaves(0),
    "one-socket": never_attaches_all,
    "in-a-header": leaves(17),
    "behind-a-header": leaves(32),
    "in-a-payload": leaves(50),
    "between-frames": leaves(32 + 80),
    "one-connection": one_is_silent,
    "no-end": never_ends,
    "end-only": leaves(0, then=lambda call: call.stream.send(end(37))),
}


def test_a_client_that_is_silent_is_told_so(
    channel: grpc.Channel, server: ServerProcess
) -> None:
    before = descriptors(server.pid)
    with ExitStack() as stack:
        calls = []
        for client in SILENT.values():
            call = stack.enter_context(call_of(channel, whole_numbers(*SIZES)))
            client(call)
            calls.append(call)
        assert_serves(channel)  # nobody else waits for them
        for name, call in zip(SILENT, calls, strict=True):
            assert until_idle(call) < 4 * IDLE_S, name
    wait_until(lambda: descriptors(server.pid) <= before + 8, "descriptors are closed")


def test_a_client_that_does_not_read_is_told_so(channel: grpc.Channel) -> None:
    large = whole_numbers(10_000, 2, 500, results=("y",))  # more than buffers hold
    with call_of(channel, large, connections=1, block_rows=0) as call:
        call.attach()
        sender = threading.Thread(
            target=call.send_all
        )  # until the server reads no more
        sender.start()
        assert_serves(channel)
        failure = call.stream.failure()
        sender.join()
        assert failure.reason == "CLIENT_IDLE"
        assert "read" in failure.text
    assert_serves(channel)


def test_a_client_that_is_slow_is_not_idle(
    channel: grpc.Channel, good: Problem
) -> None:
    """It sends a little at a time for longer than the timeout."""
    with call_of(channel, good) as call:
        call.attach()
        shares = [b"".join(call.frames(number)) for number in range(2)]
        pieces = 12
        for at in range(pieces):
            for number, share in enumerate(shares):
                size = -(-len(share) // pieces)
                call.send(share[at * size : (at + 1) * size], number)
            time.sleep(1.5 * IDLE_S / pieces)
        call.stream.send(end(37))
        call.stream.half_close()
        assert_exact(call.results(), good)


def test_connections_that_break_end_the_job(
    channel: grpc.Channel, good: Problem
) -> None:
    def reset(sock: socket.socket) -> None:
        linger = struct.pack("ii", 1, 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        sock.close()

    for end_of in (socket.socket.close, reset):
        for side in ("ups", "downs"):
            for sent in (0, 17, 32, 50, 112, 200):
                with call_of(channel, good) as call:
                    call.attach().send(b"".join(call.frames(0))[:sent])
                    if side == "downs":
                        # The server notices when it sends.
                        end_of(call.downs[0])
                        call.send(b"".join(call.frames(0))[sent:])
                        call.send(b"".join(call.frames(1)), 1)
                    else:
                        end_of(call.ups[1])
                    failure = call.stream.failure()
                    case = (end_of, side, sent)
                    assert failure.reason == "CONNECTION_LOST", (case, failure)
                    assert failure.status is StatusCode.UNAVAILABLE
    assert_serves(channel)


@pytest.mark.thorough
def test_half_open_sockets_by_the_hundred_keep_nobody_out(
    channel: grpc.Channel, server: ServerProcess, good: Problem
) -> None:
    before = descriptors(server.pid)
    with call_of(channel, good) as call:
        port = call.port
    with ExitStack() as stack:
        for number in range(400):
            sock = stack.enter_context(connect(port))
            if number % 3 == 1:
                sock.sendall(attach(UP, 0, bytes(32))[: number % 40])
            if number % 100 == 99:
                assert_serves(channel)
        assert descriptors(server.pid) < before + 100
    wait_until(lambda: descriptors(server.pid) <= before + 8, "descriptors are closed")


def test_a_job_whose_call_is_cancelled_holds_nothing(
    channel: grpc.Channel, server: ServerProcess, good: Problem
) -> None:
    """Often enough for it to come just when the server takes the connections."""
    for number in range(40):
        name, sent = f"left-{number}", (None, 0, 40, 112, 300)[number % 5]
        with call_of(channel, good, job_id=name) as call:
            if sent is not None:
                call.attach().send(b"".join(call.frames(0))[:sent])
            call.stream.call.cancel()
            assert closed([*call.ups, *call.downs]), sent
            record = server.wait_for_log(name)
            assert record["outcome"] == "CANCELLED", record
    assert_serves(channel)


# Servers that stop.


def test_a_stopping_server_hands_over_what_it_has() -> None:
    problem = whole_numbers(*SIZES, results=("y", "dw"))
    header = problem.job(checkpoints=job_pb2.Checkpoints(rows=0), block_rows=ROWS)
    header.required_features.append("resume")
    with (
        running_server(grace=0.05) as server,
        grpc.insecure_channel(server.address) as channel,
        DirectCall(channel, problem, header=header) as call,
    ):
        call.attach().send(b"".join(call.frames(0)))  # blocks 0, 2, 4
        share = b"".join(call.frames(1))  # blocks 1 and 3, in part
        call.send(share[: len(share) * 2 // 3], 1)
        frames = [receive_frame(sock) for sock in (*call.downs, call.downs[0])]
        assert [each.index for each in frames] == [0, ROWS * 4, 2 * ROWS * 4]
        server.process.terminate()
        assert receive_frame(call.downs[0]) == Frame(CHECKPOINT, 0, 3 * ROWS, b"", None)
        sums = receive_frame(call.downs[0])
        failure = call.stream.failure()
        assert failure.reason == "DRAINING", failure
        assert str(3 * ROWS) in failure.text
        assert closed([*call.ups, *call.downs])
    dtype = call.job.numerics.dw_accumulator
    came = np.frombuffer(sums.payload, [None, None, None, "f4", "f8"][dtype])
    x, dy = problem.x[: 3 * ROWS], problem.dy[: 3 * ROWS]
    np.testing.assert_array_equal(came.reshape(5, 4), x.T @ dy)
