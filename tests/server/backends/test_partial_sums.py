"""A sum of dW that is taken out and put in again makes no difference to a bit."""

from __future__ import annotations

import numpy as np
import pytest

from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.matrices import Matrix
from gradwire_server.backends.async_device.job import DeviceJob
from gradwire_server.backends.base import RowBlock, Times, empty_aligned
from gradwire_server.backends.numpy.backend import NumpyBackend
from tests.server.backends.simulated_device import SimulatedDevice
from tests.server.backends.test_numpy_backend import operands
from tests.server.specs import make_spec

B, M = 4, 22
SUMS = [
    (Dtype.FLOAT16, Dtype.FLOAT32),
    (Dtype.BFLOAT16, Dtype.FLOAT64),
    (Dtype.FLOAT32, Dtype.FLOAT32),
    (Dtype.FLOAT32, Dtype.FLOAT64),
    (Dtype.FLOAT64, Dtype.FLOAT64),
]


def open_numpy(spec):
    return NumpyBackend().open_job(spec, B, 0, times=Times())


def open_device(spec):
    return DeviceJob(spec, B, 3, SimulatedDevice(), times=Times(), empty=empty_aligned)


def add_blocks(job, x, dy, first, last):
    for row in range(first, last, B):
        rows = slice(row, min(row + B, last))
        block = RowBlock(len(x[rows]), x[rows].copy(), dy[rows].copy(), None, None)
        wait = job.compute_block(block)
        if wait is not None:
            wait()


def sums_of(job, spec):
    dtype = spec.accumulator.numpy
    sums = {
        result: np.full(result.shape(0, spec.n, spec.k), np.nan, dtype)
        for result in spec.sums
    }
    job.copy_sums(sums)
    return sums


def bits_of(sums):
    return {result: array.tobytes() for result, array in sums.items()}


@pytest.fixture(params=[open_numpy, open_device], ids=["numpy", "device"])
def open_job(request):
    return request.param


@pytest.mark.parametrize(("dtype", "accumulator"), SUMS)
def test_a_job_that_goes_on_has_the_bits_of_one_that_was_never_cut_off(
    open_job, dtype, accumulator
):
    spec = make_spec(dtype=dtype, accumulator=accumulator, results=(Matrix.DW,))
    x, _, dy = operands(spec, M)
    whole = open_job(spec)
    add_blocks(whole, x, dy, 0, M)
    expected = bits_of(whole.finish())
    for cut in range(0, M, B):
        before = open_job(spec)
        add_blocks(before, x, dy, 0, cut)
        sums = sums_of(before, spec)
        before.close()
        after = open_job(spec)
        after.take_sums(sums)
        for array in sums.values():
            array.fill(np.nan)  # from here on it is the caller's again
        add_blocks(after, x, dy, cut, M)
        assert bits_of(after.finish()) == expected, cut
        after.close()


def test_taking_the_sum_out_leaves_the_job_as_it_was(open_job):
    spec = make_spec(results=(Matrix.DW,))
    x, _, dy = operands(spec, M)
    job, other = open_job(spec), open_job(spec)
    assert not any(array.any() for array in sums_of(job, spec).values())
    for row in range(0, M, B):
        add_blocks(job, x, dy, row, min(row + B, M))
        add_blocks(other, x, dy, row, min(row + B, M))
        sums_of(job, spec)
    assert bits_of(job.finish()) == bits_of(other.finish())


@pytest.mark.parametrize(("dtype", "accumulator"), SUMS)
def test_sums_that_begin_anew_have_the_bits_of_a_job_of_their_own(
    open_job, dtype, accumulator
):
    spec = make_spec(dtype=dtype, accumulator=accumulator, results=(Matrix.DW,))
    x, _, dy = operands(spec, M)
    job = open_job(spec)
    for first, last in ((0, 8), (8, 12), (12, M)):
        add_blocks(job, x, dy, first, last)
        own = open_job(spec)
        add_blocks(own, x, dy, first, last)
        assert bits_of(sums_of(job, spec)) == bits_of(sums_of(own, spec))
        own.close()
        job.restart_sums()
    # Of no row block, they are zeros.
    assert not any(array.any() for array in sums_of(job, spec).values())


@pytest.mark.parametrize(("dtype", "accumulator"), SUMS)
def test_sums_taken_behind_the_last_row_are_the_result(open_job, dtype, accumulator):
    spec = make_spec(dtype=dtype, accumulator=accumulator, results=(Matrix.DW,))
    x, _, dy = operands(spec, M)
    total = {Matrix.DW: np.full((spec.n, spec.k), 1 / 3, accumulator.numpy)}
    job = open_job(spec)
    waits = []
    for row in range(0, M, B):  # on a device, they are in flight then
        rows = slice(row, row + B)
        block = RowBlock(len(x[rows]), x[rows].copy(), dy[rows].copy(), None, None)
        waits.append((job.compute_block(block), block))
        if len(waits) > 2:
            wait, _ = waits.pop(0)
            if wait is not None:
                wait()
    job.take_sums(total)
    for wait, _ in waits:
        if wait is not None:
            wait()
    expected = total[Matrix.DW].astype(dtype.numpy)
    assert job.finish()[Matrix.DW].tobytes() == expected.tobytes()
    job.close()


def test_a_job_that_goes_on_behind_its_last_row_gives_the_sum_rounded(open_job):
    spec = make_spec(dtype=Dtype.FLOAT16, results=(Matrix.DW,))
    dw = np.full((spec.n, spec.k), 1 / 3, np.float32)
    job = open_job(spec)
    job.take_sums({Matrix.DW: dw})
    assert job.finish()[Matrix.DW].tobytes() == dw.astype(np.float16).tobytes()
