"""A job on a GPU gives the same bits, whatever else the device worker does."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest

import gradwire
from tests.contract.test_segments import streamed
from tests.gpu.conftest import BACKEND, devices
from tests.scenarios import ways
from tests.scenarios.ways import Way
from tests.support import oracle
from tests.support.raw import dtype_number, normal_numbers, stream_job
from tests.support.serving import ServerProcess, running_server

NAMES = ("y", "dx", "dw")
JOBS = 1000
ZEROS_AND_ONES = [(m, n, k) for m in (0, 1, 3) for n in (0, 1, 3) for k in (0, 1, 3)]
ODD = [
    (3, 5, 7),
    (1000, 1, 1),
    (500, 1, 33),
    (500, 33, 1),
    (257, 257, 257),
    (1001, 65, 13),
    (64, 2049, 3),
]


def assert_same(actual: Any, expected: Any) -> None:
    for name, one, other in zip(NAMES, actual, expected, strict=True):
        assert oracle.same_bits(one, other), name


@pytest.mark.parametrize("tf32", [False, True], ids=["", "tf32"])
@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_run_after_run_and_after_a_restart(dtype: str, tf32: bool) -> None:
    operands = oracle.operands(900, 520, 260, dtype)
    seen = []
    for _ in range(2):
        with (
            running_server(backend=BACKEND, row_block_bytes=256 << 10) as server,
            gradwire.connect(server.address, timeout_s=60) as client,
        ):
            seen += [client.gradients(*operands, allow_tf32=tf32) for _ in range(5)]
    assert seen[0].receipt.blocks > 3
    assert seen[0].receipt.fingerprint == seen[-1].receipt.fingerprint
    for again in seen[1:]:
        assert_same(again, seen[0])


class FairQueue:
    """Rows of a job, one row block at a time, in turn with another job's."""

    def __init__(self, turn: threading.Barrier, x: Any, dy: Any, rows: int) -> None:
        self._turn, self._x, self._dy, self._rows = turn, x, dy, rows

    def __iter__(self) -> Iterator[Any]:
        for first in range(0, len(self._x), self._rows):
            self._turn.wait(60)
            part = slice(first, first + self._rows)
            yield self._x[part], self._dy[part]


@pytest.mark.timeout(600)
def test_two_jobs_on_one_device_block_by_block(server: ServerProcess) -> None:
    """The next blocks of both come at a time, and are computed in turn.

    The jobs differ in everything that a mix-up would show in.
    """
    jobs = [
        oracle.operands(512, 96, 80, "float32", seed=1),
        oracle.operands(2048, 48, 40, "bfloat16", seed=2),
    ]
    turn = threading.Barrier(len(jobs))

    def run(operands: Any) -> int:
        x, w, dy = operands
        with ways.STREAM.connect(server) as client:
            expected = client.gradients(x, w, dy)
            rows = len(x) // 8
            for _ in range(JOBS // len(jobs)):
                stream = client.stream(FairQueue(turn, x, dy, rows), w, m=len(x))
                blocks = list(stream)
                y = np.concatenate([block.y for block in blocks])
                dx = np.concatenate([block.dx for block in blocks])
                assert_same((y, dx, stream.dw), expected)
        return int(expected.receipt.blocks)

    with ThreadPoolExecutor(len(jobs)) as pool:
        running = [pool.submit(run, operands) for operands in jobs]
        try:
            cut = [job.result() for job in running]
        finally:
            turn.abort()
    assert cut == [8, 8]


def test_beside_eight_other_jobs(client: gradwire.Client) -> None:
    operands = oracle.operands(700, 96, 64)
    expected = client.gradients(*operands)
    stop = threading.Event()

    def keep_busy(number: int) -> int:
        dtype = oracle.DTYPES[number % len(oracle.DTYPES)]
        others = oracle.operands(300 + 100 * number, 64, 40 + number, dtype, number)
        alone, ran = client.gradients(*others), 0
        while not stop.is_set():
            assert_same(client.gradients(*others), alone)
            ran += 1
        return ran

    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(keep_busy, number) for number in range(8)]
        try:
            for _ in range(50):
                assert_same(client.gradients(*operands), expected)
        finally:
            stop.set()
        assert all(each.result() for each in running)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("way", ways.WAYS, ids=str)
def test_in_every_way(
    server: ServerProcess, client: gradwire.Client, way: Way, dtype: str
) -> None:
    """From pinned memory (messages) and from memory that is not (the others)."""
    operands = oracle.operands(611, 60, 40, dtype)
    expected = client.gradients(*operands)
    with way.connect(server) as other:
        given = list(operands)
        if way.inside:
            for place, operand in enumerate(operands):
                given[place] = other.empty(operand.shape, operand.dtype)
                given[place][...] = operand
        for _ in range(3):
            result = other.gradients(*given)
            way.arrived(result.receipt)
            assert_same(result, expected)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("shape", [*ZEROS_AND_ONES, *ODD], ids=str)
def test_any_shape_is_right_and_the_same_in_one_message_and_in_many(
    server: ServerProcess,
    client: gradwire.Client,
    shape: tuple[int, int, int],
    dtype: str,
) -> None:
    x, w, dy = oracle.operands(*shape, dtype)
    result = client.gradients(x, w, dy)
    oracle.assert_right(result, x, w, dy, dtype, backend=BACKEND)
    with ways.COMPUTE.connect(server) as other:
        assert_same(other.gradients(x, w, dy), result)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_one_result_or_all_of_them(client: gradwire.Client, dtype: str) -> None:
    operands = oracle.operands(611, 60, 40, dtype)
    expected = client.gradients(*operands)
    for name in NAMES:
        alone = client.gradients(*operands, results=name)
        assert oracle.same_bits(getattr(alone, name), getattr(expected, name))


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_the_sums_of_row_blocks_added_here(server: ServerProcess, dtype: str) -> None:
    """cuBLAS adds to a sum what the client adds to it here: with the same rounding."""
    rows = 1024
    problem = replace(normal_numbers(9 * rows // 2, 520, 260, dtype), results=("dw",))
    wide = {"float16": "float32", "bfloat16": "float32"}.get(dtype, "float64")
    for accumulator in {wide, "float64" if dtype == "float64" else "float32"}:
        numerics = {"dw_accumulator": dtype_number(accumulator)}
        options = {"block_rows": rows, "results": {"dw": accumulator}}
        with grpc.insecure_channel(server.address) as channel:
            whole = stream_job(channel, problem, numerics=numerics, **options)
            numerics["dw_segment_rows"] = rows
            options |= {"numerics": numerics, "segment_sums": True}
            came = streamed(channel, problem, **options)
        assert whole.accepted.fingerprint == came.accepted.fingerprint
        terms = [np.frombuffer(each["dw"], accumulator) for each in came.sums.values()]
        assert len(terms) == whole.receipt.blocks == 5
        assert functools.reduce(np.add, terms).tobytes() == whole.bits["dw"]


def test_two_devices_share_the_jobs_and_give_the_same_bits() -> None:
    count, _ = devices()
    if count < 2:
        pytest.skip("needs two CUDA devices")
    operands = oracle.operands(4000, 512, 512)
    with (
        running_server(backend=BACKEND) as server,
        gradwire.connect(server.address, timeout_s=60) as client,
    ):
        offered = client.server_info().devices
        assert [device.index for device in offered] == list(range(count))
        with ThreadPoolExecutor(8) as pool:
            running = [pool.submit(client.gradients, *operands) for _ in range(64)]
            results = [each.result() for each in running]
    used = {result.receipt.device.index for result in results}
    assert len(used) > 1
    for result in results:
        if result.receipt.device.name == results[0].receipt.device.name:
            assert_same(result, results[0])
