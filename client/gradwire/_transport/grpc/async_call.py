"""Running calls, for programs with an event loop.

A task writes while the caller's coroutine reads, so both directions go on at
once. One task alone writes, and nothing is read after a read was cancelled:
gRPC allows neither.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from functools import partial
from typing import Any, TypeAlias

import grpc
import grpc.aio
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # not in its stubs

from gradwire._api.errors import ConnectError, JobCancelledError, ProtocolError
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

_StreamCall: TypeAlias = grpc.aio.StreamStreamCall[bytes, bytes]


class AsyncConnection:
    """A channel, and the service's calls on it."""

    def __init__(self, endpoint: Endpoint) -> None:
        keep_messages()
        self.endpoint = endpoint
        self._loop = asyncio.get_running_loop()
        fork_support.aio_began()
        self.channel = endpoint.aio_channel()
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
        self.stream: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = authorized(
            self.channel.stream_stream(COMPUTE_STREAM)
        )

    async def open_region(self, size_bytes: int, metadata: MetadataPairs) -> Segment:
        """A region, which lasts until it is closed.

        Raises:
            GradwireError: The server refuses it, or it cannot be opened here.
        """
        rpc = self._region(OpenRegionRequest(size_bytes=size_bytes), metadata=metadata)
        region: Segment | None = None
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                answer = await rpc.read()
            if isinstance(answer, OpenRegionResponse):
                region = Segment(answer, partial(_cancel, rpc, self._loop))
        except TimeoutError:
            rpc.cancel()
            raise ConnectError(
                f"the server at {self.endpoint} opened no region in"
                f" {OPEN_TIMEOUT_S:g} s"
            ) from None
        except grpc.RpcError as error:
            raise call_error(error, self.endpoint) from None
        except BaseException:
            rpc.cancel()
            raise
        if region is None:
            raise ProtocolError("the server ended a region at once")
        rpc.add_done_callback(region.on_end())
        return region


class AsyncCall:
    """A running ComputeStream: an asynchronous iterator of its messages.

    Args:
        connection: Over which it goes.
        exchange: Whose header is sent first.
        messages: Gives what is sent after the server took the job on.
        options: The job's.
    """

    def __init__(
        self,
        connection: AsyncConnection,
        exchange: ExchangeProtocol,
        messages: Callable[[], AsyncGenerator[bytes]],
        options: Options,
    ) -> None:
        self._endpoint = connection.endpoint
        self._job_id = options.job_id
        self._exchange = exchange
        self._feed = Feed(exchange.opening(), messages)
        self._rpc = connection.stream(
            timeout=options.timeout_s, metadata=options.metadata
        )
        self._loop = asyncio.get_running_loop()
        self._writer = self._loop.create_task(self._feed.run(self._rpc))

    async def __aenter__(self) -> AsyncCall:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.cancel()

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        """The server's next message.

        Raises:
            StopAsyncIteration: The server has ended the call with OK.
            GradwireError: The call ended otherwise.
            BaseException: What the messages raised, unchanged.
        """
        if self._exchange.accepted is not None:
            self._feed.settled.set()
        try:
            message = await self._rpc.read()
        except asyncio.CancelledError:
            # gRPC raises this too where the writer has cancelled the call.
            self._feed.raise_error()
            task = asyncio.current_task()
            if task is not None and not task.cancelling():
                raise JobCancelledError(
                    "the job was cancelled by this side",
                    status=grpc.StatusCode.CANCELLED,
                    job_id=self._job_id,
                ) from None
            raise
        except grpc.RpcError as error:
            self._feed.raise_error()
            raise call_error(error, self._endpoint, self._job_id) from None
        if isinstance(message, bytes):
            return message
        self._feed.raise_error()
        raise StopAsyncIteration

    async def cancel(self) -> None:
        """End the call, unless it has ended, and wait for its writer."""
        self._end()
        await asyncio.wait([self._writer])

    def abandon(self) -> None:
        """End the call from wherever its owner was collected."""
        with contextlib.suppress(RuntimeError):  # the loop may be closed
            self._loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        self._rpc.cancel()
        self._writer.cancel()


class Feed:
    """The requests of one call, as its writer draws them."""

    def __init__(
        self, opening: bytes, messages: Callable[[], AsyncGenerator[bytes]]
    ) -> None:
        self.settled = asyncio.Event()
        self._opening = opening
        self._messages = messages
        self._error: BaseException | None = None

    async def run(self, rpc: _StreamCall) -> None:
        """The header, then, once the server took the job on, the rest."""
        try:
            # The writer lives as long as its call or almost.
            with fork_support.aio_calling():
                await self._write_all(rpc)
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # noqa: BLE001 - raised again by the reader
            self._error = error
            rpc.cancel()

    async def _write_all(self, rpc: _StreamCall) -> None:
        with contextlib.suppress(grpc.RpcError):
            await rpc.wait_for_connection()
        if not await _write(rpc, self._opening):
            return
        await self.settled.wait()
        async with contextlib.aclosing(self._messages()) as messages:
            async for message in messages:
                if not await _write(rpc, message):
                    return
        with contextlib.suppress(cygrpc.InternalError):
            await rpc.done_writing()

    def raise_error(self) -> None:
        """Raise what the messages raised, if they did."""
        error, self._error = self._error, None
        if error is not None:
            raise error


def _cancel(rpc: Any, loop: asyncio.AbstractEventLoop) -> None:
    """End a call from whatever thread; a closed loop has ended it already."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(rpc.cancel)


async def _write(rpc: Any, message: bytes) -> bool:
    """Whether it could be written; why not is for the reader to say.

    A write that finds the call over must leave it at that. grpc.aio's own gives
    the call a status that it makes up, for good: what was not read yet, the
    server's word on what went wrong included, would never be read.
    """
    if rpc.done():
        return False
    try:
        await rpc._cython_call.send_serialized_message(message)
    except cygrpc.InternalError:
        return False
    return True
