"""The classes `AsyncSessionLease` and `AsyncSessionLeases`."""

from __future__ import annotations

import contextlib
import os
import time
import weakref
from collections.abc import Iterator

from gradwire._api.errors import ClientStateError, DeadlineError, GradwireError
from gradwire._client._async.engine import AsyncEngine
from gradwire._client.session_base import SessionBase
from gradwire._resilience.load_balancer import Stay
from gradwire._resilience.retry import is_transient
from gradwire._transport.async_io import AsyncNews, AsyncRepeater, close_at_exit
from gradwire_protocol.v1 import session_service_pb2 as pb2


class AsyncSessionLease:
    """Keeps an open session alive on its server, and closes it.

    The lease is renewed as long as the session's object exists. If that is dropped and
    was not closed, the session is closed in the background.

    Args:
        session: The session's object.
        engine: Makes the calls to the session's server.
        stay: Keeps that server.
        token: The session's token.
        id: The session's id.
        affinity: What a proxy recognizes the session's calls by.
        lease_s: Seconds after which the server closes the session, if the lease is not
            renewed.
    """

    def __init__(
        self,
        session: SessionBase,
        engine: AsyncEngine,
        stay: Stay,
        *,
        token: str,
        id: str,  # noqa: A002 - the contract's name
        affinity: str,
        lease_s: float,
    ) -> None:
        self._engine = engine
        self._stay: Stay | None = stay
        self._token = token
        self._id = id
        self._affinity = affinity
        self._lease_s = lease_s
        self._process = os.getpid()
        self._open = True
        self._repeater = AsyncRepeater(lease_s / 3, self.renew)
        wake = self._repeater.wake
        self._session = weakref.ref(session, lambda _: wake())
        close_at_exit(self)

    @property
    def is_open(self) -> bool:
        """Whether the session was not closed, and this process has opened it."""
        return self._open and self._process == os.getpid()

    async def close(self, *, timeout_s: float | None = None) -> None:
        """Close the session, unless that was done, or a parent process has opened it.

        Args:
            timeout_s: Seconds for the server to answer, after which the lease ends the
                session; None: 10.
        """
        left_s = _CLOSE_S if timeout_s is None else timeout_s
        try:
            await self.try_close(left_s)
        except BaseException as error:
            # The interrupted call may not have reached the server.
            if was_interrupted(error) and left_s > INTERRUPTED_S:
                await self.try_close(INTERRUPTED_S)
            raise

    async def try_close(self, timeout_s: float) -> None:
        """Close the session with one call, which can be repeated if interrupted."""
        if not self.is_open:
            return
        if (session := self._session()) is not None:
            session.ended()
        await self._repeater.aclose()
        request = pb2.CloseSessionRequest(session=self._token)
        attempts = self._engine.session_attempts(
            "CloseSession", timeout_s, self._id, self._affinity
        )
        try:
            await self._engine.session_call(
                "CloseSession", request, timeout_s, attempts
            )
        except BaseException as error:
            attempts.ended(error)
            # A session that was not closed ends with its lease.
            if not isinstance(error, GradwireError):
                raise
        else:
            attempts.ended()
        self._open = False
        self._stay = None

    async def renew(self) -> bool:
        """Renew the lease; return whether to go on."""
        if self._session() is None:
            await self.close()
            return False
        request = pb2.RenewSessionRequest(session=self._token)
        try:
            await self._engine.session_call(
                "RenewSession", request, self._lease_s / 3, affinity=self._affinity
            )
        except GradwireError as error:
            # The server, or a proxy before it, may be back at the next time.
            return is_transient(error) or isinstance(error, DeadlineError)
        return True


class AsyncSessionLeases:
    """The leases of a client's sessions, of dropped ones too."""

    def __init__(self) -> None:
        self._leases: weakref.WeakSet[AsyncSessionLease] = weakref.WeakSet()
        self._opening: set[tuple[int, object]] = set()
        """Each call that opens a session, with its process."""
        self._opened = AsyncNews()
        self._closed = False

    def add(self, lease: AsyncSessionLease) -> None:
        """Add the lease of a session that was opened."""
        self._leases.add(lease)

    @contextlib.contextmanager
    def opening(self) -> Iterator[None]:
        """Have `close` wait for a session that is opened, and added, in this context.

        Raises:
            ClientStateError: The client was closed.
        """
        call = (os.getpid(), object())
        self._opening.add(call)  # first: either of this and `close` sees the other
        try:
            if self._closed:
                raise ClientStateError("the client was closed while a session opened")
            yield
        finally:
            self._opening.discard(call)
            if self._closed:
                self._opened.tell()

    async def close(self) -> None:
        """Close all sessions, and those that are being opened; open no more."""
        self._closed = True
        try:
            await self._close_all(_CLOSE_ALL_S)
        except BaseException as error:
            if was_interrupted(error):
                await self._close_all(INTERRUPTED_S)
            raise

    async def _close_all(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while (left_s := deadline - time.monotonic()) > 0:
            count = self._opened.count
            # The threads of a parent process do not open any here.
            if all(process != os.getpid() for process, _ in list(self._opening)):
                break
            await self._opened.wait(count, left_s)
        for lease in list(self._leases):
            await lease.try_close(max(deadline - time.monotonic(), 0.0))


async def undo_open(
    engine: AsyncEngine, request: pb2.OpenSessionRequest, affinity: str
) -> None:
    """Close the session that an interrupted call may have opened.

    Args:
        engine: Makes the calls to its server.
        request: The request of the call.
        affinity: What a proxy recognizes the session's calls by.
    """
    deadline = time.monotonic() + INTERRUPTED_S
    with contextlib.suppress(GradwireError):  # else it ends with its lease
        # An equal request is answered with the same session.
        answer = await engine.session_call(
            "OpenSession", request, INTERRUPTED_S, affinity=affinity
        )
        closing = pb2.CloseSessionRequest(session=answer.session)
        left_s = max(deadline - time.monotonic(), 0.0)
        await engine.session_call("CloseSession", closing, left_s, affinity=affinity)


def was_interrupted(error: BaseException | None) -> bool:
    """Return whether an error is that of Ctrl-C or a cancellation."""
    return error is not None and not isinstance(error, Exception | GeneratorExit)


INTERRUPTED_S = 1.0
"""Seconds for closing a session after Ctrl-C or a cancellation."""

_CLOSE_S = 10.0
"""Seconds for closing a session; after that its lease ends it."""

_CLOSE_ALL_S = 5.0
"""Seconds for closing all sessions of a client: a server that does not answer must not
hold up the end of a program for longer."""
