"""Everything that the engines of both clients have in common, without I/O."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Self, TypeVar

from grpc import StatusCode

from gradwire._api.errors import (
    ClientStateError,
    ContractError,
    GradwireError,
    InputError,
    TlsError,
)
from gradwire._api.options import (
    Options,
    parse_block_rows,
    parse_timeout,
    parse_transport,
)
from gradwire._api.types import ServerInfo
from gradwire._api.verify import parse_verify
from gradwire._client.job_factory import JobFactory
from gradwire._client.options import ClientOptions
from gradwire._resilience.array_job import ArrayJob
from gradwire._resilience.call_span import CallSpan, session_span
from gradwire._resilience.retry import Attempts, Retries, parse_retries
from gradwire._transport.address import parse_addresses
from gradwire._transport.direct.policy import DirectPolicy
from gradwire._transport.endpoint import Endpoint, Endpoints
from gradwire._transport.shm.policy import ShmPolicy
from gradwire_protocol import limits

EngineT = TypeVar("EngineT")

_CONNECT_TIMEOUT_S = 10.0

_WAIT_STEPS_S = (0.05, 0.1, 0.2, 0.5, 1.0)
"""Seconds between attempts to reach a server that is not ready; the last repeats."""


class EngineBase:
    """The server or servers of a client, and its calls to them.

    Args:
        address: As for `connect`.
        options: As for `connect`.

    Raises:
        InputError: An argument is invalid.

    Attributes:
        address: The address as given, or all addresses.
        jobs: Makes the jobs.
        closed: Whether no more calls can be made.
        connect_timeout_s: Seconds that the server has to answer at first.
        wait_for_ready_s: Seconds to wait for a server that does not listen yet.
        info: The server's last answer about itself; None: it was not asked.
    """

    client_name: ClassVar[str]
    """Name of the client's class, for errors."""

    def __init__(self, address: str | Sequence[str], options: ClientOptions) -> None:
        self._options = options
        self._addresses = parse_addresses(address)
        self.address = self._addresses.text
        tls, token = options.get("tls"), options.get("token")
        # If there are several servers, each has an engine of its own.
        self._endpoint = Endpoint(self._addresses.first, tls, token)
        self._endpoints = None
        if self._addresses.several:
            self._endpoints = Endpoints(self._addresses, tls, token)
        self.retries = Retries(parse_retries(options.get("retries", True)))
        self.jobs = JobFactory(
            self.retries.policy,
            parse_verify(options.get("verify")),
            parse_timeout(options.get("timeout_s"), "timeout_s"),
            options.get("metadata", ()),
            (self._endpoints or self._endpoint).require_private,
            block_rows=parse_block_rows(options.get("block_rows")),
        )
        self.connect_timeout_s = parse_timeout(
            options.get("connect_timeout_s", _CONNECT_TIMEOUT_S), "connect_timeout_s"
        )
        self.wait_for_ready_s = parse_timeout(
            options.get("wait_for_ready_s"), "wait_for_ready_s"
        )
        self.closed = False
        self.info: ServerInfo | None = None
        transport = parse_transport(options.get("transport", "auto"))
        self.shm = ShmPolicy(transport, self.address)
        self.direct = DirectPolicy(transport, self._endpoint)
        if self._addresses.several:
            if transport == "shm":
                raise InputError(
                    'transport is "shm", which works with one server only: expected one'
                    " address"
                )
            self.without_shm()

    def without_shm(self) -> Self:
        """Use no shared memory, because there are several servers."""
        self.shm.disable()
        return self

    def require_open(self) -> None:
        """Check that the client is open.

        Raises:
            ClientStateError: The client was closed.
        """
        if self.closed:
            raise ClientStateError(
                f"this {self.client_name} of {self.address} is closed: create a new one"
            )

    def waits_for_ready(self) -> Callable[[GradwireError], float | None]:
        """Begin to wait for a server to be ready.

        Returns:
            A function of the error of an attempt to connect: seconds until the next
            attempt, or None if waiting is of no use.
        """
        deadline = time.monotonic() + (self.wait_for_ready_s or 0)
        steps = itertools.chain(_WAIT_STEPS_S, itertools.repeat(_WAIT_STEPS_S[-1]))

        def delay_s(error: GradwireError) -> float | None:
            left = deadline - time.monotonic()
            if left <= 0 or not may_become_ready(error):
                return None
            return min(next(steps), left)

        return delay_s

    def attempts(self, options: Options, span: CallSpan | None = None) -> Attempts:
        """Return the attempts of a job that begins now."""
        return Attempts(self.retries, options.timeout_s, options.job_id, span)

    def session_attempts(
        self, name: str, timeout_s: float | None, session: str = "", affinity: str = ""
    ) -> Attempts:
        """Return the attempts of a call of the sessions that begins now.

        Args:
            name: The method.
            timeout_s: Seconds for all of them; None: no limit.
            session: The session's id; empty: none.
            affinity: What a proxy recognizes the session's calls by.
        """
        span = session_span(name, self.jobs.metadata, session)
        attempts = Attempts(self.retries, timeout_s, span=span)
        attempts.affinity = affinity
        return attempts

    def _learn_features(self, engines: Sequence[EngineBase]) -> None:
        """Use the common features and limits of all servers that have answered."""
        offered = [each.jobs.features for each in engines if each.jobs.features]
        if offered:
            self.jobs.features = frozenset.intersection(*offered)
            self.jobs.limits = tuple(
                limits for each in engines for limits in each.jobs.limits
            )

    def _learn(self, info: ServerInfo) -> ServerInfo:
        """Use a server's answer about itself.

        Raises:
            ContractError: The server has another version of the contract.
            CannotShareError: ``transport="shm"``, and the server shares no memory.
            NoDirectConnectionError: ``transport="direct"``, and the server has none.
        """
        if info.contract != limits.CONTRACT:
            raise ContractError(
                f"the server at {self.address} (gradwire {info.version}) has contract"
                f" {info.contract or '(none)'}, but this client has"
                f" {limits.CONTRACT}: update one of them"
            )
        self.info = info
        self.shm.learn(info)
        self.direct.learn(info)
        self.jobs.features = frozenset(info.features)
        self.jobs.limits = (info.limits,)
        return info

    def _should_use_shm(self, job: ArrayJob) -> bool:
        """Return whether to send a job through shared memory."""
        plan = job.plan
        if self.jobs.tuning.unary or plan.options.checksum or plan.segment_rows:
            return False
        return self.shm.should_use(job.plan, job.operands, unary=job.unary)


def may_become_ready(error: GradwireError) -> bool:
    """Whether a server may answer later at an address where connecting failed."""
    if isinstance(error, TlsError | ContractError):
        return False
    return error.status in {StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED}


def member_options(
    options: ClientOptions, endpoints: Endpoints, name: str | None
) -> ClientOptions:
    """Return the options of the engine of one of several servers.

    Args:
        options: The options of the client.
        endpoints: All servers.
        name: The DNS name that has the server's address, if it was given by name.
    """
    own: ClientOptions = {"tls": endpoints.tls_of(name)}
    for key in ("metadata", "token", "retries", "transport"):
        if key in options:
            own[key] = options[key]
    return own


def look_up_address(address: str, known: Mapping[str, EngineT]) -> EngineT:
    """Return the engine of one of a client's servers.

    Raises:
        InputError: The client has no server with that address.
    """
    if address not in known:
        raise InputError(
            f"address is {address!r}: expected one of the client's servers,"
            f" {', '.join(known)}"
        )
    return known[address]
