"""Asynchronous connections and calls.

A task writes while the caller's coroutine reads, so both directions run concurrently.
Only one task writes, and nothing is read after a cancelled read, because gRPC allows
neither. `sync_call` has the same names, with Sync instead of Async.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from functools import partial
from typing import Any, TypeAlias

import grpc
import grpc.aio
from google.protobuf.message import Message
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # not in its stubs

from gradwire._api.errors import (
    ClientStateError,
    ConnectError,
    GradwireError,
    ProtocolError,
)
from gradwire._api.options import (
    CallOptions,
    MetadataPairs,
    Options,
    deadline_of,
)
from gradwire._arrays.buffer_pool import raise_mmap_threshold
from gradwire._core.exchange import ExchangeProtocol
from gradwire._transport.endpoint import Endpoint
from gradwire._transport.grpc import fork_support
from gradwire._transport.grpc.grpc_errors import (
    call_error,
    cancelled_error,
    connect_error,
    forget_frames,
    late_error,
    session_error,
    starting,
)
from gradwire._transport.grpc.methods import (
    Methods,
    require_real_threads,
    require_running_interpreter,
    warn_dropped,
)
from gradwire._transport.shm.policy import OPEN_TIMEOUT_S
from gradwire._transport.shm.segments import Segment, proof_of
from gradwire_protocol.limits import COMPUTE_STREAM
from gradwire_protocol.v1.gradient_service_pb2 import (
    ComputeRequest,
    ComputeResponse,
    GetServerInfoRequest,
    GetServerInfoResponse,
    OpenRegionRequest,
    OpenRegionResponse,
    RegionChallenge,
)

_StreamStreamCall: TypeAlias = grpc.aio.StreamStreamCall[bytes, bytes]


class AsyncConnector:
    """Connects to a server on first use.

    The connection belongs to the event loop of its first use, and to the process that
    created the connector.

    Args:
        endpoint: The server's address.
        on_fork: Unused, because a child process cannot use the connection.
    """

    def __init__(self, endpoint: Endpoint, on_fork: Callable[[], object]) -> None:
        del on_fork
        self._endpoint = endpoint
        self._pid = os.getpid()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._connection: AsyncConnection | None = None
        self._closed = False
        self._dropped: weakref.finalize[..., AsyncConnector] | None = None

    def connection(self) -> AsyncConnection:
        """Return the connection.

        Raises:
            ClientStateError: The connection cannot be used here.
        """
        require_running_interpreter()
        fork_support.require_calls()
        if self._closed:
            raise ClientStateError(f"the connection to {self._endpoint} is closed")
        if fork_support.aio_lost is not None:
            raise ClientStateError(fork_support.aio_lost)
        loop = asyncio.get_running_loop()
        if os.getpid() != self._pid:
            raise ClientStateError(
                "this AsyncClient was created before the process forked: create a new"
                " one in the child"
            )
        if self._loop is None:
            self._loop = loop
        elif self._loop is not loop:
            raise ClientStateError(
                "this AsyncClient belongs to another event loop, that of its first"
                " use: create one for each loop"
            )
        if self._connection is None:
            require_real_threads()
            self._connection = AsyncConnection(self._endpoint)
            # gRPC closes such a channel by itself when it is dropped.
            self._dropped = weakref.finalize(
                self, warn_dropped, "AsyncClient", str(self._endpoint)
            )
            self._dropped.atexit = False
        return self._connection

    async def aclose(self) -> None:
        """Close the connection and cancel running calls."""
        self._closed = True
        connection, self._connection = self._connection, None
        if self._dropped is not None:
            self._dropped.detach()
        if connection is not None:
            await connection.channel.close()


class AsyncConnection:
    """A channel with the service's calls."""

    def __init__(self, endpoint: Endpoint) -> None:
        raise_mmap_threshold()
        self.endpoint = endpoint
        self._loop = asyncio.get_running_loop()
        fork_support.aio_began()
        self.channel = endpoint.aio_channel()
        fork_support.register()
        self.methods = Methods(self.channel, endpoint)

    async def compute(
        self,
        request: ComputeRequest,
        options: Options,
        on_call: Callable[[Callable[[], object]], object] | None = None,
    ) -> ComputeResponse:
        """Call Compute.

        Args:
            request: The request.
            options: The job's options.
            on_call: Called with a function that cancels the call, in any thread.

        Raises:
            GradwireError: The call failed.
        """
        try:
            with _in_call(options.job_id):
                call = self.methods.compute(
                    request, timeout=options.timeout_s, metadata=options.metadata
                )
                if on_call is not None:
                    loop = asyncio.get_running_loop()
                    on_call(partial(loop.call_soon_threadsafe, call.cancel))
                response: ComputeResponse = await call
        except grpc.RpcError as error:
            raise call_error(error, self.endpoint, options.job_id) from None
        return response

    async def server_info(
        self,
        timeout_s: float | None,
        metadata: MetadataPairs,
        *,
        connecting: bool = False,
    ) -> GetServerInfoResponse:
        """Call GetServerInfo.

        Args:
            timeout_s: Timeout in seconds; None: no limit.
            metadata: Metadata of the call.
            connecting: Whether this is the first call, so that the address may be of
                something else than a gradwire server.

        Raises:
            GradwireError: The call failed.
        """
        try:
            with _in_call():
                response: GetServerInfoResponse = await self.methods.server_info(
                    GetServerInfoRequest(), timeout=timeout_s, metadata=metadata
                )
        except grpc.RpcError as error:
            if connecting:
                raise connect_error(error, self.endpoint, timeout_s or 0) from None
            raise call_error(error, self.endpoint) from None
        return response

    async def session_call(
        self,
        name: str,
        request: Message,
        timeout_s: float | None,
        metadata: MetadataPairs,
    ) -> Any:
        """Call a method of the sessions with one message each way.

        Raises:
            GradwireError: The call failed.
        """
        try:
            with _in_call():
                return await self.methods.sessions[name](
                    request, timeout=timeout_s, metadata=metadata
                )
        except grpc.RpcError as error:
            raise session_error(error, self.endpoint) from None

    async def put_tensor(
        self,
        requests: Iterator[bytes],
        timeout_s: float | None,
        metadata: MetadataPairs,
    ) -> bytes:
        """Call PutTensor with elements in messages.

        Returns:
            The response.

        Raises:
            GradwireError: The call failed.
        """
        written = RequestWriter(next(requests), partial(_each, requests))
        with starting():
            rpc = self.methods.put_tensor(timeout=timeout_s, metadata=metadata)
        # In a task: a call that is cancelled before it began tells no writer.
        writer = asyncio.create_task(written.run(rpc))
        try:
            with _in_call():
                response: bytes = await rpc
        except grpc.RpcError as error:
            written.raise_error()
            raise session_error(error, self.endpoint) from None
        except BaseException:
            rpc.cancel()
            written.raise_error()
            raise
        finally:
            writer.cancel()
            await asyncio.wait([writer])
        return response

    async def get_tensor(
        self,
        request: bytes,
        take: Callable[[bytes], None],
        timeout_s: float | None,
        metadata: MetadataPairs,
    ) -> None:
        """Call GetTensor, with elements in messages.

        Args:
            request: The request.
            take: Called with each message.
            timeout_s: Timeout in seconds; None: no limit.
            metadata: Metadata of the call.

        Raises:
            GradwireError: The call failed.
        """
        with starting():
            rpc = self.methods.get_tensor(request, timeout=timeout_s, metadata=metadata)
        try:
            with _in_call():
                async for response in rpc:
                    take(response)
        except grpc.RpcError as error:
            raise session_error(error, self.endpoint) from None
        except BaseException:
            rpc.cancel()
            raise

    async def open_segment(self, size_bytes: int, metadata: MetadataPairs) -> Segment:
        """Open memory shared with the server.

        Raises:
            GradwireError: The server refused, or the memory cannot be opened here.
        """
        request = OpenRegionRequest(size_bytes=size_bytes)
        opened = await self._open_segment(request, metadata)
        if isinstance(opened, RegionChallenge):
            request.proof = proof_of(opened)
            opened = await self._open_segment(request, metadata)
        if isinstance(opened, RegionChallenge):
            raise ProtocolError("the server asked for a proof that it was given")
        return opened

    async def _open_segment(
        self, request: OpenRegionRequest, metadata: MetadataPairs
    ) -> Segment | RegionChallenge:
        with starting():
            rpc = self.methods.open_region(request, metadata=metadata)
        segment: Segment | None = None
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                with _in_call():
                    answer = await rpc.read()
            if isinstance(answer, OpenRegionResponse):
                if answer.HasField("challenge"):
                    rpc.cancel()
                    return answer.challenge
                segment = Segment(answer, partial(_cancel, rpc, self._loop))
        except TimeoutError:
            rpc.cancel()
            raise ConnectError(
                f"the server at {self.endpoint} opened no region within"
                f" {OPEN_TIMEOUT_S:g} s"
            ) from None
        except grpc.RpcError as error:
            raise call_error(error, self.endpoint) from None
        except BaseException:
            rpc.cancel()
            raise
        if segment is None:
            raise ProtocolError("the server closed a region at once")
        rpc.add_done_callback(segment.on_end())
        return segment


class AsyncCall:
    """A call with messages both ways: an asynchronous iterator of the server's.

    Args:
        connection: The connection.
        exchange: Provides the first message.
        messages: Yields the messages to send after it; an empty one stands for a wait
            until another message was received.
        options: The call's options.
        method: The called method.

    Attributes:
        deadline: When the call is too late; `time.monotonic`. None: never.
    """

    def __init__(
        self,
        connection: AsyncConnection,
        exchange: ExchangeProtocol,
        messages: Callable[[], AsyncGenerator[bytes]],
        options: Options | CallOptions,
        method: str = COMPUTE_STREAM,
    ) -> None:
        self._service = method.split("/")[1]
        self._endpoint = connection.endpoint
        self._job_id = options.job_id
        self.deadline = deadline_of(options.timeout_s)
        self._requests = RequestWriter(exchange.opening(), messages)
        with starting():
            self._rpc = connection.methods.streams[method](
                timeout=options.timeout_s, metadata=options.metadata
            )
        self._loop = asyncio.get_running_loop()
        self._writer = self._loop.create_task(self._requests.run(self._rpc))

    async def __aenter__(self) -> AsyncCall:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.cancel()

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        """Return the server's next message.

        Raises:
            StopAsyncIteration: The server ended the call with OK.
            GradwireError: The call failed.
            BaseException: An exception of `messages`, unchanged.
        """
        self._requests.received.set()
        try:
            message = await self._rpc.read()
        except asyncio.CancelledError:
            # gRPC also raises this if the writer has cancelled the call.
            self._requests.raise_error()
            require_cancelled_task(self._job_id)
            raise
        except grpc.RpcError as error:
            forget_frames(error)
            self._requests.raise_error()
            raise call_error(
                error, self._endpoint, self._job_id, service=self._service
            ) from None
        if isinstance(message, bytes):
            return message
        self._requests.raise_error()
        raise StopAsyncIteration

    async def cancel(self) -> None:
        """Cancel the call, unless it has ended, and wait for its writer."""
        self._end()
        await asyncio.wait([self._writer])

    def wake(self) -> None:
        """Let the requests go on, from any thread."""
        self._in_loop(self._requests.received.set)

    def late(self) -> GradwireError:
        """Return the error of a call that takes longer than its timeout."""
        return late_error(self._job_id)

    def fail(self, error: BaseException) -> None:
        """Cancel the call and have its reader raise an error, from any thread."""
        self._in_loop(partial(self._requests.fail, self._rpc, error))

    def on_failure(self, then: Callable[[], object]) -> None:
        """Call `then`, in any thread, when the call has ended with an error."""

        def ended(rpc: Any) -> None:
            if not rpc._cython_call.is_ok():
                then()

        self._rpc.add_done_callback(ended)

    def abandon(self) -> None:
        """Cancel the call from the garbage collector, in any thread."""
        self._in_loop(self._end)

    def _in_loop(self, work: Callable[[], object]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop may be closed
            self._loop.call_soon_threadsafe(work)

    def _end(self) -> None:
        self._rpc.cancel()
        self._writer.cancel()


@contextlib.contextmanager
def _in_call(job_id: str | None = None) -> Iterator[None]:
    """Count a call; if gRPC has cancelled it, but nobody its task, say so.

    Raises:
        ClientStateError: The client was closed before the call began.
        JobCancelledError: The client was closed, or the call cancelled.
    """
    with fork_support.aio_calling(), starting():
        try:
            yield
        except asyncio.CancelledError:
            require_cancelled_task(job_id)
            raise


def require_cancelled_task(job_id: str | None) -> None:
    """Check that a call was cancelled because its task was.

    Raises:
        JobCancelledError: It was cancelled otherwise.
    """
    task = asyncio.current_task()
    if task is not None and not task.cancelling():
        raise cancelled_error(job_id) from None


class RequestWriter:
    """Writes the requests of one call, in a task."""

    def __init__(
        self, opening: bytes, messages: Callable[[], AsyncGenerator[bytes]]
    ) -> None:
        self.received = asyncio.Event()
        """Set when a message from the server was processed."""
        self._opening = opening
        self._messages = messages
        self._error: BaseException | None = None

    async def run(self, rpc: _StreamStreamCall) -> None:
        """Write the header, then the messages."""
        try:
            # The writer lives about as long as its call.
            with fork_support.aio_calling():
                await self._write_all(rpc)
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # noqa: BLE001 - raised again by the reader
            self.fail(rpc, error)

    def fail(self, rpc: _StreamStreamCall, error: BaseException) -> None:
        """Cancel the call; `raise_error` raises the error."""
        self._error = self._error or error
        rpc.cancel()

    async def _write_all(self, rpc: _StreamStreamCall) -> None:
        with contextlib.suppress(grpc.RpcError):
            await rpc.wait_for_connection()
        if not await _write(rpc, self._opening):
            return
        async with contextlib.aclosing(self._messages()) as messages:
            async for message in messages:
                if not message:
                    await self.received.wait()
                elif not await _write(rpc, message):
                    return
                # Before the messages look at what was received.
                self.received.clear()
        with contextlib.suppress(cygrpc.InternalError):
            await rpc.done_writing()

    def raise_error(self) -> None:
        """Raise the exception of the messages, if there was one."""
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # it refers to this frame


async def _each(messages: Iterator[bytes]) -> AsyncGenerator[bytes]:
    for message in messages:
        yield message


def _cancel(rpc: Any, loop: asyncio.AbstractEventLoop) -> None:
    """Cancel a call from any thread. A closed loop has already ended it."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(rpc.cancel)


async def _write(rpc: Any, message: bytes) -> bool:
    """Write a message, and return whether that succeeded. The reader finds the error.

    If the call is over, a write must not change its status. The write method of
    grpc.aio would replace the status with its own. Unread messages and the server's
    error would then be lost.
    """
    if rpc.done():
        return False
    try:
        await rpc._cython_call.send_serialized_message(message)
    except cygrpc.InternalError:
        return False
    return True
