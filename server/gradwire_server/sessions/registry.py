"""The open sessions of a server."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    ExitStack,
    asynccontextmanager,
    contextmanager,
    nullcontext,
)
from typing import NamedTuple, TypeAlias

from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.job_spec import JobSpec
from gradwire_protocol.limits import MAX_NAME_LENGTH
from gradwire_protocol.v1 import session_service_pb2 as pb2
from gradwire_server.backends.kept_memory import KeptMemory
from gradwire_server.errors import JobError
from gradwire_server.observability.figures import SessionFigures
from gradwire_server.sessions.accounts import Accounts
from gradwire_server.sessions.digest import digest
from gradwire_server.sessions.job_tensors import JobTensors
from gradwire_server.sessions.session import Session
from gradwire_server.sessions.sharing import SharedTensors
from gradwire_server.sessions.turns import OnWait

_log = logging.getLogger("gradwire_server")

DEFAULT_LEASE_S = 600.0
"""Lease of a session that does not ask for another one."""

MIN_LEASE_S = 1.0
"""Shortest lease: the client renews it three times meanwhile."""

_KEY_BYTES = range(16, 65)
"""Lengths of a key that identifies a request."""

_MAX_EXPIRED = 1024
"""Expired sessions that are remembered, to tell their clients why they are gone."""

_Key: TypeAlias = tuple[str, str]
"""A tenant and a token."""

OpenMemory: TypeAlias = Callable[[int, int, str], Awaitable[KeptMemory]]
"""Opens memory of so many bytes on the device at a position, for a tenant."""


class _Expired(NamedTuple):
    at: float
    """By the event loop's clock."""
    cause: JobError


class Sessions:
    """The open sessions of one server.

    Args:
        accounts: Reserves the sessions' memory.
        devices: Number of devices.
        instance: Name of the server instance.
        lease_max_s: Longest lease, in seconds.
        open_memory: Opens a session's memory on its device.
    """

    def __init__(
        self,
        accounts: Accounts,
        devices: int,
        instance: str,
        lease_max_s: float,
        open_memory: OpenMemory,
    ) -> None:
        self.accounts = accounts
        self._devices = devices
        self._open_memory = open_memory
        self._instance = instance
        self._lease_max_s = lease_max_s
        # By tenant too: with a token of another tenant's, a caller finds what it finds
        # with one that nobody has, in the same time.
        self._open: dict[_Key, Session] = {}
        self._expired: OrderedDict[_Key, _Expired] = OrderedDict()
        self._by_key: dict[tuple[str, bytes], Session] = {}
        """The sessions that can be asked for again, by tenant and key."""
        self._opening: dict[tuple[str, bytes], asyncio.Event] = {}
        self._expired_count = 0
        self._shared = SharedTensors()
        self._steps: set[asyncio.Task[pb2.StepResponse]] = set()

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Session]:
        """Return the open sessions of all tenants, the oldest first."""
        return iter(list(self._open.values()))

    def figures(self) -> SessionFigures:
        """Return what sessions keep now."""
        return SessionFigures(
            open=len(self._open),
            reserved_bytes=self.accounts.kept_bytes,
            used_bytes=sum(each.used_bytes for each in self._open.values())
            - self._shared.saved_bytes,
            limit_bytes=self.accounts.limit_bytes(self._devices),
            expired=self._expired_count,
        )

    async def open(self, request: pb2.OpenSessionRequest, tenant: str) -> Session:
        """Open a session on the device with the fewest, and reserve its memory.

        Raises:
            JobError: The request is invalid, or there is no memory for the session.
        """
        label = request.label
        if not is_printable(label):
            raise JobError(
                Reason.OPTION_INVALID,
                f"label has {len(label)} characters or unprintable ones: expected at "
                f"most {MAX_NAME_LENGTH} printable ASCII characters",
                field="label",
            )
        lease_s = request.lease_seconds or DEFAULT_LEASE_S
        if not lease_s > 0:
            raise JobError(
                Reason.OPTION_INVALID,
                f"lease_seconds is {lease_s:g}: expected at least 0",
                field="lease_seconds",
            )
        lease_s = min(max(lease_s, MIN_LEASE_S), self._lease_max_s)
        device, held = self._reserved(request.keep_bytes, tenant)
        try:
            memory = await self._open_memory(request.keep_bytes, device, tenant)
        except BaseException:
            held.close()
            raise
        key = (tenant, request.idempotency_key)

        def free() -> None:
            if self._by_key.get(key) is session:
                del self._by_key[key]
            held.close()

        session = Session(
            tenant,
            label,
            request.keep_bytes,
            lease_s,
            device=device,
            memory=memory,
            shared=self._shared,
            on_free=free,
        )
        self._open[_key(session)] = session
        if request.idempotency_key:
            session.request = digest(request)
            self._by_key[key] = session
        self._expire_later(session)
        return session

    @asynccontextmanager
    async def opening(
        self, request: pb2.OpenSessionRequest, tenant: str
    ) -> AsyncIterator[Session | None]:
        """Open a session within this context, one after the other for each key.

        Yields:
            The session that an equal request has opened before, or None.

        Raises:
            JobError: The key is invalid, or was used for another request.
        """
        key = (tenant, request.idempotency_key)
        if not key[1]:
            yield None
            return
        check_key(key[1], "idempotency_key")
        while (earlier := self._opening.get(key)) is not None:
            await earlier.wait()
        ended = self._opening[key] = asyncio.Event()
        try:
            yield self._opened_before(request, key)
        finally:
            del self._opening[key]
            ended.set()

    def _opened_before(
        self, request: pb2.OpenSessionRequest, key: tuple[str, bytes]
    ) -> Session | None:
        session = self._by_key.get(key)
        if session is None or session.ended is not None:
            return None
        if session.request != digest(request):
            raise JobError(
                Reason.OPTION_INVALID,
                "idempotency_key is that of a session that another request has opened: "
                "choose a new one",
                field="idempotency_key",
            )
        with session.used():  # renews its lease
            return session

    def of(self, tenant: str) -> list[Session]:
        """Return a tenant's open sessions, the oldest first."""
        return [each for each in self._open.values() if each.tenant == tenant]

    def close(self, token: str, tenant: str, name: str = "") -> Session | None:
        """Close a session.

        Args:
            token: Its token; empty: `name` is given.
            tenant: The caller.
            name: Its name for people.

        Returns:
            The session, or None if there is none.
        """
        if not token:
            token = next((s.token for s in self.of(tenant) if s.id == name), "")
        session = self._open.pop((tenant, token), None)
        if session is None:
            return None
        session.end(self._unknown())
        return session

    def step_begun(self, step: asyncio.Task[pb2.StepResponse]) -> None:
        """Count a step that goes on to its end, whatever becomes of its call."""
        self._steps.add(step)
        step.add_done_callback(self._steps.discard)

    async def steps_made(self) -> None:
        """Wait until the steps that have begun are made."""
        while self._steps:
            await asyncio.wait(self._steps)

    def close_all(self) -> None:
        """Close all sessions: the server stops."""
        for session in list(self._open.values()):
            if session.is_unsaved and session.newest_saved != session.step:
                _log.warning(
                    "a session ended with the server, and its last step is not saved",
                    extra={**session.log, "step": session.step},
                )
            self.close(session.token, session.tenant)

    def fail(self, session: Session, cause: JobError) -> None:
        """End a session whose tensors are no longer what its client believes."""
        if self._open.pop(_key(session), None) is not None:
            self._remember(session, cause)
            session.end(cause)

    def named(self, name: str, tenant: str) -> Session:
        """Return a tenant's session by its name for people.

        Raises:
            JobError: There is none.
        """
        for session in self.of(tenant):
            if session.id == name:
                return session
        raise JobError(
            Reason.SESSION_UNKNOWN,
            f"id is {name[:64]!r}: this server has no session of yours with this name",
            field="id",
        )

    @contextmanager
    def used(self, token: str, tenant: str, path: str = "session") -> Iterator[Session]:
        """Use a session within this context.

        Raises:
            JobError: There is no such session of this tenant, or it has expired.
        """
        session = self._open.get((tenant, token))
        if session is None:
            self._raise_if_expired(token, tenant)
            unknown = self._unknown()
            unknown.field = path
            raise unknown
        with session.used():
            yield session

    def job(
        self, spec: JobSpec, tenant: str, on_wait: OnWait | None = None
    ) -> AbstractAsyncContextManager[JobTensors]:
        """Use a job's kept tensors within the returned context.

        No step of the session is made meanwhile.

        Args:
            spec: The job.
            tenant: Its tenant.
            on_wait: Called now and then while the job waits for a step.

        Raises:
            JobError: On entry: the session or a tensor is unknown, or does not fit the
                job.
        """
        if not (spec.kept or spec.keep or spec.into):
            return nullcontext(JobTensors(spec, None))
        return self._job(spec, tenant, on_wait)

    @asynccontextmanager
    async def _job(
        self, spec: JobSpec, tenant: str, on_wait: OnWait | None
    ) -> AsyncIterator[JobTensors]:
        with self.used(spec.session, tenant, "job.session.session") as session:
            async with session.turns.shared(on_wait):
                session.require_open()
                tensors = JobTensors(spec, session)
                try:
                    yield tensors
                finally:
                    tensors.close()

    def _reserved(self, keep_bytes: int, tenant: str) -> tuple[int, ExitStack]:
        """Reserve a session's memory on the least used device with room for it.

        Returns:
            The position of the device, and what to close in the end.

        Raises:
            JobError: No device has room.
        """
        used = Counter(session.device for session in self._open.values())
        refusals: list[JobError] = []
        for position in sorted(range(self._devices), key=lambda each: used[each]):
            try:
                return position, self.accounts.reserve(keep_bytes, tenant, position)
            except JobError as refusal:
                refusals.append(refusal)
        # A device that is full now is worth another try.
        later = [each for each in refusals if each.reason is Reason.BUSY]
        raise [*later, *refusals][0]

    def _expire_later(self, session: Session) -> None:
        loop = asyncio.get_running_loop()

        def look() -> None:
            if _key(session) not in self._open:
                return
            # A call renews the lease when it ends, too.
            renewed_at = loop.time() if session.in_use else session.renewed_at
            due = renewed_at + session.lease_s
            if loop.time() < due:
                session.expiry = loop.call_at(due, look)
            else:
                self._expire(session)

        session.expiry = loop.call_later(session.lease_s, look)

    def _expire(self, session: Session) -> None:
        del self._open[_key(session)]
        self._expired_count += 1
        setting = "lease_seconds"
        if session.lease_s == self._lease_max_s:
            setting += ", at most the server's session_lease_max"
        cause = JobError(
            Reason.SESSION_EXPIRED,
            f"the session expired after {session.lease_s:g} s without a call "
            f"({setting})",
            metadata={"server_instance": self._instance},
        )
        self._remember(session, cause)
        _log.warning(
            "a session expired",
            extra={
                **session.log,
                "lease_s": session.lease_s,
                "keep_bytes": session.keep_bytes,
            },
        )
        session.end(cause)

    def _remember(self, session: Session, cause: JobError) -> None:
        now = asyncio.get_running_loop().time()
        self._expired[_key(session)] = _Expired(now, cause)
        while len(self._expired) > _MAX_EXPIRED:
            self._expired.popitem(last=False)

    def _raise_if_expired(self, token: str, tenant: str) -> None:
        expired = self._expired.get((tenant, token))
        if expired is not None:
            ago_s = asyncio.get_running_loop().time() - expired.at
            raise JobError(
                expired.cause.reason,
                f"{expired.cause.message}; that was {ago_s:.0f} s ago",
                metadata=expired.cause.metadata,
            )

    def _unknown(self) -> JobError:
        return JobError(
            Reason.SESSION_UNKNOWN,
            "this server has no such session: it was closed, or opened on another "
            "server or before this one was started",
            field="session",
            metadata={"server_instance": self._instance},
        )


def check_key(key: bytes, path: str) -> None:
    """Check a key that identifies a request.

    Raises:
        JobError: It is too short to be random, or too long.
    """
    if key and len(key) not in _KEY_BYTES:
        raise JobError(
            Reason.OPTION_INVALID,
            f"{path} has {len(key)} bytes: expected {_KEY_BYTES[0]} to "
            f"{_KEY_BYTES[-1]} random ones, or none",
            field=path,
        )


def _key(session: Session) -> _Key:
    return session.tenant, session.token


def is_printable(name: str) -> bool:
    """Return whether a label or name is short and printable ASCII, or empty."""
    return len(name) <= MAX_NAME_LENGTH and (
        not name or (name.isascii() and name.isprintable())
    )
