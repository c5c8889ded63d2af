"""gRPC's standard services: health, reflection, channelz.

They come with the extra `server`. Without it the server does its work all
the same, and its log says what is missing.
"""

from __future__ import annotations

import logging

import grpc

from gradwire.wire.limits import SERVICE

_log = logging.getLogger("gradwire_server")

try:
    from grpc_channelz.v1 import channelz
    from grpc_health.v1 import health, health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection

    AVAILABLE = True
except ImportError:
    AVAILABLE = False


class Health:
    """What grpc.health.v1 answers, for the server ("") and for its service."""

    def __init__(self) -> None:
        self.servicer = health.aio.HealthServicer() if AVAILABLE else None

    async def serving(self) -> None:
        """New jobs are welcome."""
        if self.servicer is not None:
            for name in ("", SERVICE):
                await self.servicer.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def not_serving(self) -> None:
        """New jobs are refused, for good."""
        if self.servicer is not None:
            await self.servicer.enter_graceful_shutdown()


def add(server: grpc.aio.Server, status: Health) -> None:
    """Adds the standard services to a server that has not started."""
    if not AVAILABLE or status.servicer is None:
        _log.warning(
            "health, reflection and channelz are not served: "
            "install gradwire[server] for them"
        )
        return
    health_pb2_grpc.add_HealthServicer_to_server(status.servicer, server)
    channelz.add_channelz_servicer(server)
    names = [SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME]
    reflection.enable_server_reflection([*names, "grpc.channelz.v1.Channelz"], server)
