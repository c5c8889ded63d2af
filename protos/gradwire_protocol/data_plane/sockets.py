"""Blocking input and output of whole buffers on the sockets of direct connections.

A socket is used by one thread. Another thread may call `shutdown`, which ends a blocked
call. The interpreter's lock is released while the kernel copies.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import time
from pathlib import Path

BUFFER_BYTES = 4 << 20
"""Size of a socket's buffers, where the system allows it."""

_SILENCE_S = 10
"""Seconds without bytes after which the system probes whether the peer is alive."""

_POLL_S = 1
"""Seconds after which a receive or send that got on returns, to show that it did."""

_TLS_PIECE_BYTES = 256 << 10


class DirectSocket:
    """A socket of a direct connection.

    Args:
        sock: A connected TCP socket, perhaps under TLS. It is closed with this object.

    Attributes:
        moved_at: When bytes last moved; `time.monotonic`.
        sending: Whether a thread is in `send`, perhaps because the peer does not read.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._tls = isinstance(sock, ssl.SSLSocket)
        self.moved_at = time.monotonic()
        self.sending = False

    def fileno(self) -> int:
        """Return the descriptor; -1: closed."""
        return self._sock.fileno()

    @property
    def raw(self) -> socket.socket:
        """The socket, for use in an event loop."""
        return self._sock

    def set_blocking(self) -> None:
        """Make calls block, but return now and then after partial progress."""
        self._sock.settimeout(None)
        # Not `settimeout`: it makes the socket non-blocking, without MSG_WAITALL.
        interval = struct.pack("ll", _POLL_S, 0)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, interval)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, interval)

    def receive(self, into: memoryview) -> None:
        """Fill a buffer of bytes.

        Raises:
            EOFError: The peer has closed the socket.
            OSError: The connection is broken.
        """
        got, size = 0, len(into)
        while got < size:
            try:
                if self._tls:
                    count = self._sock.recv_into(into[got:] if got else into)
                else:
                    count = self._sock.recv_into(
                        into[got:] if got else into, 0, socket.MSG_WAITALL
                    )
            except BlockingIOError:  # nothing came for a while
                continue
            if not count:
                raise EOFError
            got += count
            self.moved_at = time.monotonic()

    def send(self, header: bytes, payload: memoryview | bytes = b"") -> None:
        """Send a header and the payload behind it.

        Raises:
            OSError: The connection is broken.
        """
        self.sending = True
        if self._tls:
            self._send_tls(header, payload)
        else:
            self._send_plain(header, payload)
        self.sending = False

    def _send_plain(self, header: bytes, payload: memoryview | bytes) -> None:
        parts = [memoryview(header), memoryview(payload)]
        while parts:
            try:
                sent = self._sock.sendmsg(parts)
            except BlockingIOError:  # the peer did not read for a while
                continue
            self.moved_at = time.monotonic()
            while parts and sent >= len(parts[0]):
                sent -= len(parts.pop(0))
            if parts:
                parts[0] = parts[0][sent:]

    def _send_tls(self, header: bytes, payload: memoryview | bytes) -> None:
        self._sock.sendall(header)
        for first in range(0, len(payload), _TLS_PIECE_BYTES):
            self._sock.sendall(payload[first : first + _TLS_PIECE_BYTES])
            self.moved_at = time.monotonic()

    def is_idle(self) -> bool:
        """Return whether the connection is open, with nothing to receive."""
        if isinstance(self._sock, ssl.SSLSocket) and self._sock.pending():
            return False
        flags = socket.MSG_PEEK | socket.MSG_DONTWAIT
        try:
            # Not SSLSocket.recv, which takes no flags.
            socket.socket.recv(self._sock, 1, flags)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def shutdown(self) -> None:
        """End all use of the connection, also in other threads."""
        with contextlib.suppress(OSError):
            # Not SSLSocket.shutdown: it would drop the TLS state under a running call.
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket. No other thread may use it then."""
        self._sock.close()


def tune(sock: socket.socket) -> None:
    """Set the options of a socket for direct connections, before it connects."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for name, value in (
        ("SO_KEEPALIVE", 1),
        ("TCP_KEEPIDLE", _SILENCE_S),
        ("TCP_KEEPINTVL", 2),
        ("TCP_KEEPCNT", 4),
        # Not TCP_USER_TIMEOUT: it would also end connections whose peer is busy and
        # does not read for a while. The call beside them notices a dead peer.
    ):
        option = getattr(socket, name, None)
        if option is not None:
            level = socket.SOL_SOCKET if name == "SO_KEEPALIVE" else socket.IPPROTO_TCP
            sock.setsockopt(level, option, value)
    for option, limit in (
        (socket.SO_SNDBUF, "wmem_max"),
        (socket.SO_RCVBUF, "rmem_max"),
    ):
        # A size that is set turns the system's own tuning off: only where it helps.
        if _system_limit(limit) >= BUFFER_BYTES:
            sock.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)


def _system_limit(name: str) -> int:
    try:
        return int(Path("/proc/sys/net/core", name).read_text())
    except (OSError, ValueError):
        return 0
