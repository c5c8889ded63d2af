"""Spread jobs as they are, beside the model: ``python -m bench.scale --check``.

Client and servers share this host, so devices sleep. What a byte and a job cost both
ends is measured on one server. Jobs over 1, 2 and 3 servers are then predicted.
"""

from __future__ import annotations

import os
import resource
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import gradwire
from bench.contenders import gradwire_server
from bench.contenders.server_process import ServerProcess
from bench.scale.figures import Costs, Device, Host
from bench.scale.model import simulate
from bench.scale.setting import Plan, Setting
from bench.scale.workload import Workload
from bench.work import Shape
from gradwire_protocol.limits import MIB

SERVERS = (1, 2, 3)
TOLERANCE = 0.15
"""How far predictions may be off."""
QUIET = 0.15
"""Other programs may use so many cores during a run; what they disturb is repeated."""


@dataclass(frozen=True)
class Check:
    """A job, and how long a row block takes."""

    label: str
    work: Workload
    block_s: float


CHECKS = (
    Check("devices", Workload(Shape(32768, 1008, 16), 4 * MIB), 0.08),
    Check("segments of two blocks", Workload(Shape(65536, 256, 256), 4 * MIB), 0.06),
)


@dataclass(frozen=True)
class Seen:
    """A check's medians, in seconds, for `servers`."""

    check: Check
    servers: int
    seconds: float
    predicted_s: float
    others: float
    """Cores that other programs used, on average over the runs."""

    @property
    def ratio(self) -> float:
        """Predicted over seen."""
        return self.predicted_s / self.seconds


@dataclass(frozen=True)
class Measured:
    """What was measured on one server."""

    client: Host
    server: Host
    costs: Costs


class Operands:
    """A check's operands, and arrays for the results."""

    def __init__(self, shape: Shape) -> None:
        m, n, k = shape.m, shape.n, shape.k
        self.x, self.dy = np.ones((m, n), np.float32), np.ones((m, k), np.float32)
        self.w = np.ones((n, k), np.float32)
        self.y, self.dx = np.ones_like(self.dy), np.ones_like(self.x)
        self.dw = np.ones_like(self.w)

    def compute(self, client: gradwire.Client, *, spread: bool = True) -> None:
        """Compute the job, as segments or whole."""
        out = (self.y, self.dx, self.dw)
        client.gradients(self.x, self.w, self.dy, out=out, spread=spread)


def measure(
    checks: Sequence[Check] = CHECKS, rounds: int = 3, patience: int = 5
) -> Iterator[Seen]:
    """Calibrate, then run the checks, each number of servers in turn.

    Args:
        checks: The jobs.
        rounds: Undisturbed runs of each.
        patience: At most so many times as many runs; the least disturbed ones count.
    """
    found = calibrate()
    for check in checks:
        operands = Operands(check.work.shape)
        with _servers(max(SERVERS), check) as servers, ExitStack() as stack:
            addresses = [server.address for server in servers]
            clients = {
                count: stack.enter_context(gradwire.connect(addresses[:count]))
                for count in SERVERS
            }
            runs: dict[int, list[tuple[float, float]]] = {n: [] for n in SERVERS}
            for number in range(rounds * patience + 1):
                for count in SERVERS:
                    with _others(servers) as others:
                        began = time.perf_counter()
                        operands.compute(clients[count])
                        took = time.perf_counter() - began
                    if number:  # first, memory is touched
                        runs[count].append((others[0], took))
                if all(
                    sum(other < QUIET for other, _ in each) >= rounds
                    for each in runs.values()
                ):
                    break
        for count in SERVERS:
            best = sorted(runs[count])[:rounds]
            setting = Setting(
                count,
                Device("sleeps", block_s=check.block_s, slots=3),
                client=found.client,
                server=found.server,
                costs=found.costs,
                one_host=True,
            )
            yield Seen(
                check,
                count,
                statistics.median(took for _, took in best),
                simulate(check.work, setting).seconds,
                statistics.mean(other for other, _ in best),
            )


def calibrate(rounds: int = 20) -> Measured:
    """Measure what a byte and a job cost both ends, and how fast sums are added."""
    # Both have one row block; what the larger costs more is its bytes.
    small, large = Shape(2048, 1008, 16), Shape(8192, 1008, 16)
    check = Check("costs", Workload(large, 64 * MIB), 0.0)
    used, took = [], []
    with _servers(1, check) as [server], gradwire.connect(server.address) as client:
        for shape in (small, large):
            operands = Operands(shape)
            for _ in range(3):
                operands.compute(client, spread=False)
            before, there = _used(), server.used().cpu_s
            for _ in range(rounds):
                began = time.perf_counter()
                operands.compute(client, spread=False)
                took.append(time.perf_counter() - began)
            own = [now - then for now, then in zip(_used(), before, strict=True)]
            costs = (sum(own), own[0], server.used().cpu_s - there)
            used.append([cost / rounds for cost in costs])
    gb = [Workload(shape).gigabytes for shape in (small, large)]
    a_gb = [(b - a) / (gb[1] - gb[0]) for a, b in zip(*used, strict=True)]
    a_job = [max(a - s * gb[0], 0.0) for a, s in zip(used[0], a_gb, strict=True)]
    ours, python, theirs = range(3)

    def host(end: int) -> Host:
        cores, locked = os.cpu_count() or 1, min(a_job[python], a_job[end])
        return Host(cores, a_gb[end], a_gb[end], a_gb[python], a_job[end], locked)

    setting = Setting(
        1,
        Device("sleeps"),
        client=host(ours),
        server=host(theirs),
        costs=Costs(job_s=0.0, add_bytes_per_s=_add_bytes_per_s()),
        plan=Plan(jobs_a_server=1),
        one_host=True,
    )
    # What a job takes beside its processor time: waiting for threads to be woken.
    busy_s = simulate(Workload(small, 64 * MIB), setting).seconds
    job_s = max(statistics.median(took[:rounds]) - busy_s, 0.0)
    costs = replace(setting.costs, job_s=job_s)
    return Measured(setting.client, setting.server, costs)


@contextmanager
def _servers(count: int, check: Check) -> Iterator[list[ServerProcess]]:
    with ExitStack() as stack:
        kind = f"idle:{check.block_s * 1e3:g}"
        flags = ("--row-block-bytes", str(check.work.row_block_bytes))
        running = []
        for _ in range(count):
            running.append(gradwire_server.start(kind, *flags))
            stack.callback(running[-1].stop)
        yield running


@contextmanager
def _others(servers: Sequence[ServerProcess]) -> Iterator[list[float]]:
    """Cores that other programs use in this context."""
    found: list[float] = []
    before, began = _others_s(servers), time.perf_counter()
    yield found
    took = time.perf_counter() - began
    found.append((_others_s(servers) - before) / took)


def _others_s(servers: Sequence[ServerProcess]) -> float:
    """Processor seconds of all other programs since the host started."""
    first = Path("/proc/stat").read_text().partition("\n")[0]
    user, nice, system, _idle, _iowait, irq, soft, steal, *_ = map(
        int, first.split()[1:]
    )
    all_s = (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")
    return all_s - sum(_used()) - sum(server.used().cpu_s for server in servers)


def _used() -> tuple[float, float]:
    """Processor seconds of this process outside the kernel, and in it."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime, used.ru_stime


def _add_bytes_per_s() -> float:
    """How fast a sum that has just arrived is added, median of some."""
    total = np.zeros(1 << 20)
    arrived = [np.ones(1 << 20) for _ in range(9)]  # more than caches hold
    took = []
    for each in arrived * 2:
        began = time.perf_counter()
        total += each
        took.append(time.perf_counter() - began)
    return total.nbytes / statistics.median(took)
