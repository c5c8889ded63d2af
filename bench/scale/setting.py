"""Who takes part in a spread job, and how it is spread."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bench.scale.figures import CLIENT, COSTS, SERVER, Costs, Device, Host
from bench.scale.workload import Workload
from gradwire._core.segments import AHEAD_BYTES, HELD_BYTES, MOST_AHEAD


@dataclass(frozen=True)
class Plan:
    """How a job is spread."""

    jobs_a_server: int = 2
    """At the same time."""
    sums_ahead: int = 2
    """Segments a server that have begun and whose sums are not yet added, times those
    of a job."""
    segments_a_job: int | None = None
    """None: each server has one job, which takes segments one by one, as in the SDK; 0:
    as many as give each server its jobs once."""
    uploads: int | None = None
    """At most so many jobs send rows at the same time; None: all do."""
    w: str = "job"
    """The client sends W with every "job", once to every "server", or once, and the
    servers pass it on in a binary "tree"."""
    sums: str = "client"
    """The "client" adds all of them. Or the servers do: in segment order, the sum so
    far passing along the "chain" of segments; or pairwise, in a "tree" over them."""
    rows: str = "client"
    """Where X and dY are, and Y and dX wanted: at the "client" or on the "servers"."""

    @property
    def jobs(self) -> int:
        """Jobs at the same time on a server: one, if it takes segments one by one."""
        return 1 if self.segments_a_job is None else self.jobs_a_server

    def runs_of(self, work: Workload, servers: int) -> list[range]:
        """Segments that travel in each job, where that is decided before."""
        jobs = self.jobs_a_server * servers
        a_job = self.segments_a_job or -(-work.segments // jobs)
        every = range(work.segments)
        return [every[first : first + a_job] for first in every[::a_job]]

    def may_be_ahead(self, work: Workload, left: int, servers: int, idle: int) -> int:
        """Segments that a job that takes them may have begun and not completed.

        Args:
            work: The job that is spread.
            left: Segments that no job has begun.
            servers: Number of servers.
            idle: How many of them have no segment.
        """
        if left <= idle:
            return 1
        rows_bytes = work.block_rows * work.segment_blocks * work.row_bytes
        most = min(AHEAD_BYTES // max(1, rows_bytes), MOST_AHEAD, left // servers)
        return max(2, most)

    def held(self, work: Workload, servers: int) -> int:
        """Segments that may have begun whose sums are not added."""
        most = self.sums_ahead * servers
        if self.segments_a_job is not None:
            return most * len(self.runs_of(work, servers)[0])
        return max(most, HELD_BYTES // max(1, work.sum_bytes))


PLAN = Plan()
"""What the SDK does."""


@dataclass(frozen=True)
class Setting:
    """Who takes part."""

    servers: int
    device: Device
    client_gbits: float = math.inf
    server_gbits: float = math.inf
    client: Host = CLIENT
    server: Host = SERVER
    costs: Costs = COSTS
    plan: Plan = PLAN
    one_host: bool = False
    """Whether all of them share the client's cores, as on loopback."""
