"""A proxy of direct connections that changes what the server sends, frame by frame."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable

from tests.support.direct_client import ATTACHED, HEADER_BYTES, receive
from tests.support.proxy import connections

Edit = Callable[[int, bytes], bytes]
"""From the number of a frame on all connections, and its bytes, to what is sent."""


class DirectProxy:
    """Listens on a port of its own and forwards to a server's data port.

    Attributes:
        target: HOST:PORT.
        edit: What becomes of frames.
    """

    def __init__(self) -> None:
        self.target = "127.0.0.1:1"
        self.edit: Edit = lambda _, frame: frame
        self._count = 0
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> DirectProxy:
        return self

    def __exit__(self, *_: object) -> None:
        for each in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def arm(self, edit: Edit) -> None:
        """Change frames from now on, counted from 0."""
        with self._lock:
            self._count, self.edit = 0, edit

    def _accept(self) -> None:
        for client, server in connections(self._listener, lambda: self.target):
            self._sockets += [client, server]
            for pump in (self._requests, self._responses):
                args = (client, server)
                threading.Thread(target=pump, args=args, daemon=True).start()

    def _requests(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 16):
                server.sendall(data)
            server.shutdown(socket.SHUT_WR)

    def _responses(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError, EOFError):
            while True:
                head = receive(server, len(ATTACHED))
                if head != ATTACHED:
                    head += receive(server, HEADER_BYTES - len(head))
                    head += receive(server, int.from_bytes(head[24:32], "little"))
                    with self._lock:
                        number, self._count = self._count, self._count + 1
                        head = self.edit(number, head)
                client.sendall(head)
        with contextlib.suppress(OSError):
            client.shutdown(socket.SHUT_WR)
