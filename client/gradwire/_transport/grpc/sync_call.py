"""Synchronous connections and calls; see `async_call`.

gRPC takes requests from an iterator in its own thread while the caller's thread reads,
so both directions run concurrently.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # not in its stubs

from gradwire._api.errors import ClientStateError, GradwireError, ProtocolError
from gradwire._api.options import (
    CallOptions,
    MetadataPairs,
    Options,
    deadline_of,
)
from gradwire._arrays.buffer_pool import raise_mmap_threshold
from gradwire._core import interrupts
from gradwire._core.exchange import ExchangeProtocol
from gradwire._core.timers import later
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

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class SyncConnector:
    """Connects to a server on first use, and again in the child of a fork.

    Args:
        endpoint: The server's address.
        on_fork: Called in the child of a fork. The child must neither use nor close
            the parent's resources.
    """

    def __init__(self, endpoint: Endpoint, on_fork: Callable[[], object]) -> None:
        self._endpoint = endpoint
        self._on_fork = weakref.WeakMethod(on_fork)
        self._lock = threading.Lock()
        self._connection: SyncConnection | None = None
        self._closed = False
        self._dropped: weakref.finalize[..., SyncConnector] | None = None
        _connectors.add(self)

    def connection(self) -> SyncConnection:
        """Return the connection.

        Raises:
            ClientStateError: The connection is closed, or this process cannot make
                calls.
        """
        require_running_interpreter()
        with self._lock, fork_support.calling():
            fork_support.require_calls()
            # `close` may have run in another thread in the meantime.
            if self._closed:
                raise ClientStateError(f"the connection to {self._endpoint} is closed")
            if self._connection is None:
                require_real_threads()
                self._connection = SyncConnection(self._endpoint)
                # gRPC keeps a channel, and its connection, until it is closed.
                self._dropped = weakref.finalize(
                    self, _close_dropped, self._connection.channel, str(self._endpoint)
                )
                self._dropped.atexit = False
            return self._connection

    def close(self) -> None:
        """Close the connection and cancel running calls."""
        with self._lock:
            self._closed = True
            connection, self._connection = self._connection, None
        if connection is not None:
            self._forget_dropped()
            _close(connection.channel)

    def _forget_dropped(self) -> None:
        if self._dropped is not None:
            self._dropped.detach()
            self._dropped = None

    def after_fork(self) -> None:
        """Reset the state in a child, where locks may be held by missing threads."""
        _inherited.append(self._connection)
        self._forget_dropped()
        self._connection = None
        self._lock = threading.Lock()
        on_fork = self._on_fork()
        if on_fork is not None:
            on_fork()


def _close_dropped(channel: grpc.Channel, address: str) -> None:
    _close(channel)
    warn_dropped("Client", address)


def _close(channel: grpc.Channel) -> None:
    if sys.is_finalizing():
        # It would wait for threads of gRPC that have stopped. The system closes the
        # connection in a moment.
        return
    with fork_support.calling():
        channel.close()


class SyncConnection:
    """A channel with the service's calls."""

    def __init__(self, endpoint: Endpoint) -> None:
        raise_mmap_threshold()
        self.endpoint = endpoint
        self.channel = endpoint.channel()
        fork_support.register()
        self.methods = Methods(self.channel, endpoint)

    def compute(
        self,
        request: ComputeRequest,
        options: Options,
        on_call: Callable[[Callable[[], object]], object] | None = None,
    ) -> ComputeResponse:
        """Call Compute.

        Args:
            request: The request.
            options: The job's options.
            on_call: Called with a function that cancels the call, for other threads.

        Raises:
            GradwireError: The call failed.
        """
        try:
            response: ComputeResponse = call_unary(
                self.methods.compute,
                request,
                options.timeout_s,
                options.metadata,
                on_call,
            )
        except grpc.FutureCancelledError:
            raise cancelled_error(options.job_id) from None
        except grpc.RpcError as error:
            raise call_error(error, self.endpoint, options.job_id) from None
        return response

    def server_info(
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
        request = GetServerInfoRequest()
        try:
            response: GetServerInfoResponse = call_unary(
                self.methods.server_info, request, timeout_s, metadata
            )
        except grpc.RpcError as error:
            if connecting:
                raise connect_error(error, self.endpoint, timeout_s or 0) from None
            raise call_error(error, self.endpoint) from None
        return response

    def session_call(
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
        method = self.methods.sessions[name]
        try:
            return call_unary(method, request, timeout_s, metadata)
        except grpc.RpcError as error:
            raise session_error(error, self.endpoint) from None

    def put_tensor(
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
        raised: list[BaseException] = []

        def sent() -> Iterator[bytes]:
            # In gRPC's thread, which would log an exception.
            try:
                yield from requests
            except GeneratorExit:
                raise  # the call has ended
            except BaseException as error:  # noqa: BLE001 - raised below
                raised.append(error)
                if future is not None:  # else elements are missing, and the call fails
                    future.cancel()

        future = None
        with interrupts.held():
            with fork_support.calling(), starting():
                future = self.methods.put_tensor.future(
                    sent(), timeout=timeout_s, metadata=metadata
                )
                running = fork_support.RunningCall()
            try:
                with fork_support.waiting():
                    response: bytes = future.result()
            except grpc.FutureCancelledError:
                if raised:
                    raise raised.pop() from None
                raise
            except grpc.RpcError as error:
                if raised:
                    raise raised.pop() from None
                raise session_error(error, self.endpoint) from None
            except BaseException:
                future.cancel()
                raise
            finally:
                running.end()
        return response

    def get_tensor(
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
        with interrupts.held():
            with fork_support.calling(), starting():
                rpc = self.methods.get_tensor(
                    request, timeout=timeout_s, metadata=metadata
                )
                running = fork_support.RunningCall()
            try:
                with fork_support.waiting():
                    for response in rpc:
                        take(response)
            except grpc.RpcError as error:
                raise session_error(error, self.endpoint) from None
            except BaseException:
                rpc.cancel()
                raise
            finally:
                running.end()

    def open_segment(self, size_bytes: int, metadata: MetadataPairs) -> Segment:
        """Open memory shared with the server.

        Raises:
            GradwireError: The server refused, or the memory cannot be opened here.
        """
        request = OpenRegionRequest(size_bytes=size_bytes)
        opened = self._open_segment(request, metadata)
        if isinstance(opened, RegionChallenge):
            request.proof = proof_of(opened)
            opened = self._open_segment(request, metadata)
        if isinstance(opened, RegionChallenge):
            raise ProtocolError("the server asked for a proof that it was given")
        return opened

    def _open_segment(
        self, request: OpenRegionRequest, metadata: MetadataPairs
    ) -> Segment | RegionChallenge:
        with fork_support.calling(), starting():
            rpc = self.methods.open_region(request, metadata=metadata)
        process = os.getpid()

        def end() -> None:
            if os.getpid() == process:  # otherwise it is the parent's call
                with fork_support.calling():
                    rpc.cancel()

        too_late = later(OPEN_TIMEOUT_S, end)
        try:
            with fork_support.waiting():
                answer: OpenRegionResponse = next(rpc)
            if answer.HasField("challenge"):
                end()
                return answer.challenge
            segment = Segment(answer, end)
        except BaseException as error:
            end()
            if isinstance(error, StopIteration):
                raise ProtocolError("the server closed a region at once") from None
            if isinstance(error, grpc.RpcError):
                raise call_error(error, self.endpoint) from None
            raise
        finally:
            too_late.cancel()
        ended = segment.on_end()
        if not rpc.add_callback(ended):
            ended()
        return segment


def call_unary(
    method: grpc.UnaryUnaryMultiCallable[_Request, _Response],
    request: _Request,
    timeout_s: float | None,
    metadata: MetadataPairs,
    on_call: Callable[[Callable[[], object]], object] | None = None,
) -> _Response:
    """Call a method with one message each way.

    Raises:
        grpc.RpcError: The call failed.
        grpc.FutureCancelledError: It was cancelled by the function that `on_call` got.
    """
    options: Any = {"timeout": timeout_s, "metadata": metadata}
    if on_call is None and threading.active_count() == 1:
        # The fastest call blocks inside gRPC. No other thread can fork meanwhile.
        return method(request, **options)
    with interrupts.held():
        with fork_support.calling(), starting():
            future = method.future(request, **options)
            running = fork_support.RunningCall()
        try:
            if on_call is not None:
                on_call(future.cancel)
            with fork_support.waiting():
                return future.result()
        except BaseException:
            future.cancel()
            raise
        finally:
            running.end()


class SyncCall:
    """A call with messages both ways: an iterator of the server's.

    As a context manager, it cancels the call unless the call has ended.

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
        connection: SyncConnection,
        exchange: ExchangeProtocol,
        messages: Callable[[], Iterator[bytes]],
        options: Options | CallOptions,
        method: str = COMPUTE_STREAM,
    ) -> None:
        self._service = method.split("/")[1]
        self._endpoint = connection.endpoint
        self._job_id = options.job_id
        self.deadline = deadline_of(options.timeout_s)
        self._requests = RequestIterator(exchange.opening(), messages)
        began = False
        try:
            with interrupts.held():
                with fork_support.calling(), starting():
                    self._rpc = connection.methods.streams[method](
                        self._requests.requests(),
                        timeout=options.timeout_s,
                        metadata=options.metadata,
                    )
                    self._running = fork_support.RunningCall()
                self._requests.attach(self._rpc.cancel)
                began = True
        except BaseException:
            if began:  # and Ctrl-C came meanwhile
                self.cancel()
            raise

    def __enter__(self) -> SyncCall:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        """Return the server's next message.

        Raises:
            StopIteration: The server ended the call with OK.
            GradwireError: The call failed.
            BaseException: An exception of `messages`, unchanged.
        """
        require_running_interpreter()
        self._requests.go_on()
        try:
            with fork_support.waiting():
                message: bytes = next(self._rpc)
        except StopIteration:
            self._requests.raise_error()
            raise
        except grpc.RpcError as error:
            forget_frames(error)
            self._requests.raise_error()
            raise call_error(
                error, self._endpoint, self._job_id, service=self._service
            ) from None
        return message

    def wake(self) -> None:
        """Let the requests go on, from any thread."""
        self._requests.go_on()

    def late(self) -> GradwireError:
        """Return the error of a call that takes longer than its timeout."""
        return late_error(self._job_id)

    def fail(self, error: BaseException) -> None:
        """Cancel the call and have its reader raise an error, from any thread."""
        self._requests.fail(error)

    def on_failure(self, then: Callable[[], object]) -> None:
        """Call `then`, in any thread, when the call has ended with an error."""
        rpc = self._rpc

        def ended() -> None:
            if rpc.code() is not grpc.StatusCode.OK:
                then()

        if not rpc.add_callback(ended):
            ended()

    def abandon(self) -> None:
        """Cancel the call from the garbage collector."""
        self.cancel()

    def cancel(self) -> None:
        """Cancel the call, unless it has ended."""
        # A shutting down interpreter has stopped gRPC's threads, perhaps one that
        # holds the lock.
        if self._running.inherited or sys.is_finalizing():
            return
        self._running.end()
        self._requests.stop()
        with fork_support.calling():
            self._rpc.cancel()


class RequestIterator:
    """The requests of one call, for gRPC's thread."""

    def __init__(self, opening: bytes, messages: Callable[[], Iterator[bytes]]) -> None:
        self._opening = opening
        self._messages = messages
        self._received = threading.Event()
        self._stopped = False
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._cancel: Callable[[], object] | None = None

    def requests(self) -> Iterator[bytes]:
        """Yield the header, then the messages."""
        with fork_support.waiting():
            yield self._opening
        try:
            for message in self._messages():
                if message:
                    with fork_support.waiting():
                        yield message
                else:
                    self._received.wait()
                # Before the messages look at what was received.
                self._received.clear()
                if self._stopped:
                    return
        except GeneratorExit:
            raise
        except BaseException as error:  # noqa: BLE001 - raised again by the reader
            self.fail(error)

    def attach(self, cancel: Callable[[], object]) -> None:
        """Set the function that cancels the call when the messages fail."""
        with self._lock:
            self._cancel = cancel
            failed = self._error is not None
        if failed:
            cancel()

    def go_on(self) -> None:
        """End a wait of the messages: a message from the server was processed."""
        with interrupts.held():
            self._received.set()

    def stop(self) -> None:
        """Yield no more messages."""
        self._stopped = True
        with interrupts.held():
            self._received.set()

    def raise_error(self) -> None:
        """Raise the exception of the messages, if there was one."""
        with self._lock:
            error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # it refers to this frame

    def fail(self, error: BaseException) -> None:
        """Cancel the call; `raise_error` raises the error."""
        with self._lock:
            self._error = error
            cancel = self._cancel
        if cancel is not None:
            cancel()


_connectors: weakref.WeakSet[SyncConnector] = weakref.WeakSet()
_inherited: list[SyncConnection | None] = []


def _channels() -> list[grpc.Channel]:
    connections = [connector._connection for connector in list(_connectors)]
    return [each.channel for each in connections if each is not None]


# In a child, gRPC would cancel the parent's calls. That takes locks which a thread of
# the parent may hold. So the channels are unregistered from gRPC during a fork.


def _before_fork() -> None:
    for channel in _channels():
        cygrpc.fork_unregister_channel(channel)


def _after_fork_in_parent() -> None:
    for channel in _channels():
        cygrpc.fork_register_channel(channel)


def _after_fork_in_child() -> None:
    for connector in list(_connectors):
        connector.after_fork()


fork_support.at_fork(_before_fork, _after_fork_in_parent, _after_fork_in_child)
