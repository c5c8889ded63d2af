"""A small HTTP server in the event loop, for pages that machines fetch.

It answers GET and HEAD and closes the connection. A client that is slow is cut off:
this server must not cost the jobs beside it anything. With too many connections, one
that has not sent its request makes room: clients that send none keep nobody else out.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import NamedTuple, TypeAlias

from gradwire_server.transports import listener

_log = logging.getLogger("gradwire_server")


class Page(NamedTuple):
    """The answer to a request."""

    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    status: HTTPStatus = HTTPStatus.OK


Serve: TypeAlias = Callable[[Mapping[str, str]], Awaitable[Page]]
"""Returns a page; the argument has the request's headers, by lower-case name."""


@dataclass(eq=False, slots=True)
class _Connection:
    """An open connection."""

    transport: asyncio.WriteTransport
    host: str
    since: float
    """By the event loop's clock."""
    asked: bool = False
    """Whether its request has come."""

    def may_be_ended(self, now: float) -> bool:
        """Return whether it may make room for another one."""
        return not self.asked or self.since < now - _YOUNG_S


class HttpListener:
    """Serves one page on an address.

    Args:
        address: HOST:PORT, or PORT of loopback; port 0 takes a free port.
        path: The page's path.
        serve: Returns the page.

    Raises:
        ListenError: The address cannot be listened on; the text gives the cause.

    Attributes:
        address: The address for clients.
    """

    def __init__(self, address: str, path: str, serve: Serve) -> None:
        self._path = path
        self._serve = serve
        self._connections: dict[asyncio.Task[object], _Connection] = {}
        """The oldest first."""
        self._servers: list[asyncio.Server] = []
        self.address, self._sockets = listener.listening_sockets(address)

    async def start(self) -> None:
        """Begin to answer."""
        for each in self._sockets:
            self._servers.append(
                await asyncio.start_server(
                    self._connected, sock=each, limit=_MAX_HEAD_BYTES
                )
            )

    async def close(self) -> None:
        """Close the port and all connections."""
        for server in self._servers:
            server.close()
        for each in self._sockets:
            each.close()
        # Not by cancelling: asyncio would log that as an error.
        for connection in self._connections.values():
            connection.transport.abort()
        if self._connections:
            await asyncio.wait(self._connections, timeout=_UNWIND_S)

    async def _connected(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        now = asyncio.get_running_loop().time()
        if task is None or not self._make_room(now):
            writer.transport.abort()
            return
        host, *_ = writer.get_extra_info("peername") or ("",)
        connection = _Connection(writer.transport, host, now)
        self._connections[task] = connection
        # `drain` then waits until the kernel has all of the answer.
        writer.transport.set_write_buffer_limits(high=0)
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                writer.write(await self._answer(reader, connection))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (TimeoutError, OSError, asyncio.IncompleteReadError):
            pass  # nobody is there to be told
        finally:
            writer.transport.abort()
            self._connections.pop(task, None)

    def _make_room(self, now: float) -> bool:
        """End a connection if there are too many; return whether there is room.

        It is the oldest of the host that has the most.
        """
        if len(self._connections) < _MAX_CONNECTIONS:
            return True
        old = {
            task: each
            for task, each in self._connections.items()
            if each.may_be_ended(now)
        }
        if not old:
            return False
        ((host, _),) = Counter(each.host for each in old.values()).most_common(1)
        task = next(task for task, each in old.items() if each.host == host)
        self._connections.pop(task).transport.abort()
        return True

    async def _answer(
        self, reader: asyncio.StreamReader, connection: _Connection
    ) -> bytes:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            return _encoded(_said(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE))
        connection.asked = True
        first, *lines = head.decode("latin-1").split("\r\n")
        try:
            method, target, protocol = first.split(" ")
        except ValueError:
            return _encoded(_said(HTTPStatus.BAD_REQUEST))
        if not protocol.startswith("HTTP/1."):
            return _encoded(_said(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED))
        if method not in {"GET", "HEAD"}:
            return _encoded(_said(HTTPStatus.METHOD_NOT_ALLOWED), "Allow: GET, HEAD")
        if target.partition("?")[0] != self._path:
            page = _said(HTTPStatus.NOT_FOUND, f"this port serves {self._path}")
        else:
            page = await self._page(lines)
        return _encoded(page, body=method == "GET")

    async def _page(self, lines: list[str]) -> Page:
        headers = {}
        for line in lines:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        try:
            return await self._serve(headers)
        except Exception:  # noqa: BLE001 - logged; the connection gets a status
            _log.exception("a page could not be made", extra={"path": self._path})
            return _said(HTTPStatus.INTERNAL_SERVER_ERROR)


def _said(status: HTTPStatus, more: str = "") -> Page:
    text = f"{status.value} {status.phrase}" + (f": {more}" if more else "")
    return Page(f"{text}\n".encode(), status=status)


def _encoded(page: Page, *headers: str, body: bool = True) -> bytes:
    lines = (
        f"HTTP/1.1 {page.status.value} {page.status.phrase}",
        f"Content-Type: {page.content_type}",
        f"Content-Length: {len(page.body)}",
        "Connection: close",
        *headers,
        "",
        "",
    )
    head = "\r\n".join(lines).encode("latin-1")
    return head + page.body if body else head


_MAX_HEAD_BYTES = 16 * 1024
"""Most bytes of a request: its line and its headers."""

_MAX_CONNECTIONS = 32

_YOUNG_S = 1.0
"""Age below which a connection whose request has come is not ended: its answer takes
milliseconds."""

_UNWIND_S = 1.0

_TIMEOUT_S = 10.0
"""For the request and its answer: Prometheus waits that long by default."""
