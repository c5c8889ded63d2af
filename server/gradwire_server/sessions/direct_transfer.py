"""Tensors whose elements come or leave on a direct connection.

A thread moves them between the socket and the tensor's memory, without the event loop.
"""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeAlias, TypeVar

from gradwire_protocol.checksum import crc32c
from gradwire_protocol.data_plane.frames import (
    HEADER_BYTES,
    FrameHeader,
    Kind,
)
from gradwire_protocol.data_plane.sockets import DirectSocket
from gradwire_protocol.error_reasons import Reason
from gradwire_server.admission.quota import busy
from gradwire_server.errors import (
    JobError,
    client_did_not_read,
    client_sent_nothing,
    malformed,
)
from gradwire_server.scheduling.device_worker import Then
from gradwire_server.scheduling.job_progress import JobProgress
from gradwire_server.sessions.incoming import IncomingTensor
from gradwire_server.sessions.outgoing import OutgoingTensor
from gradwire_server.sessions.windows import Work
from gradwire_server.transports.data_plane.thread_side import (
    Stopped,
    ThreadSide,
    check_crc32c,
    ended_threads,
    failure_of,
    looks,
)

Submit: TypeAlias = Callable[[Work, Then], None]
"""Has work done in the thread of the device worker, which then calls a function."""


Tensor = TypeVar("Tensor", bound=IncomingTensor | OutgoingTensor)


class DirectTransfer(ABC, Generic[Tensor]):
    """Moves a tensor's elements.

    Args:
        tensor: The tensor.
        sock: The socket of the connection that they are on.
        submit: Has work done on the session's device.
        progress: Counters to update.
    """

    def __init__(
        self,
        tensor: Tensor,
        sock: DirectSocket,
        submit: Submit,
        progress: JobProgress,
    ) -> None:
        self._tensor = tensor
        self._side = ThreadSide(sock)
        self._submit = submit
        self._progress = progress
        self._done: SimpleQueue[tuple[Exception | None] | None] = SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._ended_at = 0.0
        self._error: Exception | None = None

    async def run(self, idle_s: float) -> None:
        """Move all elements.

        Args:
            idle_s: Seconds that the client may neither send nor read.

        Raises:
            JobError: The elements are invalid, the connection broke, or the client was
                idle.
            Exception: The device's error.
        """
        thread = threading.Thread(target=self._run, name="gradwire-tensor", daemon=True)
        try:
            thread.start()
        except RuntimeError as none:  # the system has no more
            raise busy("the process can start no more threads", "threads") from none
        watch = asyncio.create_task(self._watch(idle_s))
        try:
            await asyncio.shield(self._ended)
        finally:
            watch.cancel()
            self._stop()
            await ended_threads(self._ended)
        error, self._error = self._error, None
        if error is not None:
            raise error

    def idle_since(self) -> float:
        """Return when the last element was moved, by the loop's clock; now: not yet.

        Before, `run` itself notices an idle client.
        """
        return self._ended_at if self._ended.done() else self._loop.time()

    @property
    def receiving_s(self) -> float:
        """Seconds of waiting for and receiving elements."""
        return 0.0

    @property
    def sending_s(self) -> float:
        """Seconds of sending elements."""
        return 0.0

    @abstractmethod
    def _move(self) -> None:
        """Move all elements; runs in the thread."""

    @abstractmethod
    def _idle_error(self, idle_s: float) -> JobError:
        """Return the error of a client that is idle."""

    def _do(self, work: Work) -> None:
        """Have work done on the session's device, and wait for it."""
        self._submit(work, lambda _, error: self._done.put((error,)))
        outcome = self._done.get()
        if outcome is None:
            raise Stopped
        (error,) = outcome
        if error is not None:
            raise error

    async def _watch(self, idle_s: float) -> None:
        """End the transfer of a client that neither sends nor reads."""
        async for now in looks(idle_s, [self._side]):
            if now - self._side.idle_since(now) > idle_s:
                self._error = self._idle_error(idle_s)
                self._stop()
                return

    def _stop(self) -> None:
        """Make the thread end soon."""
        if not self._ended.done():
            self._done.put(None)
            self._side.sock.shutdown()

    def _run(self) -> None:
        error: Exception | None = None
        try:
            self._move()
        except Stopped:
            pass
        except Exception as failed:  # noqa: BLE001 - raised by `run`
            error = failure_of(failed)
        self._error = self._error or error
        try:
            self._loop.call_soon_threadsafe(self._end)
        except RuntimeError:  # the loop is closed, and nobody waits
            return

    def _end(self) -> None:
        self._ended_at = self._loop.time()
        self._ended.set_result(None)


class TensorReceiver(DirectTransfer[IncomingTensor]):
    """Receives the elements of a tensor."""

    @property
    def receiving_s(self) -> float:
        """Seconds of waiting for and receiving elements."""
        return self._side.waited_s

    def _move(self) -> None:
        tensor, side = self._tensor, self._side
        data = memoryview(bytearray(HEADER_BYTES))
        while True:
            with side:
                side.sock.receive(data)
            frame = FrameHeader.decode(data)
            if frame.kind == Kind.COMPLETE:
                tensor.complete(frame.position)
                return
            _check(frame)
            work = tensor.make_room(
                frame.position, frame.length, frame.crc32c, "frame", "length"
            )
            if work is not None:
                self._do(work)
            room = tensor.room(frame.length)
            with side:
                side.sock.receive(room)
            check_crc32c(frame, room)
            tensor.digest(room)
            tensor.commit(frame.length)
            self._progress.bytes_received += frame.length

    def _idle_error(self, idle_s: float) -> JobError:
        return client_sent_nothing(idle_s, "frames on a direct connection")


class TensorSender(DirectTransfer[OutgoingTensor]):
    """Sends the elements of a tensor."""

    @property
    def sending_s(self) -> float:
        """Seconds of sending elements."""
        return self._side.waited_s

    def _move(self) -> None:
        tensor, side = self._tensor, self._side
        for first, end in tensor.pieces():
            if (work := tensor.load(first, end)) is not None:
                self._do(work)
            payload = tensor.payload(first, end)
            crc = crc32c(payload) if tensor.checksum else None
            index = first // tensor.itemsize
            frame = FrameHeader(Kind.ELEMENTS, 0, index, len(payload), crc)
            with side:
                side.sock.send(frame.encode(), payload)
            self._progress.bytes_sent += len(payload)
        with side:
            side.sock.send(FrameHeader(Kind.COMPLETE, 0, tensor.size).encode())

    def _idle_error(self, idle_s: float) -> JobError:
        return client_did_not_read(idle_s)


def _check(frame: FrameHeader) -> None:
    """Check that a frame has elements of a tensor.

    Raises:
        JobError: It has not.
    """
    if frame.kind != Kind.ELEMENTS:
        raise malformed(f"a client's frame has kind {frame.kind}")
    if frame.matrix:
        raise JobError(
            Reason.MATRIX_INVALID,
            f"frame.matrix is {frame.matrix}: expected 0, because the elements are of "
            f"a tensor",
            field="frame.matrix",
        )
    if not frame.length:
        raise JobError(
            Reason.PAYLOAD_INVALID,
            "frame.length is 0: expected at least one element",
            field="frame.length",
        )
