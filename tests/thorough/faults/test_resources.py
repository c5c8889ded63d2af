"""Disks and devices that are full."""

from __future__ import annotations

import itertools
import re
import resource
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import gradwire
from tests.cli.conftest import gradwire as command
from tests.cli.conftest import sentence, serving_with
from tests.contract.test_faults import HeldBackend, fail
from tests.thorough.faults.conftest import EXTENTS, ROW_BLOCK_BYTES, Watched, connected
from tests.thorough.faults.jobs import DY, JOBS, M, W, X, bits, compute
from tests.thorough.faults.table import FAULTS

NPY_HEADER_BYTES = 128
COMPUTING = ("open_job", "take_w", "compute_block", "finish")


@pytest.fixture
def operands(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{name}.npy" for name in ("x", "w", "dy")]
    for path, array in zip(paths, (X, W, DY), strict=True):
        np.save(path, array)
    return paths


@pytest.mark.parametrize("extent", EXTENTS)
def test_a_disk_that_fills_up_leaves_no_half_results(
    watched: Watched, operands: list[Path], tmp_path: Path, extent: str
) -> None:
    """At every row of the largest result, dX, by a limit for each file."""
    out = tmp_path / "out"
    cases = range(0, NPY_HEADER_BYTES + X.nbytes, X.nbytes // M)
    for most in FAULTS["disk-full"].cases(cases, extent):
        done = command(
            *("compute", *operands, "--out", out),
            *("--address", watched.process.address),
            preexec_fn=lambda most=most: resource.setrlimit(
                resource.RLIMIT_FSIZE, (most, most)
            ),
            # Nor could the coverage of that process be written, nor what Python
            # compiles, of which it would keep the half.
            env={"COVERAGE_PROCESS_CONFIG": "", "PYTHONDONTWRITEBYTECODE": "1"},
        )
        assert done.returncode == 1, most
        assert re.search(r"npy cannot be written: File too large", sentence(done))
        assert not out.exists()
    watched.assert_clean()
    done = command("compute", *operands, "--out", out, "--quiet")
    assert done.returncode == 0
    assert sorted(path.name for path in out.iterdir()) == ["dw.npy", "dx.npy", "y.npy"]


def at_call(number: int, act: Callable[[], None]) -> Callable[[], None]:
    """What acts at its so many-th call."""
    calls = itertools.count(1)

    def step() -> None:
        if next(calls) == number:
            act()

    return step


@pytest.mark.parametrize("extent", EXTENTS)
def test_a_device_that_is_out_of_memory_computes_the_next_job(extent: str) -> None:
    backend = HeldBackend()
    with (
        serving_with(backend, row_block_bytes=ROW_BLOCK_BYTES) as address,
        connected(address, timeout_s=20) as client,
    ):
        expected, cases = {}, []
        for job in JOBS:
            backend.steps.clear()
            expected[job] = bits(compute(client, job), job)
            calls: Counter[str] = Counter()
            for step in backend.steps:
                calls[step] += 1
                if step in COMPUTING:
                    cases.append((job, step, calls[step]))
        for job, step, number in FAULTS["device-memory"].cases(cases, extent):
            backend.before[step] = at_call(number, fail(MemoryError()))
            with pytest.raises(gradwire.DeviceOutOfMemoryError):
                compute(client, job)
            backend.before.clear()
            assert bits(compute(client, job), job) == expected[job], (job, step)
