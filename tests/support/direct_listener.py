"""The server's end of direct connections, without a server.

It answers every Attach with its token, and keeps the sockets for the test.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from gradwire_protocol.data_plane.frames import (
    ATTACH_BYTES,
    ATTACHED,
    Attach,
    DirectFramingError,
)
from tests.support.observing import wait_until

TOKEN = bytes(range(32))


@dataclass
class Listener:
    """What arrived: an Attach and its socket, each time a socket is used."""

    listening: socket.socket
    context: ssl.SSLContext | None = None
    attached: list[tuple[Attach, socket.socket]] = field(default_factory=list)
    accepted: list[socket.socket] = field(default_factory=list)
    ended: list[socket.socket] = field(default_factory=list)

    @property
    def port(self) -> int:
        return int(self.listening.getsockname()[1])

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock = self.listening.accept()[0]
                self.accepted.append(sock)
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError, DirectFramingError):
            if self.context is not None:
                sock = self.context.wrap_socket(sock, server_side=True)
            while len(got := sock.recv(ATTACH_BYTES)) == ATTACH_BYTES:
                seat = Attach.decode(got)
                if seat.token != TOKEN:
                    break
                self.attached.append((seat, sock))
                sock.sendall(ATTACHED)
        self.ended.append(sock)
        sock.close()

    def socket_of(self, seat: tuple[int, int]) -> socket.socket:
        """The last socket that was attached as (direction, connection)."""
        return next(
            sock
            for each, sock in reversed(self.attached)
            if (each.direction, each.connection) == seat
        )

    def wait_for_end(self, count: int) -> None:
        wait_until(lambda: len(self.ended) == count, f"the end of {count} sockets")

    def close(self) -> None:
        for sock in (self.listening, *self.accepted, *(s for _, s in self.attached)):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


@contextmanager
def listening(
    context: ssl.SSLContext | None = None, host: str = "127.0.0.1"
) -> Iterator[Listener]:
    """A listener at a port of its own."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = Listener(socket.create_server((host, 0), family=family), context)
    thread = threading.Thread(target=listener.run, daemon=True)
    thread.start()
    try:
        yield listener
    finally:
        listener.close()
        thread.join(5)


@contextmanager
def silent_port() -> Iterator[int]:
    """A port at which nothing is answered, as where a firewall drops packets."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        # Once its queue is full, the system ignores further connections.
        for _ in range(4):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(server.getsockname())
        yield int(server.getsockname()[1])
