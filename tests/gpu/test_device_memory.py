"""The GPU's memory: what runs out of it fails alone, and nothing is lost."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import gradwire
from tests.gpu.conftest import BACKEND
from tests.scenarios import ways
from tests.scenarios.ways import Way
from tests.support import oracle
from tests.support.observing import resident, wait_until
from tests.support.serving import ServerProcess, running_server

MIB = 1 << 20
NAMES = ("y", "dx", "dw")
SMALL = oracle.operands(400, 60, 40)
SOAK = 10_000


def free_bytes() -> int:
    """Memory of the GPU that nobody has."""
    import cupy

    return int(cupy.cuda.runtime.memGetInfo()[0])


def assert_same(actual: Any, expected: Any) -> None:
    for name, one, other in zip(NAMES, actual, expected, strict=True):
        assert oracle.same_bits(one, other), name


def test_a_job_beyond_the_limit_is_refused_and_the_next_one_runs() -> None:
    """W alone has 144 MiB."""
    w = np.ones((6144, 6144), np.float32)
    with (
        running_server(backend=BACKEND, device_memory_limit=128 * MIB) as server,
        gradwire.connect(server.address, timeout_s=60) as client,
    ):
        expected = client.gradients(*SMALL)
        for _ in range(3):
            with pytest.raises(gradwire.ExhaustedError):
                client.forward(np.ones((1, 6144), np.float32), w)
            assert_same(client.gradients(*SMALL), expected)


@contextlib.contextmanager
def all_but(size_bytes: int) -> Iterator[None]:
    """This process takes all of the GPU's free memory but so much."""
    import cupy

    pool = cupy.cuda.MemoryPool()
    taken = []
    part = free_bytes() - size_bytes
    try:
        while part >= 2 * MIB:
            try:
                taken.append(pool.malloc(part))
            except cupy.cuda.memory.OutOfMemoryError:
                part //= 2
            part = min(part, free_bytes() - size_bytes)
        yield
    finally:
        taken.clear()
        pool.free_all_blocks()


@pytest.mark.parametrize("way", [ways.STREAM, ways.SHARED], ids=str)
def test_a_job_for_which_nothing_is_left_fails_alone(way: Way) -> None:
    """Others of this card have what the server reckons with."""
    x, w, dy = (np.ones((8192, 8192), np.float32) for _ in range(3))
    with (
        ways.serving_all(backend=BACKEND) as server,
        way.connect(server) as client,
    ):
        expected = client.gradients(*SMALL)
        with all_but(200 * MIB):
            for _ in range(2):
                with pytest.raises(gradwire.DeviceOutOfMemoryError):
                    client.gradients(x, w, dy)
                assert_same(client.gradients(*SMALL), expected)
        result = client.gradients(x, w, dy)
        for array in result:
            assert (array == 8192).all()
        assert_same(client.gradients(*SMALL), expected)


def test_a_job_that_is_left_in_the_middle_leaves_nothing(
    server: ServerProcess, client: gradwire.Client
) -> None:
    """A server goes on, and has back what the job had on the GPU."""
    rng = np.random.default_rng(0)
    n = k = 1024
    w = rng.standard_normal((n, k), np.float32)
    rows = tuple(rng.standard_normal((64, n), np.float32) for _ in range(2))
    expected = client.gradients(*SMALL)

    def leave(after: int) -> None:
        with client.stream(itertools.repeat(rows), w) as stream:
            for _ in range(after):
                next(stream)

    for after in range(5):
        leave(after)
    settled = free_bytes()
    for number in range(100):
        leave(number % 5)
        assert_same(client.gradients(*SMALL), expected)
    # W and dW of every job that was left would have been 8 MiB each time.
    wait_until(
        lambda: settled - free_bytes() <= 64 * MIB, "the GPU's memory comes back"
    )


@pytest.mark.timeout(600)
def test_ten_thousand_small_jobs_take_no_more_memory() -> None:
    """Neither on the GPU nor on the host.

    A job has 96 KiB of matrices: were those of one job in a hundred kept, or a
    kibibyte for each, what is allowed here would be exceeded.
    """
    operands = oracle.operands(64, 64, 64)
    assert sum(each.nbytes for each in operands) * 2 == 96 << 10
    with ways.serving_all(backend=BACKEND) as server, ways.STREAM.connect(server) as c:
        expected = c.gradients(*operands)

        def run(way: Way, jobs: int) -> None:
            with way.connect(server) as client:
                for _ in range(jobs):
                    assert_same(client.gradients(*operands), expected)

        def all_run(jobs: int) -> None:
            kinds = (ways.COMPUTE, ways.STREAM, ways.COPIED, ways.UNIX)
            with ThreadPoolExecutor(len(kinds)) as pool:
                for each in [pool.submit(run, w, jobs // len(kinds)) for w in kinds]:
                    each.result()

        all_run(SOAK // 10)
        free, held = free_bytes(), resident(server)
        all_run(SOAK)
        assert free - free_bytes() <= 8 * MIB
        assert resident(server) - held <= 8 * MIB
