"""The client's end of direct connections, written by hand.

Nothing here comes from the SDK or from `gradwire_protocol`, so that a mistake that both
of them share shows.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import google_crc32c
import grpc
import numpy as np

from gradwire.v1 import job_pb2
from tests.support.raw import (
    NEEDS,
    Outcome,
    Problem,
    Stream,
    end,
    is_sent,
    matrix_number,
    result_dtype,
)

UP, DOWN = 1, 2
ELEMENTS, COMPLETE, CHECKPOINT = 1, 2, 3
ATTACHED = b"GWDK\x01\0\0\0"
HEADER_BYTES = 32
TIMEOUT_S = 5.0


def attach(direction: int, connection: int, token: bytes) -> bytes:
    """What a socket begins with."""
    return struct.pack("<4sBBH32s", b"GWDA", 1, direction, connection, token)


def frame(
    kind: int,
    matrix: str | int = 0,
    index: int = 0,
    payload: bytes = b"",
    *,
    crc: int | None = None,
    length: int | None = None,
    magic: bytes = b"GWDF",
    version: int = 1,
    zero: int = 0,
) -> bytes:
    """A frame, right or wrong.

    Args:
        kind: Its kind.
        matrix: Name or number.
        index: First element, or rows.
        payload: What follows.
        crc: Its checksum.
        length: What the header says, if not the payload's length.
        magic: How it begins.
        version: Of the framing.
        zero: The unused field.
    """
    number = matrix_number(matrix) if isinstance(matrix, str) else matrix
    size = len(payload) if length is None else length
    flags, value = (0, 0) if crc is None else (1, crc)
    header = (magic, version, kind, number, flags, value, zero, index, size)
    return struct.pack("<4sBBBBIIqq", *header) + payload


@dataclass(frozen=True)
class Frame:
    """One that came."""

    kind: int
    matrix: int
    index: int
    payload: bytes
    crc: int | None


def connect(port: int, host: str = "127.0.0.1") -> socket.socket:
    """A socket to a data port."""
    return socket.create_connection((host, port), TIMEOUT_S)


def receive(sock: socket.socket, size: int) -> bytes:
    """Exactly so many bytes.

    Raises:
        EOFError: The server has closed the socket.
    """
    data = b""
    while len(data) < size:
        try:
            part = sock.recv(size - len(data))
        except ConnectionError:
            part = b""
        if not part:
            raise EOFError(len(data))
        data += part
    return data


def receive_frame(sock: socket.socket) -> Frame:
    """The next frame."""
    header = receive(sock, HEADER_BYTES)
    magic, version, kind, matrix, flags, crc, zero, index, length = struct.unpack(
        "<4sBBBBIIqq", header
    )
    assert (magic, version, zero) == (b"GWDF", 1, 0)
    assert flags in {0, 1}
    payload = receive(sock, length)
    return Frame(kind, matrix, index, payload, crc if flags else None)


class DirectCall:
    """A ComputeStream call whose elements go on direct connections.

    As a context manager, it cancels the call and closes the sockets.

    Args:
        channel: A channel.
        problem: What is computed.
        connections: How many are offered.
        options: See `Problem.job`.
    """

    def __init__(
        self,
        channel: grpc.Channel,
        problem: Problem,
        *,
        connections: int = 2,
        timeout_s: float = TIMEOUT_S,
        header: job_pb2.Job | None = None,
        **options: object,
    ) -> None:
        self.problem = problem
        self.stream = Stream(channel, timeout_s=timeout_s)
        if header is None:
            header = problem.job(**options)
        header.direct.connections = connections
        self.stream.send(header)
        self.outcome: Outcome = self.stream.receive_accepted()
        self.accepted = self.outcome.accepted
        self.job = self.accepted.effective_job
        self.access = self.accepted.direct
        offered = [*self.access.addresses, ":0"]  # 0: no direct connections
        self.port = int(offered[0].rpartition(":")[2])
        self.sockets: list[socket.socket] = []
        self.ups: list[socket.socket] = []
        self.downs: list[socket.socket] = []

    def __enter__(self) -> DirectCall:
        return self

    def __exit__(self, *_: object) -> None:
        for each in self.sockets:
            each.close()
        self.stream.__exit__()

    def attach_one(
        self,
        direction: int,
        connection: int,
        token: bytes | None = None,
        port: int | None = None,
    ) -> socket.socket:
        """Attach a socket.

        Raises:
            EOFError: The server refuses it.
        """
        sock = connect(port or self.port)
        self.sockets.append(sock)
        sock.sendall(
            attach(direction, connection, self.access.token if token is None else token)
        )
        assert receive(sock, len(ATTACHED)) == ATTACHED
        return sock

    def attach(self, port: int | None = None) -> DirectCall:
        """Attach all sockets."""
        for number in range(self.access.connections):
            self.ups.append(self.attach_one(UP, number, port=port))
            self.downs.append(self.attach_one(DOWN, number, port=port))
        return self

    def frames(self, connection: int, most: int = 1 << 20) -> Iterator[bytes]:
        """Everything that a good client sends on a connection.

        Args:
            connection: Its number.
            most: Most bytes of a payload.
        """
        m, n, _ = self.problem.shape
        if not connection and is_sent_operand(self.job, "w"):
            yield from self.elements("w", 0, n, most)
        rows, count = self.accepted.block_rows, self.access.connections
        for first in range(connection * rows, m, count * rows):
            for name in ("x", "dy"):
                if is_sent_operand(self.job, name):
                    yield from self.elements(name, first, min(m, first + rows), most)
        yield frame(COMPLETE, index=m)

    def elements(self, name: str, first: int, last: int, most: int) -> Iterator[bytes]:
        """Frames with rows of an operand."""
        operand = getattr(self.problem, name)
        elements, columns = operand.reshape(-1), operand.shape[1]
        step = max(1, most // operand.itemsize)
        for at in range(first * columns, last * columns, step):
            payload = elements[at : min(at + step, last * columns)].tobytes()
            crc = google_crc32c.value(payload) if self.job.checksum else None
            yield frame(ELEMENTS, name, at, payload, crc=crc)

    def send(self, data: bytes, connection: int = 0) -> None:
        """Send bytes on a connection, which may be closed on either side."""
        with contextlib.suppress(OSError):
            self.ups[connection].sendall(data)

    def send_all(self, most: int = 1 << 20) -> None:
        """Send what a good client sends, by turns, and End."""
        shares = [list(self.frames(i, most)) for i in range(self.access.connections)]
        while any(shares):
            for number, share in enumerate(shares):
                if share:
                    self.send(share.pop(0), number)
        self.stream.send(end(self.problem.shape[0]))
        self.stream.half_close()

    def results(self) -> Outcome:
        """Receive all results and the end of the call."""
        job, (m, n, k) = self.job, self.problem.shape
        shapes = {"y": (m, k), "dx": (m, n), "dw": (n, k), "db": (1, k)}
        for name in NEEDS:
            if is_sent(job, name):
                dtype = result_dtype(job, name)
                self.outcome.arrays[name] = np.full(shapes[name], 77, dtype)
        by_number = {matrix_number(name): name for name in self.outcome.arrays}
        filled = dict.fromkeys(by_number.values(), 0)
        for sock in self.downs:
            while (came := receive_frame(sock)).kind != COMPLETE:
                if came.kind == CHECKPOINT or came.matrix not in by_number:
                    continue
                name = by_number[came.matrix]
                flat = self.outcome.arrays[name].reshape(-1)
                new = np.frombuffer(came.payload, flat.dtype)
                flat[came.index : came.index + len(new)] = new
                filled[name] += len(new)
                assert (came.crc is not None) == bool(job.checksum)
                if came.crc is not None:
                    assert came.crc == google_crc32c.value(came.payload)
            assert came.index == m
        for name, array in self.outcome.arrays.items():
            assert filled[name] == array.size, name
        message = self.stream.receive()
        assert message is not None
        self.outcome.receipt = message.receipt
        assert self.stream.receive() is None
        return self.outcome


def is_sent_operand(job: job_pb2.Job, name: str) -> bool:
    """Whether the client sends an operand."""
    return job.HasField(name) and getattr(job, name).HasField("inline")


def direct_job(
    channel: grpc.Channel,
    problem: Problem,
    *,
    most: int = 1 << 20,
    connections: int = 2,
    then: Callable[[DirectCall], object] = lambda _: None,
    **options: object,
) -> Outcome:
    """Runs a problem on direct connections.

    Args:
        most: Most bytes of a payload.
        connections: How many are offered.
        then: Called before the call is closed.
        options: See `Problem.job`.
    """
    with DirectCall(channel, problem, connections=connections, **options) as call:
        call.attach().send_all(most)
        outcome = call.results()
        then(call)
        return outcome


def closed(sockets: Sequence[socket.socket]) -> bool:
    """Whether the server has closed all of these."""
    for each in sockets:
        try:
            while each.recv(1 << 16):
                pass
        except ConnectionError:
            continue
        except TimeoutError:
            return False
    return True
