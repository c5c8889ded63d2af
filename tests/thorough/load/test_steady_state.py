"""A loop that computes the same sizes again and again touches no new memory."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import psutil
import pytest

import gradwire
from tests.support.serving import running_server

SIDE = 1024
WARM_UP, CALLS = 4, 8
PAGES_MOVED = 2 * 3 * 4 * SIDE * SIDE // resource.getpagesize()
"""Of operands and of results, of one call."""


def server_faults(pid: int) -> int:
    """Pages that a process has touched for the first time (minflt of proc(5))."""
    stat = Path(f"/proc/{pid}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[7])


@pytest.mark.skipif(not psutil.LINUX, reason="glibc's allocator, and /proc")
@pytest.mark.parametrize("reused", [False, True], ids=["fresh", "out"])
def test_a_loop_touches_no_fresh_pages(reused: bool) -> None:
    """Less than one in ten of the pages that it moves, on either side.

    Every copy in fresh memory would be as many as it moves, or half of them.
    """
    rng = np.random.default_rng(0)
    x, w, dy = (rng.standard_normal((SIDE, SIDE), dtype=np.float32) for _ in range(3))
    out = tuple(np.ones((SIDE, SIDE), np.float32) for _ in range(3)) if reused else None
    with (
        running_server(keep_memory=True) as server,
        gradwire.connect(server.address) as client,
    ):
        for _ in range(WARM_UP):
            client.gradients(x, w, dy, out=out)
        here = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        there = server_faults(server.pid)
        for _ in range(CALLS):
            client.gradients(x, w, dy, out=out)
        here = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - here
        there = server_faults(server.pid) - there
    assert here / CALLS < PAGES_MOVED / 10
    assert there / CALLS < PAGES_MOVED / 10
