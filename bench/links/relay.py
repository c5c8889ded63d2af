"""A link with a given rate: a relay that paces connections in both directions.

The relay simulates a slow network without privileges for traffic shaping. It buffers
little, and so does the kernel between unix sockets (a TCP socket's send buffer grows to
4 MiB), so a sender soon waits, as on a network. ``python -m bench.links.relay ADDRESS
BYTES_PER_S`` runs a relay in a separate process, independent of a client's threads.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

_PIECE_BYTES = 1 << 16
_CATCH_UP_S = 0.01
"""Longest delay of a late wake-up that faster sending may make up for."""


class Link:
    """A relay in threads of this process.

    Args:
        to: A server's address, HOST:PORT or unix:PATH.
        bytes_per_s: The rate of each direction; None: as fast as it goes.

    Attributes:
        address: Address for clients, of the same kind.
        up_bytes: Bytes sent to the server so far.
        down_bytes: Bytes received from the server so far.
    """

    def __init__(self, to: str, bytes_per_s: float | None = None) -> None:
        self._to = to
        self._bytes_per_s = bytes_per_s
        self.up_bytes = self.down_bytes = 0
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._directory = tempfile.TemporaryDirectory(prefix="gradwire-link-")
        if to.startswith("unix:"):
            path = str(Path(self._directory.name) / "socket")
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(path)
            self._listener.listen()
            self.address = f"unix:{path}"
        else:
            self._listener = socket.create_server(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._begin(self._accept)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cut every connection."""
        for each in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for each in (self._listener, *self._sockets):
            each.close()
        self._directory.cleanup()

    def _begin(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return  # closed
            server = self._connected()
            self._sockets += client, server
            for end in (client, server):
                if end.family != socket.AF_UNIX:
                    # As gRPC's own. Otherwise a small piece waits for the last one's
                    # delayed acknowledgement, up to 40 ms.
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._begin(self._pump, client, server, "up_bytes")
            self._begin(self._pump, server, client, "down_bytes")

    def _connected(self) -> socket.socket:
        if self._to.startswith("unix:"):
            server = socket.socket(socket.AF_UNIX)
            server.connect(self._to.removeprefix("unix:"))
            return server
        host, _, port = self._to.rpartition(":")
        return socket.create_connection((host, int(port)))

    def _pump(self, source: socket.socket, sink: socket.socket, counter: str) -> None:
        due = time.monotonic()
        with contextlib.suppress(OSError):  # cut
            while data := source.recv(_PIECE_BYTES):
                sink.sendall(data)
                setattr(self, counter, getattr(self, counter) + len(data))
                if self._bytes_per_s is None:
                    continue
                now = time.monotonic()
                due = max(due, now - _CATCH_UP_S) + len(data) / self._bytes_per_s
                if due > now:
                    time.sleep(due - now)
            sink.shutdown(socket.SHUT_WR)


if __name__ == "__main__":
    with Link(sys.argv[1], float(sys.argv[2])) as relay:
        print(relay.address, flush=True)
        sys.stdin.read()
