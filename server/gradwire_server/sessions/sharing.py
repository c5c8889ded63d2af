"""Frozen tensors with equal elements, of all sessions of a tenant.

A tensor is found by the hash of its elements, which the server has computed itself from
what it received: who asks for a hash gets those elements, and no others. Only tensors
of the same tenant are looked at, so that the answer, and its time, tell nothing about
those of others.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

from gradwire_protocol.error_reasons import Reason
from gradwire_server.errors import JobError
from gradwire_server.sessions.tensors import Contents, KeptTensor

_BEGIN_S = 5.0
"""Seconds in which a client that has asked for a tensor begins to send it. Others who
ask wait for that: workers that start together ask together."""

_WAIT_S = 10.0
"""Most seconds that who asks waits for a tensor that is on its way: its own link may be
faster."""


class Sharer(Protocol):
    """A session, as far as it shares tensors."""

    ended: JobError | None
    tensors: dict[int, KeptTensor]

    def lending(self, tensor: KeptTensor) -> AbstractContextManager[None]:
        """Keep a tensor's memory within a context, whatever becomes of the session."""


@dataclass(eq=False, slots=True)
class _Coming:
    """A tensor that a session is about to put, or puts."""

    session: Sharer
    expiry: asyncio.TimerHandle | None = None
    """Until elements come."""
    waiting: dict[asyncio.Future[None], Sharer] = field(default_factory=dict)
    """Those who have asked for it."""


class SharedTensors:
    """The frozen tensors of a server's sessions, by their contents.

    It is used in the event loop's thread alone.
    """

    def __init__(self) -> None:
        self._tensors: dict[Contents, dict[KeptTensor, Sharer]] = {}
        self._coming: dict[Contents, _Coming] = {}

    @property
    def saved_bytes(self) -> int:
        """Bytes that sessions count as used more than once."""
        saved = 0
        for sharing in self._tensors.values():
            arrays = {id(each.array) for each in sharing}
            saved += (len(sharing) - len(arrays)) * next(iter(sharing)).size_bytes
        return saved

    def find(self, contents: Contents) -> tuple[Sharer, KeptTensor] | None:
        """Return a tensor with these contents, and its open session."""
        for tensor, session in self._tensors.get(contents, {}).items():
            return session, tensor
        return None

    def sharers(self, tensor: KeptTensor) -> int:
        """Return the number of tensors with a tensor's memory; 0: it has no hash."""
        if tensor.contents is None:
            return 0
        sharing = self._tensors.get(tensor.contents, {})
        return sum(each.array is tensor.array for each in sharing)

    def add(self, session: Sharer, tensor: KeptTensor) -> None:
        """Add a tensor of a session, if it is to be shared."""
        if tensor.contents is not None:
            self._tensors.setdefault(tensor.contents, {})[tensor] = session
            if tensor.contents in self._coming:
                self._came(tensor.contents)

    def remove(self, tensor: KeptTensor) -> None:
        """Remove a tensor, if it was added: its session no longer has it."""
        if tensor.contents is not None:
            sharing = self._tensors.get(tensor.contents, {})
            sharing.pop(tensor, None)
            if not sharing:
                self._tensors.pop(tensor.contents, None)

    def end(self, session: Sharer) -> None:
        """Forget a session, and answer what it asks: it is over."""
        for tensor in session.tensors.values():
            self.remove(tensor)
        for contents, coming in list(self._coming.items()):
            if coming.session is session:
                self._came(contents)
            for future, asking in coming.waiting.items():
                if asking is session:
                    _wake(future)

    @asynccontextmanager
    async def asked(
        self, contents: Contents, session: Sharer, wait_s: float
    ) -> AsyncIterator[KeptTensor | None]:
        """Ask for a tensor, and use its memory within this context.

        If another session is putting one, wait for it. If there is none, the asking
        session is expected to put it.

        Args:
            contents: What the tensor is to have.
            session: Who asks.
            wait_s: Most seconds to wait.

        Yields:
            What was found; None: the asking client has to send the elements.
        """
        found = await self._ask(contents, session, min(wait_s, _WAIT_S))
        if found is not None:
            sharer, tensor = found
            with sharer.lending(tensor):
                yield tensor
            return
        try:
            yield None
        except BaseException as error:
            if not isinstance(error, JobError) or (
                error.reason is not Reason.PAYLOAD_MISSING
            ):
                self._give_up(contents, session)
            raise

    @asynccontextmanager
    async def putting(self, contents: Contents, session: Sharer) -> AsyncIterator[None]:
        """Let others wait for a tensor while its elements come, within this context."""
        coming = self._coming.get(contents)
        if coming is None:
            coming = self._coming[contents] = _Coming(session)
        if coming.session is session and coming.expiry is not None:
            coming.expiry.cancel()
        try:
            yield
        finally:
            self._give_up(contents, session)

    async def _ask(
        self, contents: Contents, session: Sharer, wait_s: float
    ) -> tuple[Sharer, KeptTensor] | None:
        loop = asyncio.get_running_loop()
        until = loop.time() + wait_s
        while (found := self.find(contents)) is None and session.ended is None:
            coming = self._coming.get(contents)
            if coming is None:
                self._expect(contents, session)
                return None
            left_s = until - loop.time()
            if coming.session is session or left_s <= 0:
                return None
            future: asyncio.Future[None] = loop.create_future()
            coming.waiting[future] = session
            timer = loop.call_later(left_s, _wake, future)
            try:
                await future
            finally:
                timer.cancel()
                coming.waiting.pop(future, None)
        return found

    def _give_up(self, contents: Contents, session: Sharer) -> None:
        """No longer expect a tensor from a session."""
        coming = self._coming.get(contents)
        if coming is not None and coming.session is session:
            self._came(contents)

    def _expect(self, contents: Contents, session: Sharer) -> None:
        loop = asyncio.get_running_loop()
        self._coming[contents] = _Coming(
            session, loop.call_later(_BEGIN_S, self._came, contents)
        )

    def _came(self, contents: Contents) -> None:
        """Answer those who wait for a tensor: it has come, or will not."""
        coming = self._coming.pop(contents)
        if coming.expiry is not None:
            coming.expiry.cancel()
        for future in coming.waiting:
            _wake(future)


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
