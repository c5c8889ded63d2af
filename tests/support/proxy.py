"""A TCP proxy between a client and a server, which fails when it is told.

    with Proxy(server.address) as proxy:
        client = gradwire.connect(proxy.address)
        proxy.arm(Fault(cut_after_messages=3, of="responses"))
        client.gradients(x, w, dy)      # the connection breaks in the middle
        assert proxy.faults == 1

What a fault counts begins when it is armed, on all connections together, so
that it does not matter what the connection was used for before.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

Direction = Literal["requests", "responses"]

_CHUNK_BYTES = 64 * 1024
_PREFACE_BYTES = 24
_FRAME_BYTES = 9
_PREFIX_BYTES = 5
_DATA = 0
_LINGER_S = 5.0


@dataclass(frozen=True)
class Fault:
    """What happens once, and after what; exactly one of these is given.

    A message is one of gRPC's, on whatever call.
    """

    of: Direction
    """In which direction it counts."""
    cut_after_bytes: int | None = None
    """The connection is cut when so many bytes have passed."""
    cut_after_messages: int | None = None
    """It is cut when so many messages have passed, whole: at least one."""
    pause_after_bytes: int | None = None
    """The proxy is paused when so many bytes have passed."""
    flip_byte: int | None = None
    """A bit of that byte is flipped, counted from 0."""
    flip_in_message: int | None = None
    """A bit in the middle of that message is flipped, counted from 0."""


class Proxy:
    """Listens on a port of its own and forwards to an address.

    Args:
        target: HOST:PORT; may be changed for connections to come.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self.connections = 0
        """How many were made through it."""
        self.faults = 0
        """How many have happened."""
        self.passed = 0
        """How many messages were through, in its direction, when the last happened."""
        self.messages: dict[Direction, int] = {"requests": 0, "responses": 0}
        """How many have passed since the last fault was armed."""
        self.bytes: dict[Direction, int] = {"requests": 0, "responses": 0}
        """The same for bytes."""
        self._fault: Fault | None = None
        self._lock = threading.Lock()
        self._open: set[_Link] = set()
        self._going = threading.Event()
        self._going.set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def arm(self, fault: Fault | None) -> None:
        """Have a fault happen, once; None: have none."""
        with self._lock:
            self._fault = fault
            self.messages = {"requests": 0, "responses": 0}
            self.bytes = {"requests": 0, "responses": 0}

    def cut(self) -> None:
        """Cut every connection now."""
        with self._lock:
            links = list(self._open)
        for link in links:
            link.cut()

    def pause(self) -> None:
        """Forward nothing more until `resume`, as a network that is gone."""
        self._going.clear()

    def resume(self) -> None:
        """Forward again."""
        self._going.set()

    def close(self) -> None:
        """Cut every connection and take no more."""
        # Closing alone does not wake the thread that waits for connections.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        self.resume()
        self.cut()

    def passes(
        self, of: Direction, data: bytes, messages: _Messages
    ) -> tuple[bytes, bytes, bool]:
        """What of some bytes is forwarded, what behind a pause, and if a cut comes."""
        with self._lock:
            first, before = self.bytes[of], self.messages[of]
            spans = list(messages.feed(data))
            fault = self._fault if self._fault and self._fault.of == of else None
            cut = None if fault is None else _cut(fault, first, before, data, spans)
            flip = None if fault is None else _flip(fault, first, before, data, spans)
            if cut is not None:
                data = data[:cut]
            if flip is not None:
                data = data[:flip] + bytes([data[flip] ^ 0x10]) + data[flip + 1 :]
            pause = None if fault is None else _pause(fault, first, data)
            if pause is not None:
                self.pause()
            later = len(data) if pause is None else pause
            ends = [end for _, end in spans if end is not None]
            if cut is not None or flip is not None or pause is not None:
                self._fault = None
                self.faults += 1
                self.passed = before + sum(1 for end in ends if end <= later)
            self.bytes[of] += len(data)
            self.messages[of] += len(ends)
        return data[:later], data[later:], cut is not None

    def wait_until_going(self) -> None:
        """Wait while the proxy is paused."""
        self._going.wait()

    def forget(self, link: _Link) -> None:
        """A connection is over."""
        with self._lock:
            self._open.discard(link)

    def _accept(self) -> None:
        for client, server in connections(self._listener, lambda: self.target):
            link = _Link(self, client, server)
            with self._lock:
                self.connections += 1
                self._open.add(link)
            link.start()


def connections(
    listener: socket.socket, target: Callable[[], str]
) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Yield each client's socket with one to the server, until the listener closes.

    Neither holds small pieces back. A client is dropped if the server is not there.

    Args:
        listener: Where clients connect.
        target: Returns the server's address, HOST:PORT.
    """
    while True:
        try:
            client, _ = listener.accept()
        except OSError:
            return
        host, _, port = target().rpartition(":")
        try:
            server = socket.create_connection((host, int(port)), 10)
        except OSError:
            client.close()
            continue
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            end.settimeout(None)
        yield client, server


class _Link:
    """One connection through the proxy."""

    def __init__(self, proxy: Proxy, client: socket.socket, server: socket.socket):
        self._proxy = proxy
        self._client = client
        self._server = server
        self._dead = False
        self._both_ended = threading.Barrier(2)

    def start(self) -> None:
        for source, sink, of in (
            (self._client, self._server, "requests"),
            (self._server, self._client, "responses"),
        ):
            threading.Thread(
                target=self._pump, args=(source, sink, of), daemon=True
            ).start()

    def cut(self) -> None:
        """Break the connection behind what was forwarded.

        What still comes is read and dropped: a socket that is closed with unread
        bytes takes back those that its peer has not read yet.
        """
        self._dead = True
        for end in (self._client, self._server):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_WR)
        self._proxy.forget(self)

    def _pump(self, source: socket.socket, sink: socket.socket, of: Direction) -> None:
        messages = _Messages(_PREFACE_BYTES if of == "requests" else 0)
        with contextlib.suppress(OSError):
            while data := source.recv(_CHUNK_BYTES):
                self._proxy.wait_until_going()
                if self._dead:
                    continue
                forwarded, later, cut = self._proxy.passes(of, data, messages)
                if cut:  # before the other side can answer what is the last of it
                    self._dead = True
                sink.sendall(forwarded)
                if later:
                    self._proxy.wait_until_going()
                    sink.sendall(later)
                if cut:
                    self.cut()
        self.cut()
        with contextlib.suppress(threading.BrokenBarrierError):
            self._both_ended.wait(_LINGER_S)
        source.close()


class _Messages:
    """Finds gRPC's messages in the frames of one direction of a connection."""

    def __init__(self, preface_bytes: int) -> None:
        self._skip = preface_bytes
        self._head = b""
        self._left = 0
        self._stream: int | None = None
        self._prefix: dict[int, bytes] = {}
        self._missing: dict[int, int] = {}

    def feed(self, data: bytes) -> Iterator[tuple[int, int | None]]:
        """Where in `data` a message's payload goes on, and where the message ends.

        None where it does not end in this part.
        """
        at = min(self._skip, len(data))
        self._skip -= at
        while at < len(data):
            if not self._left:
                taken = data[at : at + _FRAME_BYTES - len(self._head)]
                self._head += taken
                at += len(taken)
                if len(self._head) == _FRAME_BYTES:
                    self._left = int.from_bytes(self._head[:3])
                    number = int.from_bytes(self._head[5:])
                    self._stream = number if self._head[3] == _DATA else None
                    self._head = b""
                continue
            part = min(self._left, len(data) - at)
            if self._stream is not None:
                yield from self._payload(self._stream, data, at, at + part)
            self._left -= part
            at += part

    def _payload(
        self, stream: int, data: bytes, at: int, end: int
    ) -> Iterator[tuple[int, int | None]]:
        while at < end:
            missing = self._missing.get(stream)
            if missing is None:
                prefix = self._prefix.get(stream, b"")
                taken = data[at : min(end, at + _PREFIX_BYTES - len(prefix))]
                prefix += taken
                at += len(taken)
                self._prefix[stream] = prefix
                if len(prefix) < _PREFIX_BYTES:
                    return
                missing = int.from_bytes(prefix[1:])
                self._prefix[stream] = b""
            part = min(missing, end - at)
            if part == missing:
                self._missing.pop(stream, None)
                yield at, at + part
            else:
                self._missing[stream] = missing - part
                yield at, None
            at += part


def _cut(
    fault: Fault,
    first: int,
    before: int,
    data: bytes,
    spans: list[tuple[int, int | None]],
) -> int | None:
    """After how much of some bytes the connection is cut, if it is."""
    if fault.cut_after_bytes is not None:
        after = fault.cut_after_bytes - first
        return after if after <= len(data) else None
    if fault.cut_after_messages is not None:
        ends = [end for _, end in spans if end is not None]
        after = fault.cut_after_messages - before
        return ends[after - 1] if after <= len(ends) else None
    return None


def _pause(fault: Fault, first: int, data: bytes) -> int | None:
    """After how much of some bytes the proxy is paused, if it is."""
    if fault.pause_after_bytes is None:
        return None
    after = fault.pause_after_bytes - first
    return after if after <= len(data) else None


def _flip(
    fault: Fault,
    first: int,
    before: int,
    data: bytes,
    spans: list[tuple[int, int | None]],
) -> int | None:
    """Which of some bytes gets a flipped bit, if one does."""
    if fault.flip_byte is not None:
        at = fault.flip_byte - first
        return at if at < len(data) else None
    if fault.flip_in_message is not None:
        number = before
        for start, end in spans:
            until = len(data) if end is None else end
            # The beginning of a message is framing, so its end is looked for.
            if number == fault.flip_in_message and end is not None and end > start:
                return (start + until) // 2 + (until - start) // 4
            number += end is not None
    return None
