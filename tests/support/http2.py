"""HTTP/2 by hand, for what no client and no server of gRPC does.

Clients that read nothing or end nothing, and web servers that answer with a page.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Mapping
from types import TracebackType

_DATA, _HEADERS, _SETTINGS, _WINDOW_UPDATE = 0, 1, 4, 8
_END_STREAM, _END_HEADERS = 1, 4
_INITIAL_WINDOW_SIZE = 4
_FRAME_BYTES = 9
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class Connection:
    """A connection to a server, in plaintext.

    Args:
        address: HOST:PORT.
        window_bytes: How much of each call's answers it is ready to take.
    """

    def __init__(self, address: str, window_bytes: int = 65535) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), 10)
        self._next = 1
        settings = struct.pack(">HI", _INITIAL_WINDOW_SIZE, window_bytes)
        self._socket.sendall(_PREFACE)
        self._send(_SETTINGS, 0, 0, settings)

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._socket.close()

    def begin(self, method: str, metadata: Mapping[str, str] | None = None) -> int:
        """Begins a call; returns its number."""
        number, self._next = self._next, self._next + 2
        fields = {
            ":method": "POST",
            ":scheme": "http",
            ":path": method,
            ":authority": "test",
            "te": "trailers",
            "content-type": "application/grpc",
            **(metadata or {}),
        }
        block = b"".join(_literal(*field) for field in fields.items())
        self._send(_HEADERS, _END_HEADERS, number, block)
        return number

    def send(self, number: int, data: bytes, *, end: bool = False) -> None:
        """Sends bytes of a call, whatever they are."""
        self._send(_DATA, _END_STREAM if end else 0, number, data)

    def read(self, number: int, size_bytes: int) -> None:
        """Is ready to take so much more of a call's answers."""
        self._send(_WINDOW_UPDATE, 0, number, struct.pack(">I", size_bytes))

    def ask(self, method: str, message: bytes) -> int:
        """Begins a call of one message, and sends that."""
        number = self.begin(method)
        framed = b"\0" + struct.pack(">I", len(message)) + message
        self.send(number, framed, end=True)
        return number

    def wait_for_end(self) -> int:
        """The number of the call that ends next."""
        while True:
            head = self._receive(_FRAME_BYTES)
            self._receive(int.from_bytes(head[:3]))
            if head[3] == _HEADERS and head[4] & _END_STREAM:
                return int.from_bytes(head[5:])

    def _receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self._socket.recv(size - len(data))
            if not part:
                raise ConnectionError("the server closed the connection")
            data += part
        return data

    def _send(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        self._socket.sendall(_frame(kind, flags, number, payload))


def _frame(kind: int, flags: int, number: int, payload: bytes) -> bytes:
    head = struct.pack(">I", len(payload))[1:] + bytes([kind, flags])
    return head + struct.pack(">I", number) + payload


def _literal(name: str, value: str) -> bytes:
    """A field as HPACK has it without its tables (RFC 7541, section 6.2.2)."""
    # As PEP 383 has bytes that are no UTF-8.
    texts = (each.encode(errors="surrogateescape") for each in (name, value))
    return b"\0" + b"".join(bytes([len(text)]) + text for text in texts)


class WebServer:
    """A web server, or the error page of a proxy: no gRPC, whatever is asked.

    Attributes:
        status: Of its answers.
        content_type: Of its answers; empty: they have no body.
        calls: How many were answered.
    """

    def __init__(self, status: int = 200, content_type: str = "text/html") -> None:
        self.status = status
        self.content_type = content_type
        self.calls = 0
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> WebServer:
        return self

    def __exit__(self, *_: object) -> None:
        for each in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._sockets.append(client)
                threading.Thread(target=self._serve, args=[client], daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client.makefile("rb") as received:
            client.sendall(_frame(_SETTINGS, 0, 0, b""))
            received.read(len(_PREFACE))
            while len(head := received.read(_FRAME_BYTES)) == _FRAME_BYTES:
                received.read(int.from_bytes(head[:3]))
                if head[3] == _HEADERS:
                    self.calls += 1
                    client.sendall(self._answer(int.from_bytes(head[5:])))

    def _answer(self, number: int) -> bytes:
        block = _literal(":status", str(self.status))
        if not self.content_type:
            return _frame(_HEADERS, _END_HEADERS | _END_STREAM, number, block)
        block += _literal("content-type", self.content_type)
        page = b"<html><head><title>nginx</title></head></html>"
        return _frame(_HEADERS, _END_HEADERS, number, block) + _frame(
            _DATA, _END_STREAM, number, page
        )
