"""Choice of the server for each job of a client with several servers.

A job goes to the server with the fewest jobs of this client for each of its devices;
among equals, to the one that was chosen least recently. All servers are compared,
because there are only a few. A server that is unavailable is ejected for a while, which
doubles with each failure. It is probed before its next job.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Generic, Self, TypeVar
from weakref import WeakSet

from grpc import StatusCode

from gradwire._api.errors import (
    ConnectError,
    DrainingError,
    ExhaustedError,
    GradwireError,
    UnavailableError,
    VerificationError,
)
from gradwire._api.types import ServerInfo
from gradwire._resilience.retry import Attempts, OvertakenError, is_transient

EngineT = TypeVar("EngineT")

FIRST_OUT_S = 0.5
MOST_OUT_S = 10.0
"""Ejection times after the first failure, and at most, in seconds."""

WRONG_OUT_S = 60.0
"""Ejection time after wrong results, in seconds."""

ASK_S = 1.0
"""Timeout of a probe of an ejected server, in seconds."""

RESOLVED_S = 30.0
"""Time for which a name's addresses are used without a new lookup, in seconds. It is
reduced to SOON_S after a server was unavailable."""

SOON_S = 1.0


class Stay:
    """A session's reference to its server. While it exists, the server is kept."""


@dataclass(eq=False, slots=True)
class ServerState(Generic[EngineT]):
    """The state of one server."""

    address: str

    engine: EngineT
    """Makes the calls to this server."""

    name: str | None = None
    """The DNS name with this address; None if the address was given."""

    running: int = 0
    """Number of this client's jobs on the server."""

    devices: int = 1
    """Number of its devices, once it was asked."""

    turn: int = 0
    """Number of the last choice of this server, for the least recently chosen one."""

    failures: int = 0
    """Number of consecutive failures."""

    ejected_until: float = 0.0
    """Time at which the ejection ends."""

    needs_probe: bool = False
    """Whether the server must be probed before its next job."""

    asking: bool = False
    """Whether a probe is in progress."""

    gone: bool = False
    """Whether the client no longer has this address."""

    stays: WeakSet[Stay] = field(default_factory=WeakSet)
    """The sessions on the server, for which it is kept when it is gone."""


class LoadBalancer(Generic[EngineT]):
    """The servers of a client. Thread-safe.

    Args:
        make: Creates the engine for an address. The second argument is the DNS name
            with the address, or None.
        addresses: The known addresses.
        names: ``HOST:PORT`` of the DNS names to look up.
        clock: A monotonic clock, in seconds.
        draw: Draws a number between two others.
    """

    def __init__(
        self,
        make: Callable[[str, str | None], EngineT],
        addresses: Sequence[str],
        names: Sequence[str] = (),
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._make = make
        self._names = tuple(names)
        self._clock = clock
        self._draw = draw
        self._lock = threading.Lock()
        self._turns = 0
        self._resolve_at = clock()
        self._unresolved: dict[str, GradwireError] = {}
        self._members = [ServerState(each, make(each, None)) for each in addresses]

    @property
    def members(self) -> list[ServerState[EngineT]]:
        """The current servers."""
        with self._lock:
            return [member for member in self._members if not member.gone]

    @contextlib.contextmanager
    def held(
        self, wanted: Callable[[ServerState[EngineT]], bool] | None = None
    ) -> Iterator[list[ServerState[EngineT]]]:
        """Keep the engines of some of the current servers open meanwhile.

        Args:
            wanted: Whether to include a server; None: all.
        """
        with self._lock:
            held = [
                each
                for each in self._members
                if not each.gone and (wanted is None or wanted(each))
            ]
            for member in held:
                member.running += 1
        try:
            yield held
        finally:
            with self._lock:
                for member in held:
                    member.running = max(0, member.running - 1)

    def idle_gone(self) -> list[EngineT]:
        """Remove idle servers that are gone, and on which no session is open.

        Returns:
            Their engines, which the caller must close.
        """
        with self._lock:
            idle = [
                each
                for each in self._members
                if each.gone and not each.running and not each.stays
            ]
            for member in idle:
                self._members.remove(member)
            return [member.engine for member in idle]

    def engines(self) -> list[EngineT]:
        """Return the engines of all servers, including servers that are gone."""
        with self._lock:
            return [member.engine for member in self._members]

    def names_due(self) -> tuple[str, ...]:
        """Return the names that the caller must look up now."""
        with self._lock:
            if not self._names or self._clock() < self._resolve_at:
                return ()
            self._resolve_at = self._clock() + RESOLVED_S
            return self._names

    def resolved(self, name: str, addresses: Sequence[str]) -> None:
        """Set the current addresses of a name."""
        with self._lock:
            self._unresolved.pop(name, None)
            there = {member.address for member in self._members}
            for address in addresses:
                if address not in there:
                    engine = self._make(address, name)
                    self._members.append(ServerState(address, engine, name))
            for member in self._members:
                if member.name == name:
                    member.gone = member.address not in addresses

    def not_resolved(self, name: str, error: OSError) -> None:
        """Record a failed lookup. The name keeps its earlier addresses."""
        with self._lock:
            self._resolve_at = min(self._resolve_at, self._clock() + SOON_S)
            self._unresolved[name] = ConnectError(
                f"no address was found for the name in {name}"
                f" ({error.strerror or error})",
                status=StatusCode.UNAVAILABLE,
            )

    def unresolved(self) -> dict[str, GradwireError]:
        """Return the names without an address, and their errors."""
        with self._lock:
            return dict(self._unresolved)

    def choose(
        self, avoid: Collection[str] = (), unusable: Collection[str] = ()
    ) -> ServerState[EngineT] | None:
        """Choose the server for the next job, and count the job there.

        Args:
            avoid: Addresses to choose only if there are no others.
            unusable: Addresses not to choose.

        Returns:
            The server, or None if there is none.
        """
        with self._lock:
            now = self._clock()
            there = [
                member
                for member in self._members
                if not member.gone and member.address not in unusable
            ]
            ready = [m for m in there if m.ejected_until <= now and not m.asking]
            # If all are ejected, try them all the same.
            chosen = min(
                ready or there,
                key=lambda m: (m.address in avoid, m.running / m.devices, m.turn),
                default=None,
            )
            if chosen is not None:
                self._turns += 1
                chosen.turn = self._turns
                chosen.running += 1
                chosen.asking = chosen.needs_probe
            return chosen

    def release(self, member: ServerState[EngineT]) -> None:
        """Record that a server's job has ended."""
        with self._lock:
            member.running = max(0, member.running - 1)
            member.asking = False

    def mark_healthy(self, member: ServerState[EngineT]) -> None:
        """Record that a server is available."""
        with self._lock:
            member.failures, member.ejected_until = 0, 0.0
            member.needs_probe = member.asking = False

    def record_failure(
        self, member: ServerState[EngineT], error: GradwireError
    ) -> None:
        """Record a failed call, and eject the server if necessary."""
        with self._lock:
            now = self._clock()
            if isinstance(error, VerificationError):
                member.ejected_until = now + WRONG_OUT_S
            elif isinstance(error, ExhaustedError):
                member.ejected_until = now + (error.retry_after_s or 0.0)
            elif _cannot_be_had(error):
                member.failures += 1
                out_s = min(MOST_OUT_S, FIRST_OUT_S * 2 ** min(member.failures - 1, 8))
                member.ejected_until = now + self._draw(out_s / 2, out_s)
                member.needs_probe = True
                self._resolve_at = min(self._resolve_at, now + SOON_S)

    def is_ejected(self, member: ServerState[EngineT]) -> bool:
        """Return whether a server is ejected now."""
        return member.ejected_until > self._clock()

    def has_healthy_other(self, member: ServerState[EngineT]) -> bool:
        """Return whether another server is not ejected."""
        with self._lock:
            now = self._clock()
            return any(
                other.ejected_until <= now and not other.gone
                for other in self._members
                if other is not member
            )

    def devices(self, unusable: Collection[str] = ()) -> list[int]:
        """Return the number of devices of each server that is not ejected.

        Args:
            unusable: Addresses of servers to leave out.
        """
        with self._lock:
            now = self._clock()
            return [
                member.devices
                for member in self._members
                if not member.gone
                and member.ejected_until <= now
                and member.address not in unusable
            ]

    def replace(self, addresses: Sequence[str]) -> None:
        """Use other servers from now on. Those that are gone finish their jobs."""
        with self._lock:
            self._names = ()
            self._unresolved.clear()
            there = {member.address: member for member in self._members}
            for address in addresses:
                if address in there:
                    there[address].gone = False
                else:
                    engine = self._make(address, None)
                    new = ServerState(address, engine, needs_probe=True)
                    self._members.append(new)
            for member in self._members:
                member.gone = member.address not in addresses

    def renew(self) -> None:
        """Reset the lock and the jobs in the child of a fork."""
        self._lock = threading.Lock()
        for member in self._members:
            member.running, member.asking = 0, False


class Lease(Generic[EngineT]):
    """The use of a server for one attempt of a call.

    As a context manager, it ends with the attempt.

    Args:
        engine: Makes the calls to the server.
        servers: All servers; None if there is only one.
        member: The server.
        attempts: The attempts of the call.

    Attributes:
        engine: Makes the calls to the server.
    """

    def __init__(
        self,
        engine: EngineT,
        servers: LoadBalancer[EngineT] | None = None,
        member: ServerState[EngineT] | None = None,
        attempts: Attempts | None = None,
    ) -> None:
        self.engine = engine
        self._servers = servers
        self._member = member
        self._attempts = attempts

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.ended(error)

    def stay(self) -> Stay:
        """Return a reference to the server, by which it outlasts the attempt."""
        stay = Stay()
        if self._member is not None:
            self._member.stays.add(stay)
        return stay

    def ended(self, error: BaseException | None = None) -> None:
        """Record the end of the attempt; None: success. Further calls do nothing."""
        servers, member, self._member = self._servers, self._member, None
        if servers is None or member is None:
            return
        if error is None:
            servers.mark_healthy(member)
        elif isinstance(error, GradwireError):
            servers.record_failure(member, error)
            if self._attempts is not None:
                self._attempts.avoid.add(member.address)
                self._attempts.retry_on_other_server = servers.has_healthy_other(member)
        servers.release(member)


def require_jobs(info: ServerInfo, address: str) -> ServerInfo:
    """Check that a server accepts jobs.

    Raises:
        DrainingError: The server is about to stop.
    """
    if info.draining:
        raise DrainingError(
            f"the server at {address} is about to stop and accepts no new jobs",
            status=StatusCode.UNAVAILABLE,
        )
    return info


def overtaken_error(address: str) -> GradwireError:
    """Return the error of a server that another one has overtaken by far.

    It may have stopped: it is probed before its next job.
    """
    return OvertakenError(
        f"the server at {address} took so long that another one was done before",
        status=StatusCode.UNAVAILABLE,
    )


def none_left(
    causes: Mapping[str, GradwireError], unusable: Collection[str] = ()
) -> GradwireError:
    """Return the error of a call if no server is available, with the causes.

    Args:
        causes: Why servers are not available, by address.
        unusable: Addresses of servers that the call must not use.
    """
    if not causes and unusable:
        which = ", ".join(sorted(unusable))
        return ConnectError(f"no server can take the job: it must not run at {which}")
    if not causes:
        return ConnectError("the names of the servers have no address")
    each = "; ".join(f"{address}: {error}" for address, error in causes.items())
    passing = any(is_transient(error) for error in causes.values())
    which = "the server is not"
    if len(causes) > 1:
        which = f"none of the {len(causes)} servers is"
    return ConnectError(
        f"{which} available: {each}",
        status=StatusCode.UNAVAILABLE if passing else None,
    )


def _cannot_be_had(error: GradwireError) -> bool:
    return isinstance(error, ConnectError | UnavailableError)
