"""What calls have in common whose threads use the sockets of direct connections."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

from gradwire_protocol.checksum import crc32c
from gradwire_protocol.data_plane.frames import DirectFramingError, FrameHeader
from gradwire_protocol.data_plane.sockets import DirectSocket
from gradwire_protocol.error_reasons import Reason
from gradwire_server.errors import JobError, malformed


class Stopped(Exception):  # noqa: N818 - no error: the call has ended, or ends
    """The thread has nothing more to do."""


class ThreadSide:
    """One socket, and the time that its thread spends in the system with it.

    Args:
        sock: The socket.

    Use it as a context manager around each call of the socket.

    Attributes:
        waited_s: Seconds within the context.
        ended: Whether the thread uses the socket no more.
    """

    def __init__(self, sock: DirectSocket) -> None:
        self.sock = sock
        self.waited_s = 0.0
        self.ended = False
        self._since = 0.0

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.waited_s += time.monotonic() - self._since
        self._since = 0.0

    def idle_since(self, now: float) -> float:
        """Return since when the thread waits for the client, without a byte."""
        since = self._since
        return max(since, self.sock.moved_at) if since else now

    def touch(self, now: float) -> None:
        """Begin anew to count idle time."""
        self.sock.moved_at = now


async def looks(idle_s: float, sides: Sequence[ThreadSide]) -> AsyncIterator[float]:
    """Yield the time again and again, to see whether a client is idle.

    After the process was suspended, idle time begins anew: what has arrived meanwhile
    is read first.

    Args:
        idle_s: Seconds that a client may be idle.
        sides: The sockets of the call.
    """
    pause_s = min(idle_s / 4, 1.0)
    looked_at = time.monotonic()
    while True:
        await asyncio.sleep(pause_s)
        now = time.monotonic()
        suspended = now - looked_at > pause_s + _MAX_LAG_S
        looked_at = now
        if suspended:
            for side in sides:
                side.touch(now)
        else:
            yield now


async def ended_threads(ended: asyncio.Future[None]) -> None:
    """Wait for threads that end soon, even if the caller is cancelled meanwhile."""
    cancelled: asyncio.CancelledError | None = None
    while not ended.done():
        try:
            await asyncio.shield(ended)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled


def check_crc32c(frame: FrameHeader, payload: memoryview) -> None:
    """Check the payload of a frame, if it has a checksum.

    Raises:
        JobError: It was damaged.
    """
    if frame.crc32c is None:
        return
    found = crc32c(payload)
    if found != frame.crc32c:
        raise JobError(
            Reason.CHECKSUM_MISMATCH,
            f"frame.crc32c is {frame.crc32c:#010x}, but the payload that came has "
            f"{found:#010x}",
            field="frame.crc32c",
        )


def is_broken(error: Exception) -> bool:
    """Return whether a thread failed because its connection broke."""
    return isinstance(error, EOFError | OSError)


def failure_of(error: Exception) -> Exception:
    """Return the error of a call with whose frames a thread failed."""
    if isinstance(error, DirectFramingError):
        return malformed(str(error))
    if not is_broken(error):
        return error
    how = "the client closed it" if isinstance(error, EOFError) else str(error)
    return JobError(
        Reason.CONNECTION_LOST, f"a direct connection of this call broke: {how}"
    )


_MAX_LAG_S = 1.0
"""A look this much too late means that the process was suspended."""
