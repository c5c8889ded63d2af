"""What load tests watch: memory, health, and other processes."""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.support.serving import BACKEND, ServerProcess

MIB = 1 << 20
CUDA_BYTES = 0 if BACKEND == "numpy" else 1024 * MIB
"""What CUDA's libraries and its context may have in a process beside the jobs."""

HEALTH_MEDIAN_S = 0.25
HEALTH_WORST_S = 5.0
"""Far more than a server needs, as tests share their cores; a server that does
one client's work on its event loop takes longer."""

ROOT = Path(__file__).parents[2]


def memory_of(pid: int, line: str) -> int:
    """`VmRSS` or `VmHWM` of a process, bytes."""
    for each in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = each.partition(":")
        if name == line:
            return int(value.split()[0]) * 1024
    raise LookupError(line)


def resident(server: ServerProcess) -> int:
    """Resident set of a server now, bytes."""
    return memory_of(server.pid, "VmRSS")


def peak(server: ServerProcess) -> int:
    """Highest resident set of a server since `forget_peak`, bytes."""
    return memory_of(server.pid, "VmHWM")


def forget_peak(server: ServerProcess) -> None:
    """Begins to measure the peak afresh: see clear_refs in proc(5)."""
    forget_peak_of(server.pid)


def forget_peak_of(pid: int) -> None:
    """The same of any process."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def memory_apart(pid: int) -> int:
    """Resident set of a process without what it shares, bytes.

    Pages of regions count in the resident set of both sides that touched
    them, and are the one memory of the job's matrices.
    """
    return memory_of(pid, "VmRSS") - memory_of(pid, "RssShmem")


def peak_apart(pid: int) -> int:
    """The highest of that since `forget_peak`, or a little more, bytes.

    While a region lasts, so do its pages: then no more of them were there when
    the resident set was highest than are now.
    """
    return memory_of(pid, "VmHWM") - memory_of(pid, "RssShmem")


def descriptors(pid: int) -> int:
    """How many file descriptors a process has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {what}")
        time.sleep(0.02)


@contextlib.contextmanager
def module(name: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A module of this package as a process, once it has printed its first line."""
    process = subprocess.Popen(
        [sys.executable, "-m", f"tests.thorough.load.{name}", *arguments],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline(), f"{name} did not begin"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


@contextlib.contextmanager
def misbehaving_clients(
    server: ServerProcess, kind: str, count: int
) -> Iterator[subprocess.Popen[str]]:
    """So many bad clients of a kind: see `misbehaving_clients.KINDS`."""
    with module("misbehaving_clients", kind, server.address, str(count)) as process:
        yield process


@contextlib.contextmanager
def probing(server: ServerProcess) -> Iterator[None]:
    """Health is asked for meanwhile; on leaving, it always answered in time."""
    with module("probe", server.address) as process:
        yield
        output, _ = process.communicate(timeout=30)
    latencies = json.loads(output)
    assert len(latencies) >= 20
    assert statistics.median(latencies) < HEALTH_MEDIAN_S
    assert max(latencies) < HEALTH_WORST_S
