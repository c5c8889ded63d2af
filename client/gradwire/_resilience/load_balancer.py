"""Several servers behind one client: which of them the next job goes to.

A job goes to the server that has the fewest of this client's jobs, and among
equals to the one that has waited longest for one. (Of a handful of servers,
all are looked at; two at random are for those who cannot.) One that cannot be
had is left out for a while, which doubles each time, and is asked what it is
before the next job goes there.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, Self, TypeVar

from grpc import StatusCode

from gradwire._api.errors import (
    ConnectError,
    DrainingError,
    ExhaustedError,
    GradwireError,
    VerificationError,
)
from gradwire._api.types import ServerInfo
from gradwire._resilience.retry import Attempts, is_passing

EngineT = TypeVar("EngineT")

FIRST_OUT_S = 0.5
MOST_OUT_S = 10.0
"""How long a server is left out after it failed for the first time, and at most."""

WRONG_OUT_S = 60.0
"""How long after its results were wrong."""

ASK_S = 1.0
"""How long a server that was left out has to say that it is there again."""

RESOLVED_S = 30.0
"""How long the addresses of a name are taken for current; SOON_S once a server
could not be had."""

SOON_S = 1.0


@dataclass(eq=False, slots=True)
class ServerState(Generic[EngineT]):
    """One of the servers."""

    address: str

    engine: EngineT
    """Makes the calls to this server alone."""

    name: str | None = None
    """The name that has this address, where it is one's."""

    running: int = 0
    """Jobs of this client that it has now."""

    turn: int = 0
    """When it was last chosen, counted in choices."""

    failures: int = 0
    """How often in a row it could not be had."""

    ejected_until: float = 0.0
    """Until when it is left out."""

    needs_probe: bool = False
    """Whether it must be asked before it is given a job."""

    asking: bool = False
    """Whether that is being done."""

    gone: bool = False
    """Whether its name has another address now."""


class LoadBalancer(Generic[EngineT]):
    """The servers of a client. Threads may share them.

    Args:
        make: Makes the engine of an address; the second argument is the name
            that has it, where it is one's.
        addresses: Those that are known.
        names: ``HOST:PORT`` of those whose addresses are to be looked up.
        clock: Seconds that only grow.
        draw: Gives a number between two others.
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
        """Those that there are now."""
        with self._lock:
            return [member for member in self._members if not member.gone]

    def engines(self) -> list[EngineT]:
        """The engines of all servers, including those that are gone."""
        with self._lock:
            return [member.engine for member in self._members]

    def names_due(self) -> tuple[str, ...]:
        """The names to be looked up now; whoever asks does it."""
        with self._lock:
            if not self._names or self._clock() < self._resolve_at:
                return ()
            self._resolve_at = self._clock() + RESOLVED_S
            return self._names

    def resolved(self, name: str, addresses: Sequence[str]) -> list[EngineT]:
        """Take the addresses that a name has now.

        Returns:
            The engines of servers that are gone and have no job: to be closed.
        """
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
            idle = [each for each in self._members if each.gone and not each.running]
            for member in idle:
                self._members.remove(member)
            return [member.engine for member in idle]

    def not_resolved(self, name: str, error: OSError) -> None:
        """A name has no address, or nobody says; those that it had are kept."""
        with self._lock:
            self._resolve_at = min(self._resolve_at, self._clock() + SOON_S)
            self._unresolved[name] = ConnectError(
                f"the name in {name} has no address that could be found"
                f" ({error.strerror or error})",
                status=StatusCode.UNAVAILABLE,
            )

    def unresolved(self) -> dict[str, GradwireError]:
        """The names that have no address, and why."""
        with self._lock:
            return dict(self._unresolved)

    def choose(
        self, avoid: Collection[str] = (), unusable: Collection[str] = ()
    ) -> ServerState[EngineT] | None:
        """The server for the next job, which it has from here on.

        Args:
            avoid: Addresses to take only if there are no others.
            unusable: Addresses not to take.
        """
        with self._lock:
            now = self._clock()
            there = [
                member
                for member in self._members
                if not member.gone and member.address not in unusable
            ]
            ready = [m for m in there if m.ejected_until <= now and not m.asking]
            # Where all are left out, any that answers after all will do.
            chosen = min(
                ready or there,
                key=lambda m: (m.address in avoid, m.running, m.turn),
                default=None,
            )
            if chosen is not None:
                self._turns += 1
                chosen.turn = self._turns
                chosen.running += 1
                chosen.asking = chosen.needs_probe
            return chosen

    def release(self, member: ServerState[EngineT]) -> None:
        """The job that it had is over."""
        with self._lock:
            member.running = max(0, member.running - 1)
            member.asking = False

    def mark_healthy(self, member: ServerState[EngineT]) -> None:
        """It can be had."""
        with self._lock:
            member.failures, member.ejected_until = 0, 0.0
            member.needs_probe = member.asking = False

    def record_failure(
        self, member: ServerState[EngineT], error: GradwireError
    ) -> None:
        """Take the way in which a call ended there."""
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

    def has_healthy_other(self, member: ServerState[EngineT]) -> bool:
        """Whether there are others that are not left out."""
        with self._lock:
            now = self._clock()
            return any(
                other.ejected_until <= now and not other.gone
                for other in self._members
                if other is not member
            )

    def renew(self) -> None:
        """Begin anew in the child of a fork."""
        self._lock = threading.Lock()
        for member in self._members:
            member.running, member.asking = 0, False


class Lease(Generic[EngineT]):
    """A server for one attempt of a call.

    As a context manager it ends as the attempt does.

    Args:
        engine: Makes the calls to that server alone.
        servers: All of them; None where there is one only.
        member: That server among them.
        attempts: The call's: told where it has failed.

    Attributes:
        engine: Makes the calls to that server alone.
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

    def ended(self, error: BaseException | None = None) -> None:
        """The attempt is over; None: it came to a good end. May be called again."""
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
    """Check that a server takes jobs.

    Raises:
        DrainingError: It is about to stop.
    """
    if info.draining:
        raise DrainingError(
            f"the server at {address} takes no new jobs because it is about to stop",
            status=StatusCode.UNAVAILABLE,
        )
    return info


def none_left(causes: Mapping[str, GradwireError]) -> GradwireError:
    """The error of a call for which there is no server, and why not."""
    if not causes:
        return ConnectError("the names of the servers have no address")
    each = "; ".join(f"{address}: {error}" for address, error in causes.items())
    passing = any(is_passing(error) for error in causes.values())
    return ConnectError(
        f"none of the {len(causes)} servers can be had: {each}",
        status=StatusCode.UNAVAILABLE if passing else None,
    )


def _cannot_be_had(error: GradwireError) -> bool:
    return isinstance(error, ConnectError) or error.status is StatusCode.UNAVAILABLE
