# Generated from _async/session_lease.py by scripts/generate-sync: edit that file.

"""The class `SyncSessionLease`."""

from __future__ import annotations

import os
import weakref

from gradwire._api.errors import DeadlineError, GradwireError
from gradwire._client._sync.engine import SyncEngine
from gradwire._client.session_base import SessionBase
from gradwire._resilience.call_span import session_span
from gradwire._resilience.load_balancer import Stay
from gradwire._resilience.retry import Attempts, is_transient
from gradwire._transport.sync_io import SyncRepeater, close_at_exit
from gradwire_protocol.v1 import session_service_pb2 as pb2


class SyncSessionLease:
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
        engine: SyncEngine,
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
        self._repeater = SyncRepeater(lease_s / 3, self.renew)
        wake = self._repeater.wake
        self._session = weakref.ref(session, lambda _: wake())
        close_at_exit(self)

    @property
    def is_open(self) -> bool:
        """Whether the session was not closed, and this process has opened it."""
        return self._open and self._process == os.getpid()

    def close(self, *, timeout_s: float | None = None) -> None:
        """Close the session, unless that was done, or a parent process has opened it.

        Args:
            timeout_s: Seconds for the server to answer, after which the lease ends the
                session; None: 10.
        """
        if not self.is_open:
            return
        if (session := self._session()) is not None:
            session.ended()
        self._repeater.close()
        request = pb2.CloseSessionRequest(session=self._token)
        left_s = _CLOSE_S if timeout_s is None else timeout_s
        span = session_span("CloseSession", self._engine.jobs.metadata, self._id)
        attempts = Attempts(self._engine.retries, left_s, span=span)
        attempts.affinity = self._affinity
        try:
            self._engine.session_call("CloseSession", request, left_s, attempts)
        except BaseException as error:
            attempts.ended(error)
            # A session that was not closed ends with its lease.
            if not isinstance(error, GradwireError):
                raise
        else:
            attempts.ended()
        finally:
            self._open = False
            self._stay = None

    def renew(self) -> bool:
        """Renew the lease; return whether to go on."""
        if self._session() is None:
            self.close()
            return False
        request = pb2.RenewSessionRequest(session=self._token)
        try:
            self._engine.session_call(
                "RenewSession", request, self._lease_s / 3, affinity=self._affinity
            )
        except GradwireError as error:
            # The server, or a proxy before it, may be back at the next time.
            return is_transient(error) or isinstance(error, DeadlineError)
        return True


_CLOSE_S = 10.0
"""Seconds for closing a session; after that its lease ends it."""
