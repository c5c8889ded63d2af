"""Whole jobs on a device whose streams run in any order that marks allow."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace
from functools import partial
from itertools import pairwise, product

import numpy as np
import pytest

from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.job_spec import BufferRef
from gradwire_protocol.matrices import Matrix
from gradwire_server.backends.async_device.gemm import Compute
from gradwire_server.backends.async_device.job import DeviceJob
from gradwire_server.backends.async_device.layout import make_layout
from gradwire_server.backends.base import RowBlock, Times, empty_aligned
from tests.server.backends.simulated_device import SimulatedDevice
from tests.server.backends.test_numpy_backend import bounds, exact, operands
from tests.server.specs import ALL, make_spec

SETS = [
    (Matrix.Y,),
    (Matrix.DX,),
    (Matrix.DW,),
    (Matrix.Y, Matrix.DX),
    (Matrix.DX, Matrix.DW),
    (Matrix.DB,),
    (Matrix.DW, Matrix.DB),
    ALL,
]


def open_job(spec, block_rows, device, begun=3, **options):
    options = {"times": Times(), "empty": empty_aligned} | options
    return DeviceJob(spec, block_rows, begun, device, **options)


def blocks_of(spec, x, dy, results, block_rows):
    """Row blocks whose operands are copies that nobody else keeps."""
    needs = spec.operands
    for first in range(0, len(x), block_rows):
        rows = slice(first, min(first + block_rows, len(x)))
        yield RowBlock(
            rows=rows.stop - rows.start,
            x=x[rows].copy() if Matrix.X in needs else None,
            dy=dy[rows].copy() if Matrix.DY in needs else None,
            y=results[Matrix.Y][rows] if Matrix.Y in results else None,
            dx=results[Matrix.DX][rows] if Matrix.DX in results else None,
        )


def pieces_of(spec, job, given, results, block_rows):
    """What a device worker does of a job, one after the other."""
    x, w, dy = given
    if Matrix.W in spec.operands:
        yield partial(job.take_w, w)
    for block in blocks_of(spec, x, dy, results, block_rows):
        yield partial(job.compute_block, block)


def room(spec, m):
    return {
        matrix: np.full((m, spec.row_length(matrix)), np.nan, dtype.numpy)
        for matrix, dtype in spec.results.items()
        if matrix.row_wise
    }


def run_all(device, jobs, begun=3):
    """Does pieces of jobs in turn as a device worker does, with `begun` in flight."""
    waits = deque()
    turns = deque(jobs)
    while turns:
        pieces = turns.popleft()
        piece = next(pieces, None)
        if piece is None:
            continue
        turns.append(pieces)
        wait = piece()
        del piece
        if wait is not None:
            waits.append(wait)
        if len(waits) == begun:
            waits.popleft()()
    while waits:
        waits.popleft()()


def run(spec, given, block_rows, device=None, begun=3, **options):
    device = device or SimulatedDevice()
    results = room(spec, len(given[0]))
    job = open_job(spec, block_rows, device, begun, **options)
    run_all(device, [pieces_of(spec, job, given, results, block_rows)], begun)
    if spec.sums:
        results.update(job.finish())
    job.close()
    assert device.taken_bytes == 0
    assert device.marks_out == 0
    return results


def assert_right(spec, computed, given, blocks):
    limits = bounds(spec, *given, blocks)
    for matrix, reference in exact(*given).items():
        if matrix not in spec.results:
            continue
        assert computed[matrix].dtype == spec.results[matrix].numpy
        error = np.abs(computed[matrix].astype(np.float64) - reference)
        assert (error <= limits[matrix]).all(), matrix


@pytest.mark.parametrize(
    ("dtype", "result_dtype", "shape"),
    list(product(Dtype, Dtype, [(1, 1, 1), (37, 5, 3), (200, 17, 64), (64, 1, 30)])),
)
def test_every_dtype_is_as_exact_as_its_sums_allow(dtype, result_dtype, shape):
    m, n, k = shape
    for accumulator in {dtype.sums_in, Dtype.FLOAT64}:
        spec = make_spec(m, n, k, dtype, ALL, result_dtype, accumulator)
        given = operands(spec, m)
        computed = run(spec, given, block_rows=16)
        assert_right(spec, computed, given, blocks=-(-m // 16))


@pytest.mark.parametrize("result_dtype", Dtype)
@pytest.mark.parametrize("dtype", Dtype)
def test_one_block_costs_no_wider_sum_and_has_the_same_bits(dtype, result_dtype):
    found, sizes = set(), []
    for accumulator in dtype.accumulators:
        spec = make_spec(16, 30, 7, dtype, ALL, result_dtype, accumulator)
        found.add(run(spec, operands(spec, 16), 16)[Matrix.DW].tobytes())
        sizes.append(make_layout(spec, 16, 3).size_bytes)
    assert len(found) == 1
    if result_dtype is not Dtype.FLOAT64:  # in which the sum leaves as it is held
        assert sizes[-1] == sizes[0]
    # A stream whose length is not known holds the accumulator from its beginning.
    unknown = make_spec(None, 30, 7, dtype, ALL, result_dtype, accumulator)
    assert found == {run(unknown, operands(unknown, 16), 16)[Matrix.DW].tobytes()}


@pytest.mark.parametrize("results", SETS)
@pytest.mark.parametrize("begun", [1, 2, 3])
def test_nothing_is_read_or_written_before_its_time(results, begun):
    """In whatever order the device does what was begun."""
    spec = make_spec(None, 7, 5, Dtype.FLOAT32, results)
    given = operands(spec, 90)
    expected = None
    for seed in range(30):
        computed = run(spec, given, 8, SimulatedDevice(seed), begun)
        assert_right(spec, computed, given, blocks=12)
        bits = {matrix: array.tobytes() for matrix, array in computed.items()}
        expected = expected or bits
        assert bits == expected


@pytest.mark.parametrize(
    ("dtype", "result_dtype", "accumulator"),
    [
        (Dtype.BFLOAT16, Dtype.BFLOAT16, None),
        (Dtype.BFLOAT16, Dtype.FLOAT64, Dtype.FLOAT64),
        (Dtype.FLOAT32, Dtype.FLOAT16, Dtype.FLOAT64),
    ],
)
def test_jobs_that_take_turns_on_a_device_do_not_see_each_other(
    dtype, result_dtype, accumulator
):
    specs = [
        make_spec(None, n, k, dtype, ALL, result_dtype, accumulator)
        for n, k in ((7, 5), (3, 11))
    ]
    given = [operands(spec, 60, seed) for seed, spec in enumerate(specs)]
    alone = [run(spec, each, 8) for spec, each in zip(specs, given, strict=True)]
    for seed in range(10):
        device = SimulatedDevice(seed)
        jobs = [open_job(spec, 8, device) for spec in specs]
        results = [room(spec, 60) for spec in specs]
        run_all(
            device,
            [
                pieces_of(*each, 8)
                for each in zip(specs, jobs, given, results, strict=True)
            ],
        )
        for job, computed, expected in zip(jobs, results, alone, strict=True):
            computed.update(job.finish())
            job.close()
            for matrix, array in expected.items():
                assert computed[matrix].tobytes() == array.tobytes()
        assert device.taken_bytes == 0


@pytest.mark.parametrize("seed", range(20))
def test_more_blocks_may_begin_than_there_are_slots(seed):
    """And dW may be asked for before any of them was waited for."""
    spec = make_spec(None, 7, 5)
    given = operands(spec, 60)
    device = SimulatedDevice(seed)
    results = room(spec, 60)
    job = open_job(spec, 8, device)
    waits = [piece() for piece in pieces_of(spec, job, given, results, 8)]
    results.update(job.finish())
    for wait in filter(None, waits):
        wait()
    assert_right(spec, results, given, blocks=8)


@pytest.mark.parametrize("dtype", Dtype)
@pytest.mark.parametrize("shape", list(product((0, 1, 3), repeat=3)))
def test_zero_sizes_give_what_numpy_gives(shape, dtype):
    m, n, k = shape
    spec = make_spec(m, n, k, dtype)
    given = operands(spec, m)
    computed = run(spec, given, block_rows=2)
    for matrix, reference in exact(*given).items():
        assert computed[matrix].shape == reference.shape
    assert_right(spec, computed, given, blocks=2)


def test_sums_go_where_they_shall_lie():
    place = {Matrix.DW: BufferRef(region=0, offset=0)}
    for result_dtype in (Dtype.BFLOAT16, Dtype.FLOAT32):
        spec = make_spec(
            20, 7, 5, Dtype.BFLOAT16, ALL, result_dtype=result_dtype, places=place
        )
        given = operands(spec, 20)
        sums = {
            result: np.full(result.shape(20, 7, 5), np.nan, result_dtype.numpy)
            for result in spec.sums
        }
        computed = run(spec, given, 8, sums=sums)
        assert all(computed[result] is array for result, array in sums.items())
        assert_right(spec, computed, given, blocks=3)


def test_tf32_is_for_products_and_not_for_sums_of_columns():
    spec = replace(make_spec(20, 7, 5), allow_tf32=True)
    device = SimulatedDevice()
    computed = {}
    multiply = device.multiply

    def note(product):
        # dB's products alone have one column.
        computed.setdefault(product.n == 1, set()).add(product.compute)
        multiply(product)

    device.multiply = note
    run(spec, operands(spec, 20), 8, device)
    assert computed == {True: {Compute.FLOAT32}, False: {Compute.TF32}}


def test_after_an_error_nothing_of_the_job_goes_on():
    """A block whose second product fails has copies under way."""
    spec = make_spec(None, 7, 5)
    given = operands(spec, 24)
    device = SimulatedDevice()
    job = open_job(spec, 8, device)
    pieces = pieces_of(spec, job, given, room(spec, 24), 8)
    next(pieces)()
    wait = next(pieces)()
    device.fail_at = 1
    with pytest.raises(MemoryError):
        next(pieces)()
    assert not any(device.queues.values())
    wait()
    job.close()
    job.close()
    assert device.taken_bytes == 0


def test_stages_are_timed_by_the_device():
    spec = make_spec(None, 7, 5)
    times = Times()
    run(spec, operands(spec, 24), 8, times=times)
    assert times.to_device_s > 0
    assert times.computing_s > 0
    assert times.from_device_s > 0


@pytest.mark.parametrize("m", [None, 0, 3, 10, 11, 100])
@pytest.mark.parametrize("results", SETS)
def test_matrices_lie_apart_and_aligned(m, results):
    for dtypes in product(Dtype, Dtype, (None, Dtype.FLOAT64)):
        assert_apart_and_aligned(m, results, *dtypes)


def assert_apart_and_aligned(m, results, dtype, result_dtype, accumulator):
    spec = make_spec(m, 33, 20, dtype, results, result_dtype, accumulator)
    layout = make_layout(spec, 10, 3)
    spans = []

    def add(offset, elements, itemsize):
        if offset is not None:
            spans.append((offset, offset + elements * itemsize))

    add(layout.w, 33 * 20, dtype.itemsize)
    add(layout.ones, 10, dtype.itemsize)
    assert set(layout.sums) == set(spec.sums)
    for matrix, place in layout.sums.items():
        size = math.prod(matrix.shape(0, 33, 20))
        add(place.total, size, layout.held_in.itemsize)
        add(place.share, size, dtype.sums_in.itemsize)
        if place.rounded not in {place.share, layout.w}:
            add(place.rounded, size, result_dtype.itemsize)
    longest = max(33 * (Matrix.DX in results), 20 * (Matrix.Y in results))
    add(layout.unrounded, 10 * longest, dtype.sums_in.itemsize)
    for slot in layout.slots:
        assert set(slot) == {*spec.operands, *spec.results} - {Matrix.W, *spec.sums}
        for matrix, offset in slot.items():
            itemsize = spec.dtype_of(matrix).itemsize
            add(offset, 10 * spec.row_length(matrix), itemsize)
    spans.sort()
    spans.append((layout.size_bytes, 0))
    for (_, end), (start, _) in pairwise(spans):
        assert start % 256 == 0
        # What lies between is there for the alignment alone.
        assert 0 <= start - end < 256
    assert len(layout.slots) == (3 if m is None else min(3, -(-m // 10)))
