"""Puts of tensors that can be repeated."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.v1 import session_service_pb2 as pb2
from gradwire_server.errors import JobError
from gradwire_server.sessions.digest import digest


@dataclass(frozen=True, slots=True)
class _Running:
    task: asyncio.Task[object]
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class Puts:
    """The puts of a session: one that is repeated is made once.

    Without that, a repetition would need memory beside that of its first attempt, and
    an exactly full session has none.
    """

    def __init__(self) -> None:
        self._running: dict[bytes, _Running] = {}
        """By the digest of the header."""
        self._made: dict[int, dict[str, bytes]] = {}
        """The digests of headers whose tensors and states are there, by number and
        state."""

    @asynccontextmanager
    async def one(self, header: pb2.TensorHeader) -> AsyncIterator[bool]:
        """Put a tensor within this context, in the calling task.

        An equal put that runs elsewhere is ended first: its client has given it up.

        Yields:
            Whether an equal put has been made.

        Raises:
            JobError: An equal put has come meanwhile.
        """
        if not header.idempotency_key:
            yield False
            return
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a call runs in a task")
        name = _name(header)
        while (earlier := self._running.get(name)) is not None:
            earlier.task.cancel(_REPEATED)
            await earlier.ended.wait()
        own = self._running[name] = _Running(task)
        try:
            yield self._made.get(header.tensor, {}).get(header.state) == name
        except asyncio.CancelledError as cancelled:
            if cancelled.args != (_REPEATED,):
                raise
            task.uncancel()
            raise JobError(
                Reason.JOB_CANCELLED, "the same put came again, in another call"
            ) from None
        finally:
            del self._running[name]
            own.ended.set()

    def made(self, header: pb2.TensorHeader) -> None:
        """Remember that a tensor was put."""
        made = self._made.setdefault(header.tensor, {})
        made[header.state] = _name(header) if header.idempotency_key else b""

    def forget(self, number: int) -> None:
        """Forget the puts of a tensor and its states: it was dropped."""
        self._made.pop(number, None)


def _name(header: pb2.TensorHeader) -> bytes:
    return digest(header)


_REPEATED = "the put is repeated"
