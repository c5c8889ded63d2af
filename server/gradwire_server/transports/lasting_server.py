"""A gRPC server that outlasts requests at which gRPC itself fails."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

_log = logging.getLogger("gradwire_server")


class LastingServer:
    """A gRPC server that is made anew when gRPC has ended it.

    grpcio (1.85) decodes each call's path in the task that accepts calls. A path that
    is no UTF-8 ends this task, and gRPC closes all ports for good; anybody who reaches
    one can send such a path. Calls that run are not ended by it, and go on.

    Args:
        server: The server, with its ports and handlers, not started.
        again: Makes another one with the same ports and handlers.
    """

    def __init__(
        self, server: grpc.aio.Server, again: Callable[[], Awaitable[grpc.aio.Server]]
    ) -> None:
        self._server = server
        self._again = again
        self._ended: dict[grpc.aio.Server, asyncio.Task[None]] = {}
        """Servers that gRPC has ended, whose calls go on."""
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to serve."""
        await self._server.start()
        self._watch = asyncio.create_task(self._replace_when_ended())

    async def stop(self, grace_s: float | None) -> None:
        """Close the ports; end all calls after `grace_s`, or at once."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait([self._watch])
        every = [self._server, *self._ended]
        await asyncio.gather(*(each.stop(grace_s) for each in every))
        if self._ended:
            await asyncio.wait(self._ended.values())

    async def _replace_when_ended(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            if _is_running(self._server):
                continue
            _log.error("gRPC failed at a request and closed its ports: reopening them")
            ended = self._server
            self._ended[ended] = asyncio.create_task(self._release(ended))
            self._server = await self._replaced()
            _log.info("the ports are open again")

    async def _replaced(self) -> grpc.aio.Server:
        told = False
        while True:
            try:
                server = await self._again()
                await server.start()
            except OSError as error:  # perhaps the ports are not closed yet
                if not told:
                    _log.warning("a port is not open", extra={"error": str(error)})
                told = True
                await asyncio.sleep(_RETRY_S)
            else:
                return server

    async def _release(self, server: grpc.aio.Server) -> None:
        """Free what a server holds that gRPC has ended, when its calls have ended."""
        with contextlib.suppress(Exception):  # what has ended it; gRPC has logged it
            await server.wait_for_termination()
        await server.stop(None)
        self._ended.pop(server, None)


def _is_running(server: Any) -> bool:
    """Return whether a server accepts calls. gRPC tells nobody when it ends one."""
    is_running = getattr(server._server, "is_running", None)
    return is_running is None or bool(is_running())


_LOOK_S = 0.05

_RETRY_S = 0.1
