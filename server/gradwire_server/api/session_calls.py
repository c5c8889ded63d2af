"""What all calls with a session need."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial

from gradwire_server.api.call_state import CallState
from gradwire_server.api.job_service import JobService
from gradwire_server.backends.base import DeviceLostError
from gradwire_server.scheduling.device_worker import TenantHandle
from gradwire_server.sessions.outgoing import Do
from gradwire_server.sessions.session import Session


class SessionCalls:
    """Sessions, and their devices, for handlers of methods.

    Args:
        service: The job service.
    """

    def __init__(self, service: JobService) -> None:
        self._service = service
        self._sessions = service.sessions
        self._idle_s = service.settings.idle_timeout

    @contextmanager
    def _used(self, call: CallState, token: str) -> Iterator[Session]:
        with self._sessions.used(token, call.tenant) as session:
            call.session = session.id
            yield session

    def _worker(self, call: CallState, session: Session) -> TenantHandle:
        return self._service.workers[session.device].of(call.tenant)

    @asynccontextmanager
    async def _on_device(self, call: CallState, session: Session) -> AsyncIterator[Do]:
        """Provide what does work on a session's device for a call.

        After this context none of it is in progress.

        Raises:
            JobError: The device is lost.
        """
        worker = self._worker(call, session)
        try:
            yield partial(worker.submit, call)
        except DeviceLostError as error:
            raise await self._service.device_lost(session.device, error) from None
        finally:
            await worker.discard(call)
