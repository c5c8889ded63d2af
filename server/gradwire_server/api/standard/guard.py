"""Limits for gRPC's standard services: the number and size of their calls.

Admission does not count these calls, because health must be reported even when all
memory is taken. But any client may make them, and each call holds its message of up to
4 MiB for as long as its client likes. So their number and size are limited here. A call
beyond the limit ends another one, never itself: a client with hundreds of open calls
does not keep a probe from its answer.
"""

from __future__ import annotations

import asyncio
import inspect
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

MOST_OPEN = 1024
"""Calls with a complete request. Each gRPC client may watch a server's health for as
long as it is connected."""

MOST_COMING = 32
"""Calls with a message still to come, possibly a large one."""

YOUNG_S = 1.0
"""Age below which no call is ended: many simultaneous calls, each answered in
milliseconds, are no overload."""

MAX_BYTES = 4096
"""Maximum bytes of a request: it names a service, a symbol or a file."""

_OWN = "/gradwire."


class StandardServiceGuard(grpc.aio.ServerInterceptor):
    """Limits the memory held by calls of services other than gradwire's."""

    def __init__(self) -> None:
        self._open = Slots(MOST_OPEN)
        self._coming = Slots(MOST_COMING)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Return the method's handler, with limits."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if isinstance(method, bytes):
            method = method.decode(errors="replace")
        if handler is None or method.startswith(_OWN):
            return handler
        # Always with streamed requests: for a single request gRPC reads the whole
        # message before it calls the handler, however long that takes.
        bounded: Handler = grpc.stream_stream_rpc_method_handler(
            partial(self._serve, handler),
            response_serializer=handler.response_serializer,
        )
        return bounded

    async def _serve(
        self, handler: Handler, messages: AsyncIterator[bytes], context: Context
    ) -> None:
        requests = _requests(handler, messages, context)
        serve = self._streamed if handler.request_streaming else self._one
        try:
            await serve(handler, requests, context)
        except _EndedError:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "more such calls are open than this server holds: it ended the oldest",
            )

    async def _streamed(
        self, handler: Handler, requests: AsyncIterator[Any], context: Context
    ) -> None:
        with self._coming.acquire(context.peer()):
            await _answer(handler, requests, context)

    async def _one(
        self, handler: Handler, requests: AsyncIterator[Any], context: Context
    ) -> None:
        with self._coming.acquire(context.peer()):
            request = await anext(requests, None)
        if request is None:
            status = grpc.StatusCode.INVALID_ARGUMENT
            await context.abort(status, "the call has no message: expected one")
        with self._open.acquire(context.peer()):
            await _answer(handler, request, context)


class _EndedError(Exception):
    """Another call has taken this call's slot."""


class Slots:
    """A limited number of calls; one more call takes an old call's slot.

    Args:
        most: The number of calls. It is exceeded if all are too young to end.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken: dict[asyncio.Task[Any], tuple[str, float]] = {}
        """Connection and start time of each call; the oldest call first."""

    @contextmanager
    def acquire(self, connection: str) -> Iterator[None]:
        """Hold a slot for the calling task within this context.

        Raises:
            _EndedError: Another call has taken the slot.
        """
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a call runs in a task")
        now = asyncio.get_running_loop().time()
        while len(self._taken) >= self._most and self._end_one(now - YOUNG_S):
            pass
        self._taken[task] = connection, now
        try:
            yield
        except asyncio.CancelledError as cancelled:
            if cancelled.args == (_ENDED,):
                task.uncancel()
                raise _EndedError from None
            raise
        finally:
            self._taken.pop(task, None)

    def _end_one(self, latest: float) -> bool:
        """End the oldest call of the connection with the most calls.

        Args:
            latest: Start time after which a call is too young to end.

        Returns:
            Whether a call was ended.
        """
        counts = Counter(connection for connection, _ in self._taken.values())
        ((most, _),) = counts.most_common(1)
        oldest, since = next(
            (task, since)
            for task, (connection, since) in self._taken.items()
            if connection == most
        )
        if since > latest:
            return False
        del self._taken[oldest]
        oldest.cancel(_ENDED)
        return True


_ENDED = "another call has taken its place"


async def _requests(
    handler: Handler, messages: AsyncIterator[bytes], context: Context
) -> AsyncIterator[Any]:
    deserialize: Any = handler.request_deserializer
    async for message in messages:
        if len(message) > MAX_BYTES:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"the message has {len(message)} bytes: expected at most {MAX_BYTES}",
            )
        try:
            request = deserialize(message)
        except DecodeError:
            status = grpc.StatusCode.INVALID_ARGUMENT
            await context.abort(status, "the message is not this method's request")
        yield request


async def _answer(handler: Handler, given: Any, context: Context) -> None:
    answers = _method(handler)(given, context)
    if inspect.isasyncgen(answers):
        async for answer in answers:
            await context.write(answer)
    elif (answer := await answers) is not None:
        await context.write(answer)


def _method(handler: Handler) -> Any:
    methods = (
        handler.unary_unary,
        handler.unary_stream,
        handler.stream_unary,
        handler.stream_stream,
    )
    return next(method for method in methods if method is not None)
