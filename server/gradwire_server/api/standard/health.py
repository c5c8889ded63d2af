"""gRPC's standard services: health, reflection, channelz.

They need the extra `server`. Without it the server works without them, and logs a
warning.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import grpc

from gradwire_protocol.limits import SERVICE, SESSION_SERVICE
from gradwire_server.errors import ListenError

_log = logging.getLogger("gradwire_server")

try:
    from grpc_channelz.v1 import channelz
    from grpc_health.v1 import health, health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection, reflection_pb2

    AVAILABLE = True
except ImportError:
    AVAILABLE = False

if TYPE_CHECKING:
    from grpc_health.v1.health_pb2 import (
        HealthCheckRequest,
        HealthCheckResponse,
        HealthListRequest,
        HealthListResponse,
    )


class Health:
    """The state of grpc.health.v1, for the server ("") and for its service.

    The package's own servicer is not used: it holds a lock while it writes to a client.
    A client that does not read would block the updates for other clients, and a server
    that announces its stop.
    """

    def __init__(self) -> None:
        self._status: dict[str, int] = {}
        self._changed = asyncio.Event()
        self.not_serving()  # until the server has started

    def serving(self) -> None:
        """Report that new jobs are accepted."""
        if AVAILABLE:
            self._set(health_pb2.HealthCheckResponse.SERVING)

    def not_serving(self) -> None:
        """Report that no jobs are accepted: not yet, or no longer."""
        if AVAILABLE:
            self._set(health_pb2.HealthCheckResponse.NOT_SERVING)

    async def Check(  # noqa: N802 - as the protocol names it
        self, request: HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> HealthCheckResponse | None:
        """Return the current status."""
        status = self._status.get(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "there is no such service")
        return health_pb2.HealthCheckResponse(status=status)

    async def List(  # noqa: N802 - as the protocol names it
        self, _: HealthListRequest, __: grpc.aio.ServicerContext[Any, Any]
    ) -> HealthListResponse:
        """Return all current statuses."""
        statuses = {
            name: health_pb2.HealthCheckResponse(status=status)
            for name, status in self._status.items()
        }
        return health_pb2.HealthListResponse(statuses=statuses)

    async def Watch(  # noqa: N802 - as the protocol names it
        self, request: HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        """Send the current status, and every change."""
        told = None
        while True:
            changed = self._changed
            unknown = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
            status = self._status.get(request.service, unknown)
            if status == told:
                await changed.wait()
                continue
            await context.write(health_pb2.HealthCheckResponse(status=status))
            told = status

    def _set(self, status: int) -> None:
        self._status = dict.fromkeys(("", SERVICE, SESSION_SERVICE), status)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


def add(server: grpc.aio.Server, status: Health) -> None:
    """Add the standard services to a server that has not started."""
    if not AVAILABLE:
        _log.warning(
            "health, reflection and channelz are not served: "
            "install gradwire[server] for them"
        )
        return
    add_health(server, status)
    channelz.add_channelz_servicer(server)
    names = [SERVICE, SESSION_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME]
    _add_reflection(server, [*names, "grpc.channelz.v1.Channelz"])


def _add_reflection(server: grpc.aio.Server, names: list[str]) -> None:
    """Serve reflection in both versions, whose messages have the same fields.

    grpcio-reflection has v1alpha alone (grpc/grpc#38576). Clients in other languages
    ask for v1, and some of them for nothing else.
    """
    reflection.enable_server_reflection(names, server)
    method = grpc.stream_stream_rpc_method_handler(
        reflection.aio.ReflectionServicer(names).ServerReflectionInfo,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    v1 = "grpc.reflection.v1.ServerReflection"
    handler = grpc.method_handlers_generic_handler(v1, {"ServerReflectionInfo": method})
    server.add_generic_rpc_handlers((handler,))


def add_health(server: grpc.aio.Server, status: Health) -> None:
    """Add the health service alone to a server that has not started.

    Raises:
        ListenError: Its package is not installed.
    """
    if not AVAILABLE:
        raise ListenError(
            "health_listen is set, and grpcio-health-checking is not installed: "
            "install gradwire[server]"
        )
    health_pb2_grpc.add_HealthServicer_to_server(status, server)
