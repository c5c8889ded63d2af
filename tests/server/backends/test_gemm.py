"""Each product in cuBLAS's letters, through a BLAS that takes the same ones."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from gradwire_protocol.dtypes import Dtype
from gradwire_server.backends.async_device import gemm
from gradwire_server.backends.async_device.gemm import Compute, DeviceMatrix
from tests.server.backends.simulated_device import run_gemm

SHAPES = [(1, 1, 1), (5, 3, 2), (7, 1, 4), (7, 4, 1), (1, 6, 5), (33, 17, 64)]


def stored(array):
    return DeviceMatrix(array.ctypes.data, *array.shape, Dtype.of(array.dtype))


def whole_numbers(rng, *shape, dtype):
    """Small enough that no sum of their products is rounded."""
    return rng.integers(-3, 4, shape).astype(dtype.numpy)


def compute_of(dtype):
    return Compute.of(dtype, allow_tf32=False)


@pytest.mark.parametrize(("shape", "dtype"), list(product(SHAPES, Dtype)))
def test_y_is_x_w(shape, dtype):
    rows, n, k = shape
    rng = np.random.default_rng(1)
    x = whole_numbers(rng, rows, n, dtype=dtype)
    w = whole_numbers(rng, n, k, dtype=dtype)
    y = np.full((rows, k), np.nan, dtype.sums_in.numpy)
    made = gemm.multiply(stored(x), stored(w), stored(y), compute_of(dtype))
    assert (made.m, made.n, made.k) == (k, rows, n)
    assert (made.lda, made.ldb, made.ldc) == (k, n, k)
    assert (made.transa, made.transb) == (False, False)
    run_gemm(made)
    assert np.array_equal(y, x.astype(float) @ w.astype(float))


@pytest.mark.parametrize(("shape", "dtype"), list(product(SHAPES, Dtype)))
def test_dx_is_dy_w_transposed(shape, dtype):
    rows, n, k = shape
    rng = np.random.default_rng(2)
    dy = whole_numbers(rng, rows, k, dtype=dtype)
    w = whole_numbers(rng, n, k, dtype=dtype)
    dx = np.full((rows, n), np.nan, dtype.sums_in.numpy)
    made = gemm.multiply_transposed(
        stored(dy), stored(w), stored(dx), compute_of(dtype)
    )
    assert (made.m, made.n, made.k) == (n, rows, k)
    assert (made.lda, made.ldb, made.ldc) == (k, k, n)
    assert (made.transa, made.transb) == (True, False)
    run_gemm(made)
    assert np.array_equal(dx, dy.astype(float) @ w.astype(float).T)


@pytest.mark.parametrize(("shape", "dtype"), list(product(SHAPES, Dtype)))
def test_dw_is_x_transposed_dy(shape, dtype):
    rows, n, k = shape
    rng = np.random.default_rng(3)
    x = whole_numbers(rng, rows, n, dtype=dtype)
    dy = whole_numbers(rng, rows, k, dtype=dtype)
    dw = np.full((n, k), np.nan, dtype.sums_in.numpy)
    made = gemm.transposed_multiply(
        stored(x), stored(dy), stored(dw), compute_of(dtype)
    )
    assert (made.m, made.n, made.k) == (k, n, rows)
    assert (made.lda, made.ldb, made.ldc) == (k, n, k)
    assert (made.transa, made.transb) == (False, True)
    run_gemm(made)
    assert np.array_equal(dw, x.astype(float).T @ dy.astype(float))


def test_tf32_is_for_float32_operands_of_a_job_that_allows_it():
    for dtype in Dtype:
        exact = Compute.of(dtype, allow_tf32=False)
        allowed = Compute.of(dtype, allow_tf32=True)
        assert exact is not Compute.TF32
        assert (allowed is Compute.TF32) == (dtype is Dtype.FLOAT32)
        assert exact.scalars is dtype.sums_in
        assert allowed.scalars is dtype.sums_in


def test_every_dtype_has_its_row():
    assert set(gemm.CUDA_TYPES) == set(Dtype)
    assert gemm.SUMS_ROUNDED_TO_NEAREST == (Dtype.FLOAT32, Dtype.FLOAT64)


def test_numbers_are_those_of_cuda():
    """CuPy knows them too, where CUDA's libraries are installed."""
    cuda = pytest.importorskip("cupy", exc_type=ImportError).cuda
    try:
        of_cuda, runtime = cuda.cublas, cuda.runtime
    except ImportError as error:
        pytest.skip(str(error))
    assert of_cuda.CUBLAS_COMPUTE_32F == Compute.FLOAT32
    assert of_cuda.CUBLAS_COMPUTE_32F_FAST_TF32 == Compute.TF32
    assert of_cuda.CUBLAS_COMPUTE_64F == Compute.FLOAT64
    assert of_cuda.CUBLAS_OP_N == gemm.NO_TRANSPOSE
    assert of_cuda.CUBLAS_OP_T == gemm.TRANSPOSE
    assert of_cuda.CUBLAS_GEMM_DEFAULT == gemm.DEFAULT_ALGORITHM
    assert of_cuda.CUBLAS_POINTER_MODE_HOST == gemm.POINTER_MODE_HOST
    assert {dtype: cuda.number for dtype, cuda in gemm.CUDA_TYPES.items()} == {
        Dtype.FLOAT16: runtime.CUDA_R_16F,
        Dtype.BFLOAT16: runtime.CUDA_R_16BF,
        Dtype.FLOAT32: runtime.CUDA_R_32F,
        Dtype.FLOAT64: runtime.CUDA_R_64F,
    }
