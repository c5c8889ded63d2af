"""A plaintext port with the health service and nothing else.

Probes such as a kubelet's speak no TLS and have no credentials.
"""

from __future__ import annotations

import grpc

from gradwire_server.api.open_calls import OpenCalls
from gradwire_server.api.standard.guard import StandardServiceGuard
from gradwire_server.api.standard.health import Health, add_health
from gradwire_server.transports import listener
from gradwire_server.transports.lasting_server import LastingServer


class HealthListener:
    """Answers for a server's health on an address of its own.

    Args:
        address: HOST:PORT, or PORT of loopback; port 0 takes a free port.
        status: The server's health.

    Raises:
        ListenError: The address cannot be listened on, or a package is missing.

    Attributes:
        address: The address for probes.
    """

    def __init__(self, address: str, status: Health) -> None:
        self._calls = OpenCalls()
        self._status = status
        server = self._new_server()
        self.address = listener.bind_probes(server, address)
        self._server = LastingServer(server, self._again)

    def _new_server(self) -> grpc.aio.Server:
        server = grpc.aio.server(
            interceptors=[self._calls, StandardServiceGuard()], options=_CHANNEL_OPTIONS
        )
        add_health(server, self._status)
        return server

    async def _again(self) -> grpc.aio.Server:
        server = self._new_server()
        listener.bind_probes(server, self.address)
        return server

    async def start(self) -> None:
        """Begin to answer."""
        await self._server.start()

    async def close(self) -> None:
        """End all calls, and close the port."""
        await self._server.stop(None)
        await self._calls.wait_ended(_UNWIND_S)


_CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    # A taken port is an error, not a second server behind the same address.
    ("grpc.so_reuseport", 0),
    # A watcher whose machine is gone does not stay for ever.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
)

_UNWIND_S = 1.0
