"""The service's methods on a synchronous or asynchronous channel."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from google.protobuf.message import Message

from gradwire._api.errors import ClientStateError
from gradwire._transport.endpoint import Endpoint
from gradwire_protocol.limits import (
    COMPUTE,
    COMPUTE_STREAM,
    GET_SERVER_INFO,
    GET_TENSOR,
    OPEN_REGION,
    PUT_TENSOR,
    SESSION_SERVICE,
)
from gradwire_protocol.v1 import session_service_pb2
from gradwire_protocol.v1.gradient_service_pb2 import (
    ComputeRequest,
    ComputeResponse,
    GetServerInfoRequest,
    GetServerInfoResponse,
    OpenRegionRequest,
    OpenRegionResponse,
)

_SESSION_METHODS: dict[str, type[Message]] = {
    "OpenSession": session_service_pb2.OpenSessionResponse,
    "RenewSession": session_service_pb2.RenewSessionResponse,
    "CloseSession": session_service_pb2.CloseSessionResponse,
    "ListSessions": session_service_pb2.ListSessionsResponse,
    "DescribeSession": session_service_pb2.DescribeSessionResponse,
    "DropTensors": session_service_pb2.DropTensorsResponse,
    "SaveSession": session_service_pb2.SaveSessionResponse,
    "ListSavedStates": session_service_pb2.ListSavedStatesResponse,
    "DeleteSavedState": session_service_pb2.DeleteSavedStateResponse,
    "Step": session_service_pb2.StepResponse,
}
"""The methods with one message each way, and the types of their answers."""


def _encoded(message: Message) -> bytes:
    return message.SerializeToString()


def require_real_threads() -> None:
    """Check that gevent or eventlet have not replaced threads by green ones.

    gRPC waits in threads of its own, and streams through green threads hang.

    Raises:
        ClientStateError: They have.
    """
    monkey = sys.modules.get("gevent.monkey")
    patcher = sys.modules.get("eventlet.patcher")
    if monkey is not None and monkey.is_module_patched("threading"):
        name = "gevent"
    elif patcher is not None and patcher.is_monkey_patched("thread"):
        name = "eventlet"
    else:
        return
    raise ClientStateError(
        f"{name} has replaced threads by green ones in this process, in which gRPC's"
        f" streams hang: leave threads unpatched (thread=False), or use gradwire in a"
        " process of its own"
    )


def require_running_interpreter() -> None:
    """Check that the interpreter is not shutting down.

    Its last objects are deleted after gRPC's threads have stopped: a stream that is
    read in ``__del__`` would be waited for without end, whatever its timeout.

    Raises:
        ClientStateError: It is shutting down.
    """
    if sys.is_finalizing():
        raise ClientStateError(
            "the interpreter is shutting down, and the threads that gRPC needs have"
            " stopped: make last calls in a function registered with atexit"
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
        self.sessions = {
            name: authorized(
                channel.unary_unary(
                    f"/{SESSION_SERVICE}/{name}",
                    request_serializer=_encoded,
                    response_deserializer=answer.FromString,
                )
            )
            for name, answer in _SESSION_METHODS.items()
        }
        # As long as no direct connection is offered, one side has one message.
        self.put_tensor = authorized(channel.stream_unary(PUT_TENSOR))
        self.get_tensor = authorized(channel.unary_stream(GET_TENSOR))
        # Without serializers, messages in both directions are bytes.
        self.streams = {
            name: authorized(channel.stream_stream(name))
            for name in (COMPUTE_STREAM, PUT_TENSOR, GET_TENSOR)
        }
