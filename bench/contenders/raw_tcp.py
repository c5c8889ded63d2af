"""A TCP socket and nothing above it: sizes, operands, results.

The server reuses its arrays for operands and results in every call, and sends each
result as soon as it is computed. Where nothing is computed, both directions run at
once, in a thread each at both ends. As a script, this module is the server.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable

import numpy as np

from bench.contenders.duplex import meanwhile
from bench.contenders.interface import ArrayContender, Arrays
from bench.contenders.server_process import HOST, ServerProcess, say_ready
from bench.work import COMPUTES, Array, empty_results, unset_results

_SIZES = struct.Struct("<3q")
_BUFFER_BYTES = 4 << 20


def prepare(connection: socket.socket) -> None:
    """Set TCP_NODELAY and the largest allowed buffers."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        connection.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)


def receive(connection: socket.socket, array: Array) -> None:
    """Receive an array.

    Raises:
        EOFError: The peer closed the connection too early.
    """
    view = memoryview(array).cast("B")
    while view:
        taken = connection.recv_into(view)
        if not taken:
            raise EOFError
        view = view[taken:]


def send(connection: socket.socket, array: Array) -> None:
    """Send an array without a copy."""
    connection.sendall(memoryview(array).cast("B"))


def _receive_all(connection: socket.socket, arrays: Iterable[Array]) -> None:
    for array in arrays:
        receive(connection, array)


def _send_all(connection: socket.socket, arrays: Iterable[Array]) -> None:
    for array in arrays:
        send(connection, array)


def _exchange(
    connection: socket.socket, ours: Iterable[Array], theirs: Iterable[Array]
) -> None:
    """Send arrays and receive others at once."""
    with meanwhile(lambda: _send_all(connection, ours)):
        _receive_all(connection, theirs)


class RawTcp(ArrayContender):
    """One client, one connection, one call after the other."""

    def __init__(self) -> None:
        self._connection: socket.socket | None = None

    def start(self) -> None:
        self.server = ServerProcess.of_module(__name__)
        self._connection = socket.create_connection(self.server.host_and_port)
        prepare(self._connection)

    def gradients(self, x: Array, w: Array, dy: Array, out: Arrays | None) -> Arrays:
        assert self._connection is not None
        results = out or empty_results(x, w, dy)
        self._connection.sendall(_SIZES.pack(*x.shape, w.shape[1]))
        if COMPUTES:
            _send_all(self._connection, (x, w, dy))
            _receive_all(self._connection, results)
        else:
            _exchange(self._connection, (x, w, dy), results)
        return results

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        if self.server is not None:
            self.server.stop()


create = RawTcp


def _serve() -> None:
    with socket.create_server((HOST, 0)) as listener:
        say_ready(f"{HOST}:{listener.getsockname()[1]}")
        connection, _ = listener.accept()
    prepare(connection)
    sizes, known = np.empty(3, np.int64), None
    while True:
        try:
            receive(connection, sizes)
        except EOFError:
            return
        m, n, k = sizes.tolist()
        if (m, n, k) != known:
            known = (m, n, k)
            shapes = ((m, n), (n, k), (m, k))
            x, w, dy = (np.empty(shape, np.float32) for shape in shapes)
            y, dx, dw = empty_results(x, w, dy)
        if not COMPUTES:
            _exchange(connection, unset_results(m, n, k), (x, w, dy))
            continue
        _receive_all(connection, (x, w, dy))
        send(connection, np.matmul(x, w, out=y))
        send(connection, np.matmul(dy, w.T, out=dx))
        send(connection, np.matmul(x.T, dy, out=dw))


if __name__ == "__main__":
    _serve()
