"""The service's methods on a synchronous or asynchronous channel."""

from __future__ import annotations

import warnings
from typing import Any

from gradwire._transport.endpoint import Endpoint
from gradwire_protocol.limits import (
    COMPUTE,
    COMPUTE_STREAM,
    GET_SERVER_INFO,
    OPEN_REGION,
)
from gradwire_protocol.v1.gradient_service_pb2 import (
    ComputeRequest,
    ComputeResponse,
    GetServerInfoRequest,
    GetServerInfoResponse,
    OpenRegionRequest,
    OpenRegionResponse,
)


def warn_dropped(client_name: str, address: str) -> None:
    """Warn of a client that was dropped without being closed."""
    warnings.warn(
        f"{client_name} of {address} was dropped and not closed: use it as a context"
        " manager, or call close()",
        ResourceWarning,
        stacklevel=2,
    )


class Methods:
    """The service's methods, called with the endpoint's token.

    Args:
        channel: A `grpc.Channel` or a `grpc.aio.Channel`.
        endpoint: The server of the channel.
    """

    def __init__(self, channel: Any, endpoint: Endpoint) -> None:
        authorized = endpoint.authorized
        self.compute = authorized(
            channel.unary_unary(
                COMPUTE,
                request_serializer=ComputeRequest.SerializeToString,
                response_deserializer=ComputeResponse.FromString,
            )
        )
        self.server_info = authorized(
            channel.unary_unary(
                GET_SERVER_INFO,
                request_serializer=GetServerInfoRequest.SerializeToString,
                response_deserializer=GetServerInfoResponse.FromString,
            )
        )
        self.open_region = authorized(
            channel.unary_stream(
                OPEN_REGION,
                request_serializer=OpenRegionRequest.SerializeToString,
                response_deserializer=OpenRegionResponse.FromString,
            )
        )
        # Without serializers, messages in both directions are bytes.
        self.stream = authorized(channel.stream_stream(COMPUTE_STREAM))
