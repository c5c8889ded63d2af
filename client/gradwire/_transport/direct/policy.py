"""The decision whether a job uses direct connections."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

from grpc import StatusCode

from gradwire._api.errors import ConnectionLostError, InputError
from gradwire._api.types import ServerInfo
from gradwire._core.job_plan import Plan
from gradwire._transport.address import proxy_of
from gradwire._transport.direct.connections import (
    CannotOpenError,
    ConnectionPool,
    DirectConnection,
    NoDirectConnectionError,
    open_connections,
)
from gradwire._transport.endpoint import Endpoint
from gradwire_protocol.limits import DIRECT, MIB
from gradwire_protocol.v1.job_pb2 import DirectAccess

_log = logging.getLogger("gradwire")

OPEN_S = 1.0
"""Seconds for opening the connections of a call. Where a firewall drops packets, a job
waits for that long."""

RETRY_S = 60.0
"""Seconds without another attempt after connections could not be opened, or broke
several times."""

_MOST_BREAKS = 2
"""How often connections break within `RETRY_S` until messages are used. Once may be a
restart of the server."""

_MIN_BYTES = 4 * MIB
"""With ``transport="auto"``, least bytes of operands, or of results, of a job with
direct connections, and of a tensor. Smaller ones gain nothing over messages."""

_CONNECTIONS = 2
"""Connections of a job. While the elements of a row block wait on one connection, those
of the next move on the other."""

_ROW_BLOCK_BYTES = 16 * MIB
"""Bytes of a row block as far as the client knows: the server's default on a CPU. If
the server's blocks are larger, it asks for fewer connections."""

_MAX_BLOCK_ROWS = 8192
"""Most rows of a row block of the server."""


class DirectPolicy:
    """The direct connections of one server, and the choice of jobs for them.

    All methods may be called from any thread.

    Args:
        transport: "auto", "grpc", "direct" or "shm".
        endpoint: The server.

    Raises:
        InputError: ``transport="direct"``, and the address has no host.

    Attributes:
        demanded: Whether jobs must use direct connections.
    """

    def __init__(self, transport: str, endpoint: Endpoint) -> None:
        self.demanded = transport == "direct"
        if self.demanded and endpoint.host is None:
            raise InputError(
                'transport is "direct", which works over TCP only, but the address is'
                f" {endpoint}: expected HOST:PORT"
            )
        self._endpoint = endpoint
        self._allowed = self.demanded or (
            transport == "auto"
            and endpoint.host is not None
            # Where calls go through a proxy, the server is hardly within reach.
            and not proxy_of(endpoint.address)
        )
        self._offered = self.demanded
        self._pool = ConnectionPool()
        self._lock = threading.Lock()
        self._quiet_until = 0.0
        self._logged = self._opened = False
        self._breaks: list[float] = []

    def learn(self, info: ServerInfo) -> None:
        """Use the server's answer about itself.

        Raises:
            NoDirectConnectionError: ``transport="direct"``, and the server has none.
        """
        offered = DIRECT in info.features
        if self.demanded and not offered:
            raise NoDirectConnectionError(
                f"the server at {self._endpoint} has no direct connections: set its"
                ' data-listen to a port, or use transport="auto"'
            )
        self._offered = offered

    def connections(self, plan: Plan, *, several: bool) -> int:
        """Return the number of connections to offer for a job; 0: none.

        Args:
            plan: The job.
            several: Whether the job can use more than one.
        """
        if not self.demanded and not self._suits(plan):
            return 0
        return _CONNECTIONS if several and _has_several_blocks(plan) else 1

    def suits_tensor(self, size_bytes: int) -> bool:
        """Return whether to offer a connection for a session's tensor.

        Args:
            size_bytes: Its size.
        """
        return self.demanded or self._suits_bytes(size_bytes)

    def open(
        self, access: DirectAccess, server_instance: str, deadline: float | None
    ) -> list[DirectConnection] | None:
        """Open the connections of a call, within `OPEN_S` seconds.

        Args:
            access: The server's answer to the offer.
            server_instance: The server process that has answered.
            deadline: When the call is too late; `time.monotonic`. None: never.

        Returns:
            The connections; None: the elements travel in the call's messages.

        Raises:
            NoDirectConnectionError: They cannot be opened, with
                ``transport="direct"``.
            TimeoutError: They were not open by the deadline.
        """
        if not self.demanded and not self._usable():
            return None
        until = time.monotonic() + OPEN_S
        has_time = deadline is None or deadline >= until
        if deadline is not None:
            until = min(until, deadline)
        try:
            opened = open_connections(
                self._endpoint, access, self._pool, server_instance, until
            )
        except CannotOpenError as error:
            if not has_time and time.monotonic() >= until:
                raise TimeoutError from error
            if self.demanded:
                raise NoDirectConnectionError(
                    f"the server at {self._endpoint} cannot be reached on direct"
                    f" connections: {error} (make the port of its data-listen"
                    ' reachable, or use transport="auto")',
                    # Where they could be opened before, the server may have died.
                    status=StatusCode.UNAVAILABLE if self._opened else None,
                ) from error
            if has_time:
                self._pause(f"cannot be opened: {error}")
            return None
        if not self._pool.track(opened):
            for each in opened:
                each.close()
            return None
        self._logged, self._opened = False, True
        return opened

    def reuse(
        self, server_instance: str, connections: Sequence[DirectConnection]
    ) -> None:
        """Keep the connections of a call that ended well, with nothing left to receive.

        Args:
            server_instance: The server process at their other end.
            connections: The connections.
        """
        self._pool.put(server_instance, connections)

    def failed(self, error: BaseException) -> None:
        """Record that a connection broke while a job used it.

        Args:
            error: Why the job failed. A server that ends a job for another cause
                closes its connections as well.
        """
        if not isinstance(error, ConnectionLostError):
            return
        now = time.monotonic()
        with self._lock:
            self._breaks = [each for each in self._breaks if each > now - RETRY_S] + [
                now
            ]
            if len(self._breaks) < _MOST_BREAKS:
                return
            self._breaks.clear()
        self._pause(f"broke {_MOST_BREAKS} times within {RETRY_S:g} s")

    def after_fork(self) -> None:
        """Reset the state in the child of a fork."""
        self._lock = threading.Lock()
        self._pool.after_fork()

    def close(self) -> None:
        """Close the free connections."""
        self._pool.close()

    def _suits(self, plan: Plan) -> bool:
        return plan.m is not None and self._suits_bytes(
            max(plan.upload_bytes(plan.m), plan.download_bytes(plan.m))
        )

    def _suits_bytes(self, moved: int) -> bool:
        return moved >= _MIN_BYTES and self._offered and self._usable()

    def _usable(self) -> bool:
        return self._allowed and time.monotonic() >= self._quiet_until

    def _pause(self, what: str) -> None:
        """Use messages for a while, and log it once."""
        with self._lock:
            self._quiet_until = time.monotonic() + RETRY_S
            logged, self._logged = self._logged, True
        if not logged:
            _log.warning(
                "direct connections to the server at %s %s. Elements travel over gRPC,"
                " and the next attempt is in %g s",
                *(self._endpoint, what, RETRY_S),
            )


def _has_several_blocks(plan: Plan) -> bool:
    """Return whether a job has several row blocks, as far as the client knows."""
    if plan.m is None:
        return True
    row_bytes = max(1, (plan.n + plan.k) * plan.dtype.itemsize)
    rows = min(_MAX_BLOCK_ROWS, _ROW_BLOCK_BYTES // row_bytes)
    return plan.m > min(rows, plan.block_rows or rows)
