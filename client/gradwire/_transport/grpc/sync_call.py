"""Running calls, for programs that wait.

gRPC takes requests from an iterator, which it runs in a thread of its own,
while the caller's thread reads: so both directions go on at once.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias, TypeVar

import grpc

from gradwire._api.errors import ProtocolError
from gradwire._api.options import MetadataPairs, Options
from gradwire._arrays.buffer_pool import keep_messages
from gradwire._client.job_factory import (
    COMPUTE,
    COMPUTE_STREAM,
    GET_SERVER_INFO,
    OPEN_REGION,
)
from gradwire._core.exchange import ExchangeProtocol
from gradwire._transport.endpoint import Endpoint
from gradwire._transport.grpc import fork_support
from gradwire._transport.grpc.grpc_errors import call_error
from gradwire._transport.shm.policy import OPEN_TIMEOUT_S
from gradwire._transport.shm.segments import Segment
from gradwire_protocol.v1.gradient_service_pb2 import (
    ComputeRequest,
    ComputeResponse,
    GetServerInfoRequest,
    GetServerInfoResponse,
    OpenRegionRequest,
    OpenRegionResponse,
)

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")

Rpc: TypeAlias = "grpc._CallIterator[bytes]"


class Connection:
    """A channel, and the service's calls on it."""

    def __init__(self, endpoint: Endpoint) -> None:
        keep_messages()
        self.endpoint = endpoint
        self.channel = endpoint.channel()
        authorized = endpoint.authorized
        self.compute = authorized(
            self.channel.unary_unary(
                COMPUTE,
                request_serializer=ComputeRequest.SerializeToString,
                response_deserializer=ComputeResponse.FromString,
            )
        )
        self.info = authorized(
            self.channel.unary_unary(
                GET_SERVER_INFO,
                request_serializer=GetServerInfoRequest.SerializeToString,
                response_deserializer=GetServerInfoResponse.FromString,
            )
        )
        self._region = authorized(
            self.channel.unary_stream(
                OPEN_REGION,
                request_serializer=OpenRegionRequest.SerializeToString,
                response_deserializer=OpenRegionResponse.FromString,
            )
        )
        # Without serializers both sides of the stream are given plain bytes.
        self.stream: grpc.StreamStreamMultiCallable[bytes, bytes] = authorized(
            self.channel.stream_stream(COMPUTE_STREAM)
        )

    def open_region(self, size_bytes: int, metadata: MetadataPairs) -> Segment:
        """A region, which lasts until it is closed.

        Raises:
            GradwireError: The server refuses it, or it cannot be opened here.
        """
        request = OpenRegionRequest(size_bytes=size_bytes)
        with fork_support.calling():
            rpc = self._region(request, metadata=metadata)
        process = os.getpid()

        def end() -> None:
            if os.getpid() == process:  # else the call is the parent's
                with fork_support.calling():
                    rpc.cancel()

        too_late = threading.Timer(OPEN_TIMEOUT_S, end)
        too_late.daemon = True
        too_late.start()
        try:
            with fork_support.waiting():
                answer = next(rpc)
            region = Segment(answer, end)
        except BaseException as error:
            end()
            if isinstance(error, StopIteration):
                raise ProtocolError("the server ended a region at once") from None
            if isinstance(error, grpc.RpcError):
                raise call_error(error, self.endpoint) from None
            raise
        finally:
            too_late.cancel()
        ended = region.on_end()
        if not rpc.add_callback(ended):
            ended()
        return region


def call_unary(
    method: grpc.UnaryUnaryMultiCallable[_Request, _Response],
    request: _Request,
    timeout_s: float | None,
    metadata: Sequence[tuple[str, str | bytes]],
) -> _Response:
    """What a method with one message each way answers.

    Raises:
        grpc.RpcError: It ended with a status other than OK.
    """
    options: Any = {"timeout": timeout_s, "metadata": metadata}
    if threading.active_count() == 1:
        # The quickest way waits inside gRPC. Nobody can fork meanwhile.
        return method(request, **options)
    with fork_support.calling():
        future = method.future(request, **options)
        running = fork_support.Running()
    try:
        with fork_support.waiting():
            return future.result()
    except BaseException:
        future.cancel()
        raise
    finally:
        running.end()


class Call:
    """A running ComputeStream: an iterator of the server's messages.

    As a context manager it is cancelled unless it came to its end.

    Args:
        connection: Over which it goes.
        exchange: Whose header is sent first.
        messages: Gives what is sent after the server took the job on.
        options: The job's.
    """

    def __init__(
        self,
        connection: Connection,
        exchange: ExchangeProtocol,
        messages: Callable[[], Iterator[bytes]],
        options: Options,
    ) -> None:
        self._endpoint = connection.endpoint
        self._job_id = options.job_id
        self._exchange = exchange
        self._feed = Feed(exchange.opening(), messages)
        with fork_support.calling():
            self._rpc = connection.stream(
                self._feed.requests(),
                timeout=options.timeout_s,
                metadata=options.metadata,
            )
            self._running = fork_support.Running()
        self._feed.attach(self._rpc.cancel)

    def __enter__(self) -> Call:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        """The server's next message.

        Raises:
            StopIteration: The server has ended the call with OK.
            GradwireError: The call ended otherwise.
            BaseException: What the messages raised, unchanged.
        """
        if self._exchange.accepted is not None:
            self._feed.go()
        try:
            with fork_support.waiting():
                message: bytes = next(self._rpc)
        except StopIteration:
            self._feed.raise_error()
            raise
        except grpc.RpcError as error:
            self._feed.raise_error()
            raise call_error(error, self._endpoint, self._job_id) from None
        return message

    def cancel(self) -> None:
        """End the call, unless it has ended."""
        if self._running.inherited:
            return
        self._running.end()
        self._feed.stop()
        with fork_support.calling():
            self._rpc.cancel()


class Feed:
    """The requests of one call, as gRPC's thread draws them."""

    def __init__(self, opening: bytes, messages: Callable[[], Iterator[bytes]]) -> None:
        self._opening = opening
        self._messages = messages
        self._settled = threading.Event()
        self._stopped = False
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._cancel: Callable[[], object] | None = None

    def requests(self) -> Iterator[bytes]:
        """The header, then, once the server took the job on, the rest."""
        with fork_support.waiting():
            yield self._opening
        self._settled.wait()
        if self._stopped:
            return
        try:
            for message in self._messages():
                with fork_support.waiting():
                    yield message
                if self._stopped:
                    return
        except GeneratorExit:
            raise
        except BaseException as error:  # noqa: BLE001 - raised again by the reader
            self._fail(error)

    def attach(self, cancel: Callable[[], object]) -> None:
        """How the call is ended when the messages fail."""
        with self._lock:
            self._cancel = cancel
            failed = self._error is not None
        if failed:
            cancel()

    def go(self) -> None:
        """Let what follows the header be sent."""
        self._settled.set()

    def stop(self) -> None:
        """Send no more."""
        self._stopped = True
        self._settled.set()

    def raise_error(self) -> None:
        """Raise what the messages raised, if they did."""
        with self._lock:
            error, self._error = self._error, None
        if error is not None:
            raise error

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._error = error
            cancel = self._cancel
        if cancel is not None:
            cancel()
