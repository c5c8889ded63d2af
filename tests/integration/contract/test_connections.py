"""One job over several connections, as any language's client speaks it."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from gradwire.v1 import job_pb2, matrix_pb2
from gradwire_server.admission import CALL_BYTES
from tests.raw import (
    NEEDS,
    Outcome,
    Problem,
    Request,
    Stream,
    normal_numbers,
    stream_job,
    whole_numbers,
)
from tests.serving import running_server

FAILED_PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
INVALID_ARGUMENT = grpc.StatusCode.INVALID_ARGUMENT
ROWS = ("x", "dy")


def join(token: str, connection: int) -> Request:
    return Request(join=job_pb2.Join(token=token, connection=connection))


def share(problem: Problem, block_rows: int, connection: int, connections: int):
    """The messages of a connection's row blocks, each as one Block an operand."""
    m = problem.shape[0]
    for first in range(connection * block_rows, m, connections * block_rows):
        for name in ROWS:
            if name in problem.operands:
                yield from problem.blocks(name, first, min(first + block_rows, m))


class Calls:
    """The calls of one job, all of which have joined."""

    def __init__(
        self,
        stack,
        channel,
        problem,
        connections,
        before_joins=lambda: None,
        **options,
    ):
        self.problem = problem
        self.first = stack.enter_context(Stream(channel))
        self.first.send(problem.job(connections=connections, **options))
        self.outcome: Outcome = self.first.receive_accepted()
        self.token = self.outcome.accepted.join_token
        self.block_rows = self.outcome.accepted.block_rows
        self.streams = [self.first]
        before_joins()
        for number in range(1, connections):
            stream = stack.enter_context(Stream(channel))
            stream.send(join(self.token, number))
            answer = stream.receive()
            assert answer is not None
            assert answer.WhichOneof("message") == "joined"
            self.streams.append(stream)

    def share(self, number):
        return share(self.problem, self.block_rows, number, len(self.streams))

    def send(self, number):
        """Sends all that one connection has to send."""
        stream = self.streams[number]
        if not number:
            stream.send_all(self.problem.blocks("w", 0, self.problem.shape[1]))
        stream.send_all(self.share(number))
        if not number:
            stream.send(Request(end=job_pb2.End(m=self.problem.shape[0])))
        stream.half_close()

    def results(self):
        """The bytes of each result, put together by their indices."""
        parts: dict[str, dict[int, bytes]] = {name: {} for name in NEEDS}
        placed: list[list[tuple[str, int]]] = [[] for _ in self.streams]
        receipts: list[job_pb2.Receipt] = []

        def read(number, stream):
            while (message := stream.receive()) is not None:
                if message.WhichOneof("message") == "receipt":
                    receipts.append(message.receipt)
                    continue
                block = message.block
                name = matrix_pb2.Matrix.Name(block.matrix)[7:].lower()
                parts[name][block.index] = block.data
                placed[number].append((name, block.index))

        readers = [
            threading.Thread(target=read, args=each) for each in enumerate(self.streams)
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        (receipt,) = receipts
        bits = {
            name: b"".join(data for _, data in sorted(those.items()))
            for name, those in parts.items()
        }
        return bits, placed, receipt


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as entered:
        yield entered


@pytest.mark.parametrize("connections", [2, 3, 16])
@pytest.mark.parametrize("open_m", [False, True])
@pytest.mark.parametrize("m", [0, 5, 64, 200, 333])
def test_a_job_gives_the_same_bits_over_any_number_of_connections(
    channel, stack, connections, open_m, m
):
    problem = normal_numbers(m, 13, 11)
    expected = stream_job(channel, problem)
    calls = Calls(stack, channel, problem, connections, open_m=open_m)
    for number in reversed(range(connections)):
        calls.send(number)
    bits, placed, receipt = calls.results()
    assert bits == expected.bits
    assert (receipt.m, receipt.connections) == (m, connections)
    assert receipt.bytes_received == expected.receipt.bytes_received
    assert receipt.bytes_sent == expected.receipt.bytes_sent
    rows = {"y": 11, "dx": 13}
    for number, those in enumerate(placed):
        for name, index in those:
            if name == "dw":
                assert number == 0
            else:
                block = index // rows[name] // calls.block_rows
                assert block % connections == number


def test_results_leave_on_the_connection_that_brought_their_rows(channel, stack):
    problem = whole_numbers(64, 13, 11, results=("dx",))
    calls = Calls(stack, channel, problem, 2)
    for number in range(2):
        calls.send(number)
    bits, placed, _ = calls.results()
    np.testing.assert_array_equal(
        np.frombuffer(bits["dx"], np.float32), problem.expected()["dx"].reshape(-1)
    )
    assert all(placed)


def test_a_connection_that_stalls_holds_the_others_back_but_locks_nothing(
    channel, stack
):
    """The ring keeps a slot for the next block in order."""
    problem = normal_numbers(640, 13, 11)
    expected = stream_job(channel, problem)
    calls = Calls(stack, channel, problem, 4)
    for number in (3, 2, 1):
        calls.send(number)
    bits: dict[str, bytes] = {}
    reading = threading.Thread(target=lambda: bits.update(calls.results()[0]))
    reading.start()
    calls.send(0)
    reading.join()
    assert bits == expected.bits


def test_memory_is_reserved_for_every_connection(channel, stack):
    problem = whole_numbers(6400, 13, 11)
    one = stream_job(channel, problem).accepted.reserved_bytes
    four = Calls(stack, channel, problem, 4).outcome.accepted.reserved_bytes
    message_bytes = 2 * (4 << 20)
    assert four >= one + 3 * message_bytes


def test_an_unknown_token_is_refused_and_nothing_else_is_harmed(channel, stack):
    problem = normal_numbers(64, 13, 11)
    calls = Calls(stack, channel, problem, 2)
    for token in ("", "x" * len(calls.token), calls.token[:-1], "\xe9" * 16):
        with Stream(channel) as stranger:
            stranger.send(join(token, 1))
            failure = stranger.failure()
        assert failure.status is FAILED_PRECONDITION
        assert failure.reason == "JOIN_UNKNOWN"
        assert list(failure.fields) == ["join.token"]
    for number in range(2):
        calls.send(number)
    assert calls.results()[0] == stream_job(channel, problem).bits


def test_tokens_are_long_and_each_is_another(channel, stack):
    problem = whole_numbers(6, 3, 2)
    tokens = {Calls(stack, channel, problem, 2).token for _ in range(3)}
    assert len(tokens) == 3
    assert min(map(len, tokens)) >= 16
    assert stream_job(channel, problem).accepted.join_token == ""


def test_a_token_is_of_no_use_after_its_job(channel, stack):
    calls = Calls(stack, channel, whole_numbers(6, 3, 2), 2)
    for number in range(2):
        calls.send(number)
    calls.results()
    with Stream(channel) as late:
        late.send(join(calls.token, 1))
        assert late.failure().reason == "JOIN_UNKNOWN"


@pytest.mark.parametrize("number", [-1, 0, 1, 2, 99])
def test_a_wrong_connection_is_refused_and_the_job_goes_on(channel, stack, number):
    """Connection 1 has joined already."""
    problem = normal_numbers(64, 13, 11)
    calls = Calls(stack, channel, problem, 2)
    with Stream(channel) as stream:
        stream.send(join(calls.token, number))
        failure = stream.failure()
    assert (failure.status, failure.reason) == (INVALID_ARGUMENT, "OPTION_INVALID")
    assert list(failure.fields) == ["join.connection"]
    for each in range(2):
        calls.send(each)
    assert calls.results()[0] == stream_job(channel, problem).bits


@pytest.mark.parametrize("connections", [-1, 17, 1 << 30])
def test_too_many_connections_are_refused(channel, connections):
    with Stream(channel) as stream:
        stream.send(whole_numbers(6, 3, 2).job(connections=connections))
        failure = stream.failure()
    assert (failure.status, failure.reason) == (INVALID_ARGUMENT, "OPTION_INVALID")
    assert list(failure.fields) == ["job.connections"]


WRONG = [
    pytest.param("w", 0, 1, "ORDER_INVALID", id="w-on-a-joined-connection"),
    pytest.param("x", 0, 1, "INDEX_INVALID", id="a-block-of-another-connection"),
    pytest.param("x", 1, 2, "PAYLOAD_EXCESS", id="past-the-end-of-its-block"),
]


@pytest.mark.parametrize(("name", "at", "blocks", "reason"), WRONG)
def test_what_is_wrong_on_one_connection_fails_the_job_on_all(
    channel, stack, name, at, blocks, reason
):
    problem = normal_numbers(640, 13, 11)
    calls = Calls(stack, channel, problem, 3)
    rows = calls.block_rows
    first, last = (0, 1) if name == "w" else (at * rows, (at + blocks) * rows)
    calls.streams[1].send_all(problem.blocks(name, first, last))
    failures = [stream.failure() for stream in calls.streams]
    assert {failure.reason for failure in failures} == {reason}
    assert len({failure.text for failure in failures}) == 1
    assert {failure.metadata["job_id"] for failure in failures} == {
        calls.outcome.accepted.effective_job.job_id
    }


def test_end_on_a_joined_connection_is_refused(channel, stack):
    calls = Calls(stack, channel, whole_numbers(6, 3, 2), 2)
    calls.streams[1].send(Request(end=job_pb2.End(m=6)))
    failures = [stream.failure() for stream in calls.streams]
    assert {failure.reason for failure in failures} == {"MESSAGE_UNEXPECTED"}


def test_rows_that_are_missing_on_one_connection_fail_the_job(channel, stack):
    problem = normal_numbers(640, 13, 11)
    calls = Calls(stack, channel, problem, 2)
    calls.send(0)
    some = list(calls.share(1))[:-1]
    calls.streams[1].send(*some)
    calls.streams[1].half_close()
    failures = [stream.failure() for stream in calls.streams]
    assert {failure.reason for failure in failures} == {"PAYLOAD_MISSING"}


@pytest.mark.parametrize("open_m", [False, True])
@pytest.mark.parametrize("closes_first", [True, False])
@pytest.mark.parametrize("blocks", [0, 2])
def test_a_connection_that_half_closes_without_its_rows_does_not_lock_the_job(
    stack, open_m, closes_first, blocks
):
    """The others wait for room, and so nobody comes to read End."""
    with (
        running_server(block_bytes=1024) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        problem = normal_numbers(640, 13, 11)
        calls = Calls(stack, channel, problem, 2, open_m=open_m)
        calls.streams[1].send(*list(calls.share(1))[: 2 * blocks])
        if closes_first:
            calls.streams[1].half_close()
        calls.send(0)
        if not closes_first:
            time.sleep(0.2)  # so that the first is waiting for room
            calls.streams[1].half_close()
        failures = [stream.failure() for stream in calls.streams]
        assert {failure.reason for failure in failures} == {"PAYLOAD_MISSING"}
        stack.close()


@pytest.mark.parametrize("ends_first", [True, False])
def test_rows_past_the_end_do_not_lock_the_job(stack, ends_first):
    """They wait for room that the first connection's rows never make."""
    with (
        running_server(block_bytes=1024) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        problem = normal_numbers(640, 13, 11)
        calls = Calls(stack, channel, problem, 2, open_m=True)
        first, second = calls.streams
        if ends_first:
            first.send_all(problem.blocks("w", 0, 13))
            first.send(Request(end=job_pb2.End(m=0)))
            first.half_close()
            time.sleep(0.2)
        second.send_all(calls.share(1))
        if not ends_first:
            time.sleep(0.2)  # so that the second is waiting for room
            first.send_all(problem.blocks("w", 0, 13))
            first.send(Request(end=job_pb2.End(m=0)))
            first.half_close()
        failures = [stream.failure() for stream in calls.streams]
        assert {failure.reason for failure in failures} == {"M_MISMATCH"}
        stack.close()


@pytest.mark.parametrize("leaver", [0, 1, 2])
def test_a_connection_that_leaves_ends_the_job_on_all(channel, stack, leaver):
    problem = normal_numbers(640, 13, 11)
    calls = Calls(stack, channel, problem, 3)
    calls.streams[1].send(*list(calls.share(1))[:1])
    calls.streams[leaver].call.cancel()
    for number, stream in enumerate(calls.streams):
        failure = stream.failure()
        assert failure.status is grpc.StatusCode.CANCELLED
        if number != leaver:
            assert failure.reason == "JOB_CANCELLED"
            which = f"connection {leaver}" if leaver else "the first connection"
            assert which in failure.text


def test_connections_that_do_not_join_are_waited_for_as_long_as_for_any_message():
    with (
        running_server(idle_timeout=0.3) as server,
        grpc.insecure_channel(server.address) as channel,
        Stream(channel) as first,
    ):
        first.send(whole_numbers(6, 3, 2).job(connections=2))
        first.receive_accepted()
        failure = first.failure()
        assert failure.status is grpc.StatusCode.ABORTED
        assert failure.reason == "CLIENT_IDLE"


def test_a_connection_that_falls_silent_fails_the_job_on_all(stack):
    with (
        running_server(idle_timeout=0.5, block_bytes=1024) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        calls = Calls(stack, channel, normal_numbers(640, 13, 11), 3)
        calls.send(0)
        calls.send(2)
        failures = [stream.failure() for stream in calls.streams]
        assert {failure.reason for failure in failures} == {"CLIENT_IDLE"}
        stack.close()


@pytest.mark.parametrize("attempt", range(20))
def test_a_call_that_leaves_before_its_job_was_joined_ends_the_job(channel, attempt):
    """Whichever of the two the server notices first."""
    with Stream(channel) as first, Stream(channel) as stranger:
        first.send(whole_numbers(6, 3, 2).job(connections=3))
        token = first.receive_accepted().accepted.join_token
        first.call.cancel()
        stranger.send(join(token, 1))
        assert stranger.failure().reason in {"JOIN_UNKNOWN", "JOB_CANCELLED"}


def test_a_connection_that_leaves_while_others_are_expected_ends_the_job(channel):
    with Stream(channel) as first, Stream(channel) as second:
        first.send(whole_numbers(6, 3, 2).job(connections=3))
        token = first.receive_accepted().accepted.join_token
        second.send(join(token, 1))
        second.receive()
        second.call.cancel()
        failure = first.failure()
        assert failure.reason == "JOB_CANCELLED"
        assert "connection 1" in failure.text


def test_a_job_whose_connections_would_not_fit_is_refused():
    problem = whole_numbers(6, 3, 2)
    with running_server(memory_limit=24 << 20) as server:
        small = grpc.insecure_channel(server.address)
        with small, Stream(small) as stream:
            stream.send(problem.job(connections=16))
            failure = stream.failure()
            assert failure.reason == "JOB_TOO_LARGE"
            assert stream_job(small, problem).receipt.m == 6


def test_joins_find_a_place_on_a_server_whose_memory_is_taken(stack):
    """The job that they belong to has reserved it."""
    problem = normal_numbers(200, 13, 11)
    with (
        running_server(block_bytes=1024) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        reserved = Calls(stack, channel, problem, 3).outcome.accepted.reserved_bytes
        stack.close()
    with (
        running_server(block_bytes=1024, memory_limit=reserved + CALL_BYTES) as server,
        grpc.insecure_channel(server.address) as channel,
        contextlib.ExitStack() as joined,
    ):

        def another_is_refused():
            with Stream(channel) as another:
                another.send(problem.job())
                assert another.failure().reason == "BUSY"

        calls = Calls(joined, channel, problem, 3, before_joins=another_is_refused)
        for number in range(3):
            calls.send(number)
        bits, _, _ = calls.results()
        assert bits == stream_job(channel, problem).bits


def test_joins_find_a_place_on_a_server_that_drains(stack):
    """The job that they belong to runs, and has reserved their memory."""
    problem = normal_numbers(200, 13, 11)
    with (
        running_server(block_bytes=1024, grace=20) as server,
        grpc.insecure_channel(server.address) as channel,
        contextlib.ExitStack() as joined,
    ):

        def drain():
            server.process.terminate()
            server.wait_for_log("draining")

        expected = stream_job(channel, problem).bits
        calls = Calls(joined, channel, problem, 3, before_joins=drain)
        with Stream(channel) as another:
            another.send(problem.job())
            assert another.failure().reason == "DRAINING"
        for number in range(3):
            calls.send(number)
        assert calls.results()[0] == expected


def test_a_connection_that_pushes_while_another_stalls_does_not_grow_the_server():
    """A slot is filled again only when its results have left."""
    rows = normal_numbers(1024, 128, 128)
    with (
        running_server(idle_timeout=1, block_bytes=1 << 20) as server,
        grpc.insecure_channel(server.address) as channel,
        contextlib.ExitStack() as joined,
    ):
        stream_job(channel, rows)
        calls = Calls(joined, channel, rows, 3, open_m=True)
        assert calls.block_rows == 1024
        before = resident_bytes(server.pid)
        for number in (1, 2):
            calls.streams[number].send_all(endless_share(rows, number, 3))
        failures = [stream.failure() for stream in calls.streams]
        assert {failure.reason for failure in failures} == {"CLIENT_IDLE"}
        grown = resident_bytes(server.pid) - before
        assert grown < calls.outcome.accepted.reserved_bytes


def endless_share(block: Problem, connection: int, connections: int):
    """One row block again and again, as a connection's share of endless rows."""
    for number in itertools.count(connection, connections):
        for name in ROWS:
            for message in block.blocks(name, 0, block.shape[0]):
                message.block.index += number * getattr(block, name).size
                yield message


def resident_bytes(pid: int) -> int:
    """The highest resident set of a process so far."""
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
