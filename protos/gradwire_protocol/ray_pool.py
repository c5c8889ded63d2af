"""What the SDK and the pool of servers in a Ray cluster tell each other."""

from __future__ import annotations

import enum
from dataclasses import dataclass

NAMESPACE = "gradwire"
"""Ray namespace of the pool and its servers."""

POOL = "pool"
"""Name of the pool's actor in that namespace."""


class State(enum.StrEnum):
    """What a server of the pool does."""

    STARTING = "starting"
    SERVING = "serving"
    SILENT = "silent"
    """It serves no longer, or the pool has had no answer for some seconds."""
    DRAINING = "draining"
    """It accepts no new jobs, and stops once the running ones have ended."""


@dataclass(frozen=True, slots=True)
class PoolServer:
    """A server of the pool, as the pool knows it."""

    node_id: str
    """Ray's id of its node, in hexadecimal digits."""

    host: str
    """The node's IP address."""

    state: State

    address: str = ""
    """``HOST:PORT`` for clients; empty before it serves."""

    local_address: str = ""
    """``HOST:PORT`` for clients on its node: a loopback address."""

    server_instance: str = ""
    """The server process: a new random name at each start."""

    backend: str = ""
    """Its backend, with the reason for it."""

    running_jobs: int = 0
    """Jobs that run on it."""

    queued_jobs: int = 0
    """Jobs that wait there for their turn."""


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """The state of the pool."""

    servers: tuple[PoolServer, ...]

    wanted: int
    """Servers that there should be, on as many nodes."""

    stopping: bool
    """Whether the pool stops its servers and then itself."""

    failures: tuple[tuple[str, str], ...]
    """Nodes without a server, by IP address, and why the last one failed there."""
