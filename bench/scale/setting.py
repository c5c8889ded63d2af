"""Who takes part in a spread job, and how it is spread."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bench.scale.figures import CLIENT, COSTS, SERVER, Costs, Device, Host
from bench.scale.workload import Workload
from gradwire._core.segments import HELD_BYTES, RUN_BYTES, run_lengths


@dataclass(frozen=True)
class Plan:
    """How a job is spread."""

    jobs_a_server: int = 2
    """At the same time."""
    sums_ahead: int = 2
    """Segments a server that have begun and whose sums are not yet added, times those
    of a job."""
    segments_a_job: int | None = None
    """None: as many as the SDK's; 0: as many as give each server its jobs once."""
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

    def jobs_with(self, runs: Sequence[int]) -> int:
        """Jobs at the same time on a server: one, if it has several segments."""
        several = self.segments_a_job is None and max(runs) > 1
        return 1 if several else self.jobs_a_server

    def runs_of(self, work: Workload, servers: int) -> tuple[int, ...]:
        """Segments that travel in each job."""
        jobs = self.jobs_a_server * servers
        if self.segments_a_job is not None:
            a_job = self.segments_a_job or -(-work.segments // jobs)
            return run_lengths(work.segments, 1, a_job)
        segment_bytes = work.block_rows * work.segment_blocks * work.row_bytes
        held = HELD_BYTES // (jobs * work.sum_bytes)
        most = max(1, min(RUN_BYTES // segment_bytes, held))
        return run_lengths(work.segments, jobs, most)


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
