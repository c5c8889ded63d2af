"""The threads that move a job's elements on direct connections.

Synchronous and asynchronous clients use the same threads. Each socket has one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from grpc import StatusCode

from gradwire._api.errors import ConnectionLostError, GradwireError, ProtocolError
from gradwire._arrays.operand import Operand
from gradwire._core.direct_exchange import DirectExchange
from gradwire._transport.direct.connections import DirectConnection
from gradwire_protocol.data_plane.frames import (
    ATTACHED,
    ATTACHED_BYTES,
    HEADER_BYTES,
    DirectFramingError,
    FrameHeader,
)
from gradwire_protocol.data_plane.sockets import DirectSocket
from gradwire_protocol.matrices import Matrix

STATUS_S = 2.0
"""Seconds that the server's status may take after a connection broke. The status has
the cause."""

_DRAIN_S = 0.2
"""Seconds in which results that have arrived are read after the call was lost."""

_SILENCE_S = 10.0
"""Seconds without a byte after the call has ended well, until its results count as
lost."""


class Call(Protocol):
    """The job's call."""

    def wake(self) -> None:
        """Let the requests go on, from any thread."""

    def fail(self, error: BaseException) -> None:
        """Cancel the call and have its reader raise an error, from any thread."""


class DirectTransfer:
    """Moves a job's elements.

    Args:
        connections: The connections.
        call: The job's call.
        address: The server's address, for errors.
    """

    def __init__(
        self,
        connections: Sequence[DirectConnection],
        call: Call,
        address: str,
    ) -> None:
        self._connections = connections
        self._call = call
        self._address = address
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._to_send = len(connections)
        self._receiving: set[DirectSocket] = set()
        self._stopped = False
        self._ended = False
        """Whether the call has ended."""
        self.broken: Exception | None = None
        """Why a connection broke, if one did."""
        self._error: BaseException | None = None
        """The first other error of a thread."""

    def sent(self) -> bool:
        """Return whether all operands were sent."""
        return not self._to_send

    def start(
        self, exchange: DirectExchange, operands: Mapping[Matrix, Operand]
    ) -> None:
        """Begin to send and to receive.

        Args:
            exchange: The elements.
            operands: The operands that the job sends.
        """
        for number, connection in enumerate(self._connections):
            self._receiving.add(connection.down)

            def send(
                number: int = number, connection: DirectConnection = connection
            ) -> None:
                self._send(exchange, number, connection, operands)

            def receive(
                number: int = number, connection: DirectConnection = connection
            ) -> None:
                self._receive(exchange, number, connection)

            for work, name in ((send, "up"), (receive, "down")):
                thread = threading.Thread(
                    target=self._run,
                    args=(work,),
                    name=f"gradwire-{name}-{number}",
                    daemon=True,
                )
                self._threads.append(thread)
                thread.start()

    def finish(self) -> None:
        """Wait for the last results, after the call has ended well.

        Raises:
            ConnectionLostError: A connection broke.
            BaseException: The error of a thread.
        """
        self._ended = True
        for thread in self._threads:
            while thread.is_alive():
                thread.join(1.0)
                moved_at = max((each.moved_at for each in self._receiving), default=0.0)
                if thread.is_alive() and time.monotonic() - moved_at > _SILENCE_S:
                    self.stop()
                    raise self._lost(TimeoutError("no more bytes came"))
        if self._error is not None:
            raise self._error
        if self.broken is not None:
            raise self._lost(self.broken)

    def end_with(self, error: GradwireError) -> None:
        """End after the call has failed.

        What the server has sent before is still received: the job may resume.

        Args:
            error: The error of the call.
        """
        self._ended = True
        for connection in self._connections:
            connection.up.shutdown()
        if not isinstance(error, ProtocolError):
            # A server that gives a reason closes the connections behind it.
            until = time.monotonic() + (_DRAIN_S if error.reason is None else STATUS_S)
            for thread in self._threads:
                thread.join(max(until - time.monotonic(), 0.0))
        self.stop()

    def stop(self) -> None:
        """End all threads. They use no memory of the job afterwards."""
        self._ended = self._stopped = True
        if any(thread.is_alive() for thread in self._threads):
            for connection in self._connections:
                connection.up.shutdown()
                connection.down.shutdown()
        for thread in self._threads:
            thread.join()

    def close(self) -> None:
        """End all threads and close the connections."""
        self.stop()
        for connection in self._connections:
            connection.up.close()
            connection.down.close()

    def _send(
        self,
        exchange: DirectExchange,
        number: int,
        connection: DirectConnection,
        operands: Mapping[Matrix, Operand],
    ) -> None:
        sock = connection.up
        for frame in exchange.frames(number, operands):
            sock.send(frame.header.encode(), frame.payload)
        if not connection.confirmed:
            _read_attached(sock)
        with self._lock:
            self._to_send -= 1
        self._call.wake()

    def _receive(
        self, exchange: DirectExchange, number: int, connection: DirectConnection
    ) -> None:
        sock, share = connection.down, exchange.share(number)
        if not connection.confirmed:
            _read_attached(sock)
        data = memoryview(bytearray(HEADER_BYTES))
        while not share.complete:
            sock.receive(data)
            header = FrameHeader.decode(data)
            room = share.room(header)
            if header.length:
                sock.receive(room)
            share.take(header, room)
        with self._lock:
            self._receiving.discard(sock)

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except (EOFError, OSError) as error:
            self._break(error)
        except DirectFramingError as error:
            self._fail(ProtocolError(f"the server sent no frame: {error}"))
        except BaseException as error:  # noqa: BLE001 - raised by the call's reader
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._error = self._error or error
        if not self._ended:
            self._call.fail(error)

    def _break(self, error: Exception) -> None:
        """Note a broken connection; the server's status, if it comes, has the cause."""
        with self._lock:
            if self._stopped or self.broken is not None:
                return
            self.broken = error
        if self._ended:
            return
        timer = threading.Timer(STATUS_S, self._give_up)
        timer.daemon = True
        timer.start()

    def _give_up(self) -> None:
        if not self._ended and self.broken is not None:
            self._call.fail(self._lost(self.broken))

    def _lost(self, cause: Exception) -> ConnectionLostError:
        how = "the server closed it" if isinstance(cause, EOFError) else str(cause)
        return ConnectionLostError(
            f"a direct connection to {self._address} broke: {how}",
            status=StatusCode.UNAVAILABLE,
        )


def _read_attached(sock: DirectSocket) -> None:
    """Read the answer to an Attach.

    Raises:
        DirectFramingError: It is none.
    """
    answer = memoryview(bytearray(ATTACHED_BYTES))
    sock.receive(answer)
    if answer != ATTACHED:
        raise DirectFramingError(f"an Attach was answered with {bytes(answer)!r}")
