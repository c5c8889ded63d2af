"""Input, output and handshakes on non-blocking sockets, awaited in the event loop.

asyncio's own functions for sockets do not know TLS, and its streams would keep what
they have read: a socket here is later used by a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from concurrent.futures import Executor


async def readable(sock: socket.socket) -> None:
    """Wait until a socket has something to read or accept."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    descriptor = sock.fileno()
    loop.add_reader(descriptor, _set, ready)
    try:
        await ready
    finally:
        loop.remove_reader(descriptor)


async def _writable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    descriptor = sock.fileno()
    loop.add_writer(descriptor, _set, ready)
    try:
        await ready
    finally:
        loop.remove_writer(descriptor)


def _set(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


async def receive(sock: socket.socket, size: int) -> bytes:
    """Receive so many bytes and none behind them.

    Raises:
        EOFError: The peer has closed the socket.
        OSError: The connection is broken.
    """
    data = b""
    while len(data) < size:
        try:
            part = sock.recv(size - len(data))
        except (BlockingIOError, ssl.SSLWantReadError):
            await readable(sock)
        except ssl.SSLWantWriteError:
            await _writable(sock)
        else:
            if not part:
                raise EOFError
            data += part
    return data


async def handshake(sock: ssl.SSLSocket, executor: Executor) -> None:
    """Do a TLS handshake. Threads of the executor do the steps: they sign.

    The socket may be closed as soon as this has returned or raised.

    Raises:
        OSError: The handshake failed; the text gives the cause.
    """
    while True:
        try:
            await _step(sock, executor)
        except ssl.SSLWantReadError:
            await readable(sock)
        except ssl.SSLWantWriteError:
            await _writable(sock)
        else:
            return


async def _step(sock: ssl.SSLSocket, executor: Executor) -> None:
    submitted = executor.submit(sock.do_handshake)
    done = asyncio.wrap_future(submitted)
    try:
        await asyncio.shield(done)
    except asyncio.CancelledError:
        # A thread that uses the descriptor when it is closed could write to another
        # connection, which has its number then.
        while not submitted.cancel() and not submitted.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([done])
        raise
