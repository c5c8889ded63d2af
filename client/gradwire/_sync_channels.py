"""One job over several connections, for programs that wait.

gRPC draws each call's requests in a thread of its own, as for one call. The
answers are read by a thread for each connection and put together in the
caller's, which alone takes them in.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeAlias

import grpc

from gradwire import _fork
from gradwire._exchange import Exchange
from gradwire._joining import ANSWERS_WAITING, Ends
from gradwire._mailbox import Mailbox
from gradwire._options import Options
from gradwire._sync_calls import Call, Connection, Feed, Rpc

Answer: TypeAlias = bytes | grpc.RpcError | None
"""A message, how a call failed, or that it ended well."""


class Calls:
    """The calls of a job: an iterator of the server's messages.

    As a context manager they are cancelled unless they came to their end.

    Args:
        connections: Over which they go, one each.
        exchange: What is said on them.
        messages: Gives what each sends after all of them have joined.
        options: The job's.
        stop: Told when nothing more is to be sent.

    Attributes:
        connection: That on which the last message came.
    """

    def __init__(
        self,
        connections: Sequence[Connection],
        exchange: Exchange,
        messages: Callable[[int], Iterator[bytes]],
        options: Options,
        stop: Callable[[], object],
    ) -> None:
        self._connections = connections
        self._exchange = exchange
        self._messages = messages
        self._options = options
        self._stop = stop
        self._feeds: list[Feed] = []
        self._rpcs: list[Rpc] = []
        self.connection = 0
        self._ends = Ends(exchange, connections[0].endpoint, options)
        capacity = ANSWERS_WAITING * len(connections)
        self._inbox: Mailbox[tuple[int, Answer]] = Mailbox(lambda: capacity)
        with _fork.calling():
            self._open(0)
            self._running = _fork.Running(several=True)

    def __enter__(self) -> Calls:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        """The server's next message.

        Raises:
            StopIteration: The server has ended all calls with OK.
            NotJoinedError: The job cannot have these connections.
            GradwireError: A call ended otherwise.
            BaseException: What the messages raised, unchanged.
        """
        if self._exchange.ready:
            for feed in self._feeds:
                feed.go()
        elif self._exchange.accepted is not None and len(self._rpcs) == 1:
            for connection in range(1, self._exchange.connections):
                self._open(connection)
        ends = self._ends
        while not ends.decided:
            arrived = self._inbox.get(ends.patience_s)
            if arrived is None:  # too late, or cancelled meanwhile
                break
            connection, answer = arrived
            if not isinstance(answer, bytes):
                self._raise_error()
                ends.add(connection, answer)
            elif not ends.failed:
                self.connection = connection
                return answer
        self._raise_error()
        ends.raise_error()
        raise StopIteration

    def cancel(self) -> None:
        """End the calls, unless they have ended."""
        if self._running.inherited:
            return
        for feed in self._feeds:
            feed.stop()
        self._stop()
        self._inbox.close()
        self._running.end()
        with _fork.calling():
            for rpc in self._rpcs:
                rpc.cancel()

    def _open(self, connection: int) -> None:
        feed = Feed(
            self._exchange.opening(connection), partial(self._messages, connection)
        )
        with _fork.calling():
            rpc = self._connections[connection].stream(
                feed.requests(),
                timeout=self._options.timeout_s,
                metadata=self._options.metadata,
            )
        feed.attach(rpc.cancel)
        self._feeds.append(feed)
        self._rpcs.append(rpc)
        threading.Thread(
            target=_read,
            args=(rpc, connection, self._inbox),
            name=f"gradwire-connection-{connection}",
            daemon=True,
        ).start()

    def _raise_error(self) -> None:
        for feed in self._feeds:
            feed.raise_error()


class Dealer:
    """Deals messages that are made one after another to connections.

    The first connection's thread makes them, and hands the others theirs.

    Args:
        messages: All of them, each with its connection.
        connections: How many there are.
        capacity: Says how many messages may wait for each of the others.
    """

    def __init__(
        self,
        messages: Iterator[tuple[int, bytes]],
        connections: int,
        capacity: Callable[[], int],
    ) -> None:
        self._messages = messages
        self._boxes: list[Mailbox[bytes]] = [
            Mailbox(capacity) for _ in range(1, connections)
        ]

    def messages(self, connection: int) -> Iterator[bytes]:
        """Those of one connection."""
        if connection:
            box = self._boxes[connection - 1]
            while (message := box.get()) is not None:
                yield message
            return
        for other, message in self._messages:
            if not other:
                yield message
            elif not self._boxes[other - 1].put(message):
                return
        self.close()

    def close(self) -> None:
        """Deal no more."""
        for box in self._boxes:
            box.close()


def open_calls(
    connections: Sequence[Connection],
    exchange: Exchange,
    messages: Callable[[int], Iterator[bytes]],
    options: Options,
    stop: Callable[[], object] = lambda: None,
) -> Call | Calls:
    """The job's calls, begun; the arguments are those of `Calls`."""
    if exchange.connections == 1:
        return Call(connections[0], exchange, partial(messages, 0), options)
    return Calls(connections, exchange, messages, options, stop)


def _read(rpc: Rpc, connection: int, inbox: Mailbox[tuple[int, Answer]]) -> None:
    outcome: Answer = None
    try:
        while True:
            with _fork.waiting():
                message = next(rpc)
            if not inbox.put((connection, message)):
                return
    except StopIteration:
        pass
    except grpc.RpcError as error:
        outcome = error
    inbox.put((connection, outcome))
