"""The NumPy backend against float64, for every dtype."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from itertools import product

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.job_spec import BufferRef
from gradwire_protocol.matrices import Matrix
from gradwire_server.backends.base import RowBlock, Times
from gradwire_server.backends.numpy import backend as numpy_backend
from gradwire_server.backends.numpy.backend import NumpyBackend
from tests.server.specs import ALL, make_spec

UNIT_ROUNDOFF = {
    Dtype.FLOAT16: 2.0**-11,
    Dtype.BFLOAT16: 2.0**-8,
    Dtype.FLOAT32: 2.0**-24,
    Dtype.FLOAT64: 2.0**-53,
}


def run(spec, x, w, dy, block_rows, backend=None):
    """The three results, computed block by block."""
    job = (backend or NumpyBackend()).open_job(spec, block_rows, 0, times=Times())
    m = len(x)
    results = {
        matrix: np.empty((m, spec.row_length(matrix)), dtype.numpy)
        for matrix, dtype in spec.results.items()
        if matrix is not Matrix.DW
    }
    job.take_w(w)
    for first in range(0, m, block_rows):
        rows = slice(first, min(first + block_rows, m))
        job.compute_block(
            RowBlock(
                rows=rows.stop - rows.start,
                x=x[rows],
                dy=dy[rows],
                y=results[Matrix.Y][rows] if Matrix.Y in results else None,
                dx=results[Matrix.DX][rows] if Matrix.DX in results else None,
            )
        )
    if spec.sums:
        results.update(job.finish())
    return results


def operands(spec, m, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (m, spec.n), (spec.n, spec.k), (m, spec.k)
    return [rng.standard_normal(shape).astype(spec.dtype.numpy) for shape in shapes]


def exact(x, w, dy):
    x, w, dy = (each.astype(np.float64) for each in (x, w, dy))
    db = dy.sum(axis=0, keepdims=True)
    return {Matrix.Y: x @ w, Matrix.DX: dy @ w.T, Matrix.DW: x.T @ dy, Matrix.DB: db}


def bounds(spec, x, w, dy, blocks):
    """|computed - exact| of a sum of products, element by element.

    Higham, Accuracy and Stability of Numerical Algorithms, section 3.1: a
    sum of l products in unit roundoff u, in any order, is off by at most
    gamma_l |a|^T |b|, gamma_l = l u / (1 - l u). float64, in which the
    reference is computed, adds as much in its own roundoff; the result is
    rounded once more.
    """
    sizes = exact(*map(np.abs, (x, w, dy)))
    lengths = {Matrix.Y: spec.n, Matrix.DX: spec.k, Matrix.DW: len(x) + blocks}
    lengths[Matrix.DB] = lengths[Matrix.DW]
    limits = {}
    for matrix, dtype in spec.results.items():
        gamma = sum(
            lengths[matrix] * u / (1 - lengths[matrix] * u)
            for u in (UNIT_ROUNDOFF[spec.dtype.sums_in], UNIT_ROUNDOFF[Dtype.FLOAT64])
        )
        u = UNIT_ROUNDOFF[dtype]
        tiny = np.finfo(np.float16).smallest_subnormal if dtype.itemsize == 2 else 0
        limits[matrix] = (gamma * (1 + u) + u) * sizes[matrix] + tiny
    return limits


@pytest.mark.parametrize(
    ("dtype", "result_dtype", "shape"),
    list(product(Dtype, Dtype, [(1, 1, 1), (37, 5, 3), (200, 17, 64), (64, 1, 30)])),
)
def test_every_dtype_is_as_exact_as_its_sums_allow(dtype, result_dtype, shape):
    m, n, k = shape
    spec = make_spec(m, n, k, dtype, ALL, result_dtype)
    x, w, dy = operands(spec, m)
    computed = run(spec, x, w, dy, block_rows=16)
    limits = bounds(spec, x, w, dy, blocks=-(-m // 16))
    for matrix, reference in exact(x, w, dy).items():
        assert computed[matrix].dtype == result_dtype.numpy
        error = np.abs(computed[matrix].astype(np.float64) - reference)
        assert (error <= limits[matrix]).all(), matrix


def test_a_float64_accumulator_sums_blocks_without_rounding_them_to_float32():
    """2**24 blocks of 1 would stop at 2**24 in float32; fewer show it as well."""
    spec, wide = (
        make_spec(
            None,
            1,
            1,
            Dtype.FLOAT32,
            (Matrix.DW,),
            result_dtype=Dtype.FLOAT64,
            accumulator=accumulator,
        )
        for accumulator in (Dtype.FLOAT32, Dtype.FLOAT64)
    )
    x = np.array([[2.0**24], [1.0], [1.0]], np.float32)
    w, dy = np.ones((1, 1), np.float32), np.ones((3, 1), np.float32)
    assert run(spec, x, w, dy, block_rows=1)[Matrix.DW].item() == 2.0**24
    assert run(wide, x, w, dy, block_rows=1)[Matrix.DW].item() == 2.0**24 + 2


def test_a_float64_sum_over_blocks_becomes_bfloat16_in_one_rounding():
    x = np.zeros((48, 1), Dtype.BFLOAT16.numpy)
    x[[0, 16, 32], 0] = 1, 2.0**-8, 2.0**-40
    dy = np.ones((48, 1), Dtype.BFLOAT16.numpy)
    spec = make_spec(48, 1, 1, Dtype.BFLOAT16, (Matrix.DW,), accumulator=Dtype.FLOAT64)
    results = run(spec, x, None, dy, block_rows=16)
    assert float(results[Matrix.DW][0, 0]) == 1.0078125


@pytest.mark.parametrize("dtype", Dtype)
@pytest.mark.parametrize(("n", "k"), [(30, 7), (7, 30)])
def test_dw_in_tiles_is_dw(monkeypatch, dtype, n, k):
    spec = make_spec(50, n, k, dtype)
    x, w, dy = operands(spec, 50)
    whole = run(spec, x, w, dy, block_rows=16)
    monkeypatch.setattr(numpy_backend, "TILE_BYTES", 4 * 7 * 8)
    tiles = run(spec, x, w, dy, block_rows=16)
    limits = bounds(spec, x, w, dy, blocks=4)[Matrix.DW]
    difference = whole[Matrix.DW].astype(float) - tiles[Matrix.DW].astype(float)
    assert (np.abs(difference) <= 2 * limits).all()
    assert np.array_equal(whole[Matrix.Y], tiles[Matrix.Y])


@pytest.mark.parametrize("dtype", Dtype)
def test_bits_do_not_depend_on_how_many_threads_compute(dtype):
    spec = make_spec(700, 300, 260, dtype)
    given = operands(spec, 700)
    results = []
    for threads in (1, 2, 5):
        backend = NumpyBackend(threads)
        try:
            results.append(run(spec, *given, block_rows=512, backend=backend))
        finally:
            backend.close()
    for matrix, first in results[0].items():
        for other in results[1:]:
            assert first.tobytes() == other[matrix].tobytes()


def test_a_closed_backend_gives_blas_its_threads_back():
    def blas_threads():
        return [
            library["num_threads"]
            for library in threadpool_info()
            if library["user_api"] == "blas"
        ]

    before = blas_threads()
    backend = NumpyBackend(2)
    assert set(blas_threads()) == {1}
    assert backend.devices[0].threads == 1
    backend.close()
    assert blas_threads() == before


@pytest.mark.parametrize("shape", [(700, 20, 30), (20, 700, 300), (20, 300, 700)])
def test_products_cut_along_either_side_are_whole(shape):
    m, n, k = shape
    spec = make_spec(m, n, k)
    x, w, dy = operands(spec, m)
    computed = run(spec, x, w, dy, block_rows=512)
    limits = bounds(spec, x, w, dy, blocks=2)
    for matrix, reference in exact(x, w, dy).items():
        assert (np.abs(computed[matrix] - reference) <= limits[matrix]).all(), matrix


@pytest.mark.parametrize("shape", list(product((0, 1, 3), repeat=3)))
def test_zero_sizes_give_what_numpy_gives(shape):
    m, n, k = shape
    spec = make_spec(m, n, k)
    x, w, dy = operands(spec, m)
    computed = run(spec, x, w, dy, block_rows=2)
    for matrix, reference in exact(x, w, dy).items():
        assert computed[matrix].shape == reference.shape
        assert np.allclose(computed[matrix], reference, rtol=1e-5, atol=0)


def test_nan_inf_and_overflow_are_data():
    spec = make_spec(2, 2, 2, Dtype.FLOAT16)
    x = np.array([[np.nan, 1], [60000, 60000]], np.float16)
    w = np.array([[1, np.inf], [1, 0]], np.float16)
    computed = run(spec, x, w, np.ones((2, 2), np.float16), block_rows=2)
    with np.errstate(all="ignore"):
        wide = x.astype(np.float32) @ w.astype(np.float32)
        assert np.array_equal(
            computed[Matrix.Y], wide.astype(np.float16), equal_nan=True
        )
    assert np.isposinf(computed[Matrix.Y][1, 0])


@pytest.mark.parametrize(
    ("dtype", "result_dtype", "accumulator"),
    [
        (Dtype.FLOAT16, None, None),
        (Dtype.BFLOAT16, Dtype.FLOAT32, Dtype.FLOAT64),
        (Dtype.FLOAT32, None, None),
        (Dtype.FLOAT32, Dtype.FLOAT64, Dtype.FLOAT64),
        (Dtype.FLOAT32, Dtype.FLOAT16, None),
        (Dtype.FLOAT64, None, None),
    ],
)
def test_a_job_takes_no_more_memory_than_was_said(dtype, result_dtype, accumulator):
    spec = make_spec(512, 600, 700, dtype, ALL, result_dtype, accumulator)
    x, w, dy = operands(spec, 512)
    blocks = RowBlock(
        rows=128,
        x=x[:128],
        dy=dy[:128],
        y=np.empty((128, 700), spec.results[Matrix.Y].numpy),
        dx=np.empty((128, 600), spec.results[Matrix.DX].numpy),
    )
    tracemalloc.start()
    try:
        job = NumpyBackend().open_job(spec, 128, 0, times=Times())
        job.take_w(w)
        job.compute_block(blocks)
        dw = job.finish()[Matrix.DW]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    said = NumpyBackend().job_bytes(spec, 128)
    assert dw.shape == (600, 700)
    slack = 256 * 1024  # objects, and NumPy's buffers for casting
    assert said - slack <= peak <= said + slack


@pytest.mark.parametrize("result_dtype", Dtype)
@pytest.mark.parametrize("dtype", Dtype)
def test_one_block_costs_no_wider_sum_and_has_the_same_bits(dtype, result_dtype):
    backend, found, said = NumpyBackend(), set(), []
    for accumulator in dtype.accumulators:
        spec = make_spec(16, 30, 7, dtype, ALL, result_dtype, accumulator)
        computed = run(spec, *operands(spec, 16), block_rows=16)
        found.add(computed[Matrix.DW].tobytes())
        said.append(backend.job_bytes(spec, 16))
    assert len(found) == 1
    assert said[-1] <= said[0]
    # A stream whose length is not known holds the accumulator from its beginning.
    unknown = make_spec(None, 30, 7, dtype, ALL, result_dtype, accumulator)
    computed = run(unknown, *operands(unknown, 16), block_rows=16)
    assert found == {computed[Matrix.DW].tobytes()}


@pytest.mark.parametrize("m", [0, 5, 50])
@pytest.mark.parametrize("dtype", Dtype)
def test_dw_is_summed_where_it_will_lie_and_has_the_same_bits(dtype, m):
    """Only where it lies in the dtype of the sum: others are rounded there.

    The sum of one row block, of 16 rows, is not wider than its product.
    """
    places = {
        matrix: BufferRef(region=number, offset=0)
        for number, matrix in enumerate((Matrix.X, Matrix.DY, Matrix.DW))
    }
    elsewhere = make_spec(m, 30, 7, dtype, (Matrix.DW,))
    spec = make_spec(m, 30, 7, dtype, (Matrix.DW,), places=places)
    x, _, dy = operands(spec, m)
    backend = NumpyBackend()
    found = []
    for place in (None, np.full((30, 7), np.nan, dtype.numpy)):
        sums = None if place is None else {Matrix.DW: place}
        job = backend.open_job(spec, 16, 0, times=Times(), sums=sums)
        for first in range(0, m, 16):
            part = slice(first, min(first + 16, m))
            rows = part.stop - first
            job.compute_block(
                RowBlock(rows=rows, x=x[part], dy=dy[part], y=None, dx=None)
            )
        found.append(job.finish()[Matrix.DW])
        same = dtype is (dtype.sums_in if m <= 16 else dtype.default_accumulator)
        in_place = place is not None and same
        assert (found[-1] is place) == in_place
    assert found[0].tobytes() == found[1].tobytes()
    saved = backend.job_bytes(elsewhere, 16) - backend.job_bytes(spec, 16)
    assert saved == (found[0].nbytes if same else 0)


def test_a_block_is_let_go_of_without_the_garbage_collector():
    spec = make_spec(n=6, k=5, dtype=Dtype.FLOAT32, results=ALL)
    x, w, dy = operands(spec, 8)
    job = NumpyBackend().open_job(spec, 8, 0, times=Times())
    job.take_w(w)
    seen = weakref.ref(x)
    gc.disable()
    try:
        job.compute_block(
            RowBlock(rows=8, x=x, dy=dy, y=np.empty_like(dy), dx=np.empty_like(x))
        )
        del x
        assert seen() is None
    finally:
        gc.enable()
