"""One job over several connections, for programs with an event loop.

Each call has a task that writes and one that reads; what is read is put
together and taken in by the caller's coroutine alone.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from functools import partial
from typing import TypeAlias

import grpc
import grpc.aio

from gradwire._aio_calls import AsyncCall, AsyncConnection, Feed
from gradwire._exceptions import JobCancelledError
from gradwire._exchange import Exchange
from gradwire._joining import ANSWERS_WAITING, Ends, cancelled_here
from gradwire._options import Options

Rpc: TypeAlias = "grpc.aio.StreamStreamCall[bytes, bytes]"
Answer: TypeAlias = bytes | grpc.RpcError | JobCancelledError | None
"""A message, how a call failed, or that it ended well."""


class AsyncCalls:
    """The calls of a job: an asynchronous iterator of the server's messages.

    Args:
        connections: Over which they go, one each.
        exchange: What is said on them.
        messages: Gives what each sends after all of them have joined.
        options: The job's.

    Attributes:
        connection: That on which the last message came.
    """

    def __init__(
        self,
        connections: Sequence[AsyncConnection],
        exchange: Exchange,
        messages: Callable[[int], AsyncGenerator[bytes]],
        options: Options,
    ) -> None:
        self._connections = connections
        self._exchange = exchange
        self._messages = messages
        self._options = options
        self._feeds: list[Feed] = []
        self._rpcs: list[Rpc] = []
        self._tasks: list[asyncio.Task[None]] = []
        self.connection = 0
        self._ends = Ends(exchange, connections[0].endpoint, options)
        self._inbox: asyncio.Queue[tuple[int, Answer]] = asyncio.Queue(
            ANSWERS_WAITING * len(connections)
        )
        self._loop = asyncio.get_running_loop()
        self._open(0)

    async def __aenter__(self) -> AsyncCalls:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.cancel()

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        """The server's next message.

        Raises:
            StopAsyncIteration: The server has ended all calls with OK.
            NotJoinedError: The job cannot have these connections.
            GradwireError: A call ended otherwise.
            BaseException: What the messages raised, unchanged.
        """
        if self._exchange.ready:
            for feed in self._feeds:
                feed.settled.set()
        elif self._exchange.accepted is not None and len(self._rpcs) == 1:
            for connection in range(1, self._exchange.connections):
                self._open(connection)
        ends = self._ends
        while not ends.decided:
            try:
                async with asyncio.timeout(ends.patience_s):
                    connection, answer = await self._inbox.get()
            except TimeoutError:
                break
            if not isinstance(answer, bytes):
                self._raise_error()
                ends.add(connection, answer)
            elif not ends.failed:
                self.connection = connection
                return answer
        self._raise_error()
        ends.raise_error()
        raise StopAsyncIteration

    async def cancel(self) -> None:
        """End the calls, unless they have ended, and wait for their tasks."""
        self._end()
        await asyncio.wait(self._tasks)

    def abandon(self) -> None:
        """End the calls from wherever their owner was collected."""
        with contextlib.suppress(RuntimeError):  # the loop may be closed
            self._loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        for rpc in self._rpcs:
            rpc.cancel()
        for task in self._tasks:
            task.cancel()

    def _open(self, connection: int) -> None:
        feed = Feed(
            self._exchange.opening(connection), partial(self._messages, connection)
        )
        rpc = self._connections[connection].stream(
            timeout=self._options.timeout_s, metadata=self._options.metadata
        )
        self._feeds.append(feed)
        self._rpcs.append(rpc)
        self._tasks.append(self._loop.create_task(feed.run(rpc)))
        self._tasks.append(self._loop.create_task(self._read(rpc, connection)))

    async def _read(self, rpc: Rpc, connection: int) -> None:
        outcome: Answer = None
        try:
            while isinstance(message := await rpc.read(), bytes):
                await self._inbox.put((connection, message))
        except grpc.RpcError as error:
            outcome = error
        except asyncio.CancelledError:
            # gRPC raises this too where the writer has cancelled the call.
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            outcome = cancelled_here(self._options.job_id)
        await self._inbox.put((connection, outcome))

    def _raise_error(self) -> None:
        for feed in self._feeds:
            feed.raise_error()


class AsyncDealer:
    """Deals messages that are made one after another to connections.

    The first connection's task makes them, and hands the others theirs.

    Args:
        messages: All of them, each with its connection.
        connections: How many there are.
        capacity: Says how many messages may wait for each of the others.
    """

    def __init__(
        self,
        messages: AsyncGenerator[tuple[int, bytes]],
        connections: int,
        capacity: Callable[[], int],
    ) -> None:
        self._messages = messages
        self._connections = connections
        self._capacity = capacity
        self._queues: list[asyncio.Queue[bytes | None]] = []

    async def messages(self, connection: int) -> AsyncGenerator[bytes]:
        """Those of one connection."""
        if not self._queues:  # the capacity is not known any earlier
            size = self._capacity()
            self._queues = [asyncio.Queue(size) for _ in range(self._connections)]
        if connection:
            while (taken := await self._queues[connection].get()) is not None:
                yield taken
            return
        async with contextlib.aclosing(self._messages):
            async for other, message in self._messages:
                if other:
                    await self._queues[other].put(message)
                else:
                    yield message
        for queue in self._queues[1:]:
            await queue.put(None)


def open_calls(
    connections: Sequence[AsyncConnection],
    exchange: Exchange,
    messages: Callable[[int], AsyncGenerator[bytes]],
    options: Options,
) -> AsyncCall | AsyncCalls:
    """The job's calls, begun; the arguments are those of `AsyncCalls`."""
    if exchange.connections == 1:
        return AsyncCall(connections[0], exchange, partial(messages, 0), options)
    return AsyncCalls(connections, exchange, messages, options)
