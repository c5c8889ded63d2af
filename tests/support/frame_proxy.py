"""An HTTP/2 proxy that resets a stream, as proxies do whose server is gone.

    with FrameProxy(server.address) as proxy:
        client = gradwire.connect(proxy.address)
        proxy.arm(Reset(code=2, of="responses", after_messages=3))
        client.gradients(x, w, dy)      # the call is reset in the middle
        assert proxy.resets == 1

The connection stays, and other calls on it go on.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from dataclasses import dataclass

from tests.support.proxy import Direction, connections

CODES = range(14)
"""The error codes of RFC 9113, section 7."""

_DATA, _HEADERS, _RST_STREAM = 0, 1, 3
_END_STREAM = 1
_CANCEL = 8
_PREFACE_BYTES = 24
_FRAME_BYTES = 9
_PREFIX_BYTES = 5


@dataclass(frozen=True)
class Reset:
    """Which call is reset: the first, of those that begin after this is armed, to get
    so far. A late frame of an earlier call does not count."""

    code: int
    """The error code that the client gets."""
    of: Direction = "requests"
    """The direction in which its messages are counted."""
    after_messages: int = 1
    """After so many of its messages; 0: when it begins."""
    with_end: bool = False
    """Rather with the server's last frame, as HAProxy does whose client has not ended
    its requests. Nothing is counted then."""


class FrameProxy:
    """Listens on a port of its own and forwards frames to an address.

    Args:
        target: HOST:PORT.
    """

    def __init__(self, target: str) -> None:
        self.resets = 0
        """How many calls were reset."""
        self._target = target
        self._reset: Reset | None = None
        self._armed = 0  # how often
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def __enter__(self) -> FrameProxy:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        with self._lock:
            left = list(self._sockets)
        for each in left:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def arm(self, reset: Reset | None) -> None:
        """Have a call be reset, once; None: have none."""
        with self._lock:
            self._reset = reset
            self._armed += 1

    def begin(self) -> int:
        """A number for a call that begins: how often a reset was armed before it."""
        with self._lock:
            return self._armed

    def due(
        self, begun: int, of: Direction, messages: int, *, ended: bool
    ) -> Reset | None:
        """The reset that a call has come to, if there is one; it is spent then.

        Args:
            begun: What `begin` gave for the call.
            of: The direction of its last frame.
            messages: The messages that have passed in that direction.
            ended: Whether the server ends the call with that frame.
        """
        with self._lock:
            reset = self._reset
            if reset is None or begun != self._armed:
                return None
            if reset.with_end:
                if not ended:
                    return None
            elif reset.of != of or messages < reset.after_messages:
                return None
            self._reset = None
            self.resets += 1
            return reset

    def hold(self, end: socket.socket) -> None:
        """Close a socket with the proxy."""
        with self._lock:
            self._sockets.add(end)

    def release(self, end: socket.socket) -> None:
        """Close a socket now."""
        with self._lock:
            self._sockets.discard(end)
        end.close()

    def _accept(self) -> None:
        for client, server in connections(self._listener, lambda: self._target):
            _Link(self, client, server)


class _Link:
    """One connection through the proxy."""

    def __init__(
        self, proxy: FrameProxy, client: socket.socket, server: socket.socket
    ) -> None:
        self._proxy = proxy
        # Whole frames only, so that another thread's frame may follow at any time.
        self._to_client, self._to_server = threading.Lock(), threading.Lock()
        self._client, self._server = client, server
        self._begun: dict[int, int] = {}
        self._over: set[int] = set()
        for end in (client, server):
            proxy.hold(end)
        for pump in (self._requests, self._responses):
            threading.Thread(target=pump, daemon=True).start()

    def _requests(self) -> None:
        counts: dict[int, _Messages] = {}
        with contextlib.suppress(OSError, _EndError):
            self._send(
                self._server, self._to_server, _exactly(self._client, _PREFACE_BYTES)
            )
            while True:
                head, payload = _frame(self._client)
                stream = int.from_bytes(head[5:])
                reset = None
                if head[3] in {_DATA, _HEADERS}:
                    if head[3] == _HEADERS:
                        self._begun.setdefault(stream, self._proxy.begin())
                    messages = counts.setdefault(stream, _Messages())
                    if head[3] == _DATA:
                        messages.feed(payload)
                    reset = self._due(stream, "requests", messages, ended=False)
                if reset is not None:  # before the server can answer
                    rst_stream = _rst_stream(stream, reset.code)
                    self._send(self._client, self._to_client, rst_stream)
                self._send(self._server, self._to_server, head + payload)
                if reset is not None:
                    self._reset_server(stream)
        self._end(self._client, self._server)

    def _responses(self) -> None:
        counts: dict[int, _Messages] = {}
        with contextlib.suppress(OSError, _EndError):
            while True:
                head, payload = _frame(self._server)
                stream = int.from_bytes(head[5:])
                reset = None
                if head[3] in {_DATA, _HEADERS}:
                    messages = counts.setdefault(stream, _Messages())
                    if head[3] == _DATA:
                        messages.feed(payload)
                    ended = bool(head[4] & _END_STREAM)
                    reset = self._due(stream, "responses", messages, ended=ended)
                # What follows on a stream that was reset is ignored by the client, but
                # HPACK's tables and the connection's window go by it.
                frames = head + payload
                if reset is not None:  # in one piece: the client sees both or none
                    frames += _rst_stream(stream, reset.code)
                self._send(self._client, self._to_client, frames)
                if reset is not None:
                    self._reset_server(stream)
        self._end(self._server, self._client)

    def _due(
        self, stream: int, of: Direction, messages: _Messages, *, ended: bool
    ) -> Reset | None:
        if stream in self._over:
            return None
        reset = self._proxy.due(self._begun[stream], of, messages.count, ended=ended)
        if reset is not None:
            self._over.add(stream)
        return reset

    def _reset_server(self, stream: int) -> None:
        self._send(self._server, self._to_server, _rst_stream(stream, _CANCEL))

    @staticmethod
    def _send(end: socket.socket, lock: threading.Lock, frame: bytes) -> None:
        with lock:
            end.sendall(frame)

    def _end(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):
            source.shutdown(socket.SHUT_RD)
        self._proxy.release(source)


class _EndError(Exception):
    """The connection has ended."""


class _Messages:
    """Counts the complete messages of one direction of a call."""

    def __init__(self) -> None:
        self.count = 0
        self._prefix = b""
        self._missing = 0

    def feed(self, data: bytes) -> None:
        while data:
            if self._missing:
                taken = min(self._missing, len(data))
                self._missing -= taken
                data = data[taken:]
                self.count += not self._missing
                continue
            taken = min(_PREFIX_BYTES - len(self._prefix), len(data))
            self._prefix += data[:taken]
            data = data[taken:]
            if len(self._prefix) == _PREFIX_BYTES:
                self._missing = int.from_bytes(self._prefix[1:])
                self._prefix = b""
                self.count += not self._missing


def _rst_stream(stream: int, code: int) -> bytes:
    head = b"\0\0\4" + bytes([_RST_STREAM, 0])
    return head + struct.pack(">II", stream, code)


def _frame(source: socket.socket) -> tuple[bytes, bytes]:
    head = _exactly(source, _FRAME_BYTES)
    return head, _exactly(source, int.from_bytes(head[:3]))


def _exactly(source: socket.socket, size: int) -> bytes:
    parts = []
    while size:
        part = source.recv(size)
        if not part:
            raise _EndError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
