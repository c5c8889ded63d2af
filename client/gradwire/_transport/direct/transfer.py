"""The threads that move a job's elements on direct connections.

Synchronous and asynchronous clients use the same threads. Each socket has one.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from grpc import StatusCode

from gradwire._api.errors import (
    ClientIdleError,
    ConnectionLostError,
    GradwireError,
    JobCancelledError,
    ProtocolError,
)
from gradwire._arrays.operand import Operand
from gradwire._core.direct_exchange import DirectExchange, ResultShare
from gradwire._core.frame import Frame
from gradwire._core.timers import later
from gradwire._transport.direct.connections import DirectConnection
from gradwire_protocol.data_plane.frames import (
    ATTACHED,
    ATTACHED_BYTES,
    HEADER_BYTES,
    DirectFramingError,
    FrameHeader,
    Kind,
)
from gradwire_protocol.data_plane.sockets import DirectSocket
from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.matrices import Matrix

STATUS_S = 2.0
"""Seconds that the server's status may take after a connection broke. The status has
the cause."""

_HAND_OVER_S = 7.0
"""The same, if only sockets for operands broke: a server that stops takes no more, and
has five seconds for results and a checkpoint of those that it has."""

_DRAIN_S = 0.2
"""Seconds in which results that have arrived are read after the call was lost."""

_SILENCE_S = 10.0
"""Seconds without a byte after the call has ended well, until its results count as
lost."""


class Share(Protocol):
    """Takes the frames that come on a connection.

    Attributes:
        complete: Whether the last frame has come.
    """

    complete: bool

    def room(self, header: FrameHeader) -> memoryview:
        """Check a frame's header, and return memory for its payload."""

    def take(self, header: FrameHeader, payload: memoryview) -> None:
        """Take a frame whose payload was received into `room`."""


class Elements(Protocol):
    """The elements of a job or of a tensor.

    Attributes:
        all_sent: Whether the call's last message may be sent.
    """

    all_sent: bool

    def frames(
        self, connection: int, operands: Mapping[Matrix, Operand]
    ) -> Iterator[Frame]:
        """Yield the frames of a connection."""

    def share(self, connection: int) -> Share:
        """Return what takes the frames that come on a connection."""


class Call(Protocol):
    """The job's call.

    Attributes:
        deadline: When it is too late; `time.monotonic`. None: never.
    """

    deadline: float | None

    def late(self) -> GradwireError:
        """Return the error of a call that takes longer than its timeout."""

    def wake(self) -> None:
        """Let the requests go on, from any thread."""

    def fail(self, error: BaseException) -> None:
        """Cancel the call and have its reader raise an error, from any thread."""

    def on_failure(self, then: Callable[[], object]) -> None:
        """Call `then`, in any thread, when the call has ended with an error."""


class _NotAttachedError(ConnectionError):
    """A connection broke before the server had answered its Attach."""


class _Breakable:
    """Connections of a call, one of which may break.

    Args:
        call: The job's call.
        address: The server's address, for errors.

    Attributes:
        broken: Why a connection broke; None: none did.
    """

    def __init__(self, call: Call, address: str) -> None:
        self._call = call
        self._address = address
        self._lock = threading.Lock()
        self._ended = False
        """Whether the call has ended, or is about to."""
        self.broken: Exception | None = None
        self._interrupted = False
        """Whether this side has ended the use of the connections."""
        self._only_sending = False
        """Whether results still come, as far as is known."""
        self._timer: threading.Timer | None = None

    def _break(self, error: Exception, *, sending: bool) -> None:
        """Note a broken connection; the server's status, if it comes, has the cause.

        Args:
            error: What happened.
            sending: Whether it was a socket that sends operands.
        """
        error.__traceback__ = None  # its frames refer to this object
        with self._lock:
            if self._interrupted:
                return  # by this side
            seen = self.broken is not None
            self.broken = self.broken or error
            if self._ended or (seen and (sending or not self._only_sending)):
                return
            if self._timer is not None:
                self._timer.cancel()
            self._only_sending = sending
            if isinstance(error, _NotAttachedError):
                # Without a connection the server waits, and has nothing to say.
                delay_s = _DRAIN_S
            else:
                delay_s = _HAND_OVER_S if sending else STATUS_S
            self._timer = later(delay_s, self._give_up)
        # The server may not know: it learns of it here, and ends the call.
        for up in self._ups():
            up.shutdown()

    def _ups(self) -> Iterable[DirectSocket]:
        """Return the sockets that send operands."""
        raise NotImplementedError

    def _end(self) -> None:
        """Note that the call has ended, or is about to."""
        with self._lock:
            self._ended = True
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None  # it refers to this object

    def _give_up(self) -> None:
        if not self._ended and self.broken is not None:
            self._call.fail(self.lost())

    def lost(self) -> ConnectionLostError:
        """Return the error of the connection that broke."""
        cause = self.broken or ConnectionError("it is closed")
        how = "the server closed it" if isinstance(cause, EOFError) else str(cause)
        return ConnectionLostError(
            f"a direct connection to {self._address} broke: {how}",
            status=StatusCode.UNAVAILABLE,
        )

    def _by_deadline(self, until: float) -> float:
        """Return `until`, or the call's deadline if that is sooner."""
        deadline = self._call.deadline
        return until if deadline is None else min(until, deadline)

    def _drained_by(self, delay_s: float) -> float:
        """Return until when results are read after the call has failed.

        A job is over at its deadline; what has arrived by then is read.

        Args:
            delay_s: Seconds for it, if the deadline is later.
        """
        now = time.monotonic()
        return max(self._by_deadline(now + delay_s), now + min(delay_s, _DRAIN_S))


class DirectTransfer(_Breakable):
    """Moves the elements of a job of arrays, in threads.

    Args:
        connections: The connections.
        call: The job's call.
        address: The server's address, for errors.
    """

    def __init__(
        self, connections: Sequence[DirectConnection], call: Call, address: str
    ) -> None:
        super().__init__(call, address)
        self._connections = connections
        self._interrupt: Callable[[], object] | None = None
        self._threads: list[threading.Thread] = []
        self._to_send = len(connections)
        """Connections on which operands are missing."""
        self._to_end = 2 * len(connections)
        """Sockets that the call's End waits for: those of operands until all was sent,
        and all until the server has answered their Attach. A server that knew of End
        first would expect the operands in messages."""
        self._receiving: set[DirectSocket] = set()
        self._error: BaseException | None = None
        """The first other error of a thread."""

    def _ups(self) -> Iterable[DirectSocket]:
        return [each.up for each in self._connections]

    def start(
        self,
        exchange: Elements,
        operands: Mapping[Matrix, Operand],
        interrupt: Callable[[], object] | None = None,
    ) -> None:
        """Begin to send and to receive.

        Args:
            exchange: The elements.
            operands: The operands that the job sends.
            interrupt: Has frames that wait for rows wait no longer.
        """
        self._interrupt = interrupt
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
                    args=(work, name == "up"),
                    name=f"gradwire-{name}-{number}",
                    daemon=True,
                )
                # Before it starts: the caller may be interrupted behind that.
                self._threads.append(thread)
                thread.start()

    def finish(self) -> None:
        """Wait for the last results, after the call has ended well.

        Raises:
            DeadlineError: They did not come by the call's deadline.
            ConnectionLostError: A connection broke.
            BaseException: The error of a thread.
        """
        self._end()
        began = time.monotonic()
        for thread in self._threads:
            while thread.is_alive():
                silent_at = self._moved_at(began) + _SILENCE_S
                until = self._by_deadline(silent_at)
                thread.join(max(until - time.monotonic(), 0.0))
                if not thread.is_alive() or time.monotonic() < until:
                    continue
                if until < silent_at:
                    self.stop()
                    raise self._call.late()
                if self._moved_at(began) + _SILENCE_S <= silent_at:
                    self.stop()
                    self.broken = self.broken or TimeoutError("no more bytes came")
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # it refers to this frame
        if self.broken is not None:
            raise self.lost()

    def _moved_at(self, least: float) -> float:
        """Return when bytes of results last came where more are expected.

        Args:
            least: The earliest time to return.
        """
        with self._lock:
            return max((least, *(each.moved_at for each in self._receiving)))

    def end_with(self, error: GradwireError) -> None:
        """End after the call has failed.

        What the server has sent before is still received: the job may resume.

        Args:
            error: The error of the call.
        """
        self._end()
        if error.reason is Reason.CONNECTION_LOST:
            # All may have been sent by then, and no thread notices it here.
            self.broken = self.broken or EOFError()
        elif isinstance(error, ClientIdleError) and (
            self._to_send == 0 or any(each.sending for each in self._ups())
        ):
            # What this side sends does not arrive.
            self.broken = self.broken or TimeoutError("no bytes have arrived there")
        self._stop_sending()
        # What arrives after the caller has cancelled is of no use.
        if not isinstance(error, ProtocolError | JobCancelledError):
            self._drain(error)
        self.stop()

    def _stop_sending(self) -> None:
        self._interrupted = True
        for connection in self._connections:
            connection.up.shutdown()
        if self._interrupt is not None:
            self._interrupt()

    def _drain(self, error: GradwireError) -> None:
        """Receive what is still on its way.

        A server that gives a reason closes the connections behind it. Of a job that it
        hands over, everything counts, however slow the network is.
        """
        until = self._drained_by(_DRAIN_S if error.reason is None else STATUS_S)
        for thread in self._threads:
            while True:
                with contextlib.suppress(RuntimeError):  # it was not started
                    thread.join(max(until - time.monotonic(), 0.0))
                if not thread.is_alive():
                    break
                if error.reason is Reason.DRAINING:
                    moved_at = max(each.down.moved_at for each in self._connections)
                    until = self._by_deadline(moved_at + STATUS_S)
                if time.monotonic() >= until:
                    return

    def stop(self) -> None:
        """End all threads. They use no memory of the job afterwards."""
        self._end()
        self._stop_sending()
        for connection in self._connections:
            connection.down.shutdown()
        for thread in self._threads:
            with contextlib.suppress(RuntimeError):  # it was not started
                thread.join()

    def close(self) -> None:
        """End all threads and close the connections."""
        self.stop()
        for connection in self._connections:
            connection.close()

    def _send(
        self,
        exchange: Elements,
        number: int,
        connection: DirectConnection,
        operands: Mapping[Matrix, Operand],
    ) -> None:
        sock = connection.up
        for frame in exchange.frames(number, operands):
            sock.send(frame.header.encode(), frame.payload)
        with self._lock:
            self._to_send -= 1
        if not connection.confirmed:
            _read_attached(sock)
        self._allow_end(exchange)

    def _receive(
        self, exchange: Elements, number: int, connection: DirectConnection
    ) -> None:
        sock, share = connection.down, exchange.share(number)
        if not connection.confirmed:
            _read_attached(sock)
        self._allow_end(exchange)
        data = memoryview(bytearray(HEADER_BYTES))
        while not share.complete:
            share.take(*_receive_frame(sock, data, share))
        with self._lock:
            self._receiving.discard(sock)

    def _allow_end(self, exchange: Elements) -> None:
        """Let End follow in the call, as far as one socket is concerned."""
        with self._lock:
            self._to_end -= 1
            exchange.all_sent = not self._to_end
        self._call.wake()

    def _run(self, work: Callable[[], None], sending: bool) -> None:
        try:
            work()
        except (EOFError, OSError) as error:
            self._break(error, sending=sending)
        except DirectFramingError as error:
            self._fail(ProtocolError(f"the server sent no frame: {error}"))
        except BaseException as error:  # noqa: BLE001 - raised by the call's reader
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._error = self._error or error
        if not self._ended:
            self._call.fail(error)


class DirectStream(_Breakable):
    """Moves the elements of a stream, whose rows and results are the caller's turn.

    One thread at a time sends, another one receives.

    Args:
        connection: The connection.
        call: The stream's call.
        address: The server's address, for errors.

    Attributes:
        connection: The connection.
    """

    def __init__(self, connection: DirectConnection, call: Call, address: str) -> None:
        super().__init__(call, address)
        self.connection = connection
        self._share: ResultShare | None = None
        self._up_confirmed = self._down_confirmed = connection.confirmed
        self._may_end = threading.Event()
        """Set when the server has answered the Attach of results, or never will."""
        if connection.confirmed:
            self._may_end.set()
        self._data = memoryview(bytearray(HEADER_BYTES))

    def _ups(self) -> Iterable[DirectSocket]:
        return [self.connection.up]

    def begin(self, exchange: DirectExchange) -> None:
        """Begin to receive the results of an exchange."""
        self._share = exchange.share(0)
        self._call.on_failure(self._interrupt_soon)

    @property
    def receives(self) -> bool:
        """Whether more frames are expected."""
        share = self._share
        return share is not None and not share.complete and self.broken is None

    def send(self, frame: Frame) -> bool:
        """Send a frame.

        Returns:
            False: the connection broke, and the call is about to fail.
        """
        if self.broken is not None:
            return False
        sock = self.connection.up
        try:
            sock.send(frame.header.encode(), frame.payload)
            if frame.header.kind == Kind.COMPLETE and not self._up_confirmed:
                self._up_confirmed = True
                _read_attached(sock)
                # A server that knew of the call's End first would expect the operands
                # in messages.
                self._may_end.wait()
        except (EOFError, OSError) as error:
            self._break(error, sending=True)
            return False
        except DirectFramingError as error:
            raise ProtocolError(str(error)) from error
        return True

    def receive(self) -> Callable[[], None] | None:
        """Receive a frame.

        Returns:
            A function that takes it; None: the connection broke, and the call has the
            cause.

        Raises:
            ProtocolError: The frame violates the contract.
        """
        sock, share = self.connection.down, self._share
        if share is None:
            raise RuntimeError("the stream has not begun")
        try:
            if not self._down_confirmed:
                self._down_confirmed = True
                _read_attached(sock)
                self._may_end.set()
            header, room = _receive_frame(sock, self._data, share)
        except (EOFError, OSError) as error:
            self._may_end.set()
            self._break(error, sending=False)
            return None
        except DirectFramingError as error:
            raise ProtocolError(f"the server sent no frame: {error}") from error
        return lambda: share.take(header, room)

    def require_whole(self) -> None:
        """Check that the connection held until the call has ended well.

        Raises:
            ConnectionLostError: It broke.
        """
        self._end()
        if self.broken is not None:
            raise self.lost()

    def _interrupt_soon(self) -> None:
        """End the use of the connection once what has arrived is read."""
        later(self._drained_by(STATUS_S) - time.monotonic(), self.interrupt)

    def interrupt(self) -> None:
        """End the use of the connection, also in other threads."""
        self._end()
        self._interrupted = True
        self._may_end.set()
        self.connection.up.shutdown()
        self.connection.down.shutdown()


def _receive_frame(
    sock: DirectSocket, data: memoryview, share: Share
) -> tuple[FrameHeader, memoryview]:
    """Receive a frame into the memory that its share has for it.

    Args:
        sock: The socket.
        data: Memory for the header.
        share: Checks the header.

    Returns:
        The header and the payload, for the share to take.
    """
    sock.receive(data)
    header = FrameHeader.decode(data)
    room = share.room(header)
    if header.length:
        sock.receive(room)
    return header, room


def _read_attached(sock: DirectSocket) -> None:
    """Read the answer to an Attach.

    Raises:
        OSError: The connection is broken.
        DirectFramingError: It is none.
    """
    answer = memoryview(bytearray(ATTACHED_BYTES))
    try:
        sock.receive(answer)
    except (EOFError, OSError) as error:
        raise _NotAttachedError(
            "the server closed it" if isinstance(error, EOFError) else str(error)
        ) from error
    if answer != ATTACHED:
        raise DirectFramingError(f"an Attach was answered with {bytes(answer)!r}")
