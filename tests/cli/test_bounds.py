"""Bounds that every right product keeps, and wrong ones break."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwire._integrity.rounding_error import Arithmetic, gamma
from gradwire_cli.checks.bounds import worst
from gradwire_cli.checks.reference import (
    Products,
    count_different,
    differences,
    integer_products,
    normal_products,
    rounded,
)
from gradwire_protocol.dtypes import Dtype


def to_tf32(a: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The nearest numbers with 10 bits of mantissa."""
    bits = a.view(np.uint32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & 0xFFFFE000).view(np.float32)


def as_a_server_would(job: Products) -> dict[str, npt.NDArray[np.float64]]:
    sums, result = job.dtype.sums_in.numpy, job.dtype.numpy
    x, w, dy = (a.astype(sums) for a in job.operands)
    products = {"y": x @ w, "dx": dy @ w.T, "dw": x.T @ dy, "db": dy.sum(axis=0)}
    return {name: a.astype(result).astype(np.float64) for name, a in products.items()}


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (Dtype.FLOAT16, 2**-11),
        (Dtype.BFLOAT16, 2**-8),
        (Dtype.FLOAT32, 2**-24),
        (Dtype.FLOAT64, 2**-53),
    ],
)
def test_unit_roundoff_is_half_the_distance_from_one_to_its_neighbour(
    dtype: Dtype, expected: float
) -> None:
    assert dtype.unit_roundoff == expected


def test_gamma_is_the_formula_and_infinite_where_it_ends() -> None:
    assert gamma(3, 2**-4) == pytest.approx(float(Fraction(3, 16) / Fraction(13, 16)))
    assert gamma(0, 2**-4) == 0
    assert gamma(16, 2**-4) == float("inf")


@pytest.mark.parametrize("dtype", Dtype)
@given(
    shape=st.tuples(*[st.integers(1, 70)] * 3),
    seed=st.integers(0, 2**32),
    exponent=st.integers(-6, 3),
)
def test_right_products_keep_the_bound(
    dtype: Dtype, shape: tuple[int, int, int], seed: int, exponent: int
) -> None:
    job = normal_products(np.random.default_rng(seed), shape, dtype)
    scale = np.array(2.0**exponent, dtype.numpy)
    job = Products(job.x * scale, job.w * scale, job.dy * scale)
    exact = job.exact()
    bounds = job.bounds(exact)
    for name, result in as_a_server_would(job).items():
        assert np.all(np.abs(result - exact[name]) <= bounds[name]), name


@pytest.mark.parametrize("seed", range(5))
def test_products_of_operands_rounded_to_tf32_break_it_many_times(seed: int) -> None:
    job = normal_products(np.random.default_rng(seed), (48, 40, 56), Dtype.FLOAT32)
    exact = job.exact()
    bounds = job.bounds(exact)
    rough = as_a_server_would(Products(*(to_tf32(a) for a in job.operands)))
    for name, result in rough.items():
        error, bound = worst(np.abs(result - exact[name]), bounds[name])
        assert error > 10 * bound, name


@pytest.mark.parametrize("dtype", [Dtype.FLOAT16, Dtype.BFLOAT16])
def test_sums_in_sixteen_bits_break_it(dtype: Dtype) -> None:
    job = normal_products(np.random.default_rng(0), (48, 40, 56), dtype)
    exact = job.exact()["y"]
    total = np.zeros(exact.shape, dtype.numpy)
    for column in range(40):
        total = total + job.x[:, [column]] * job.w[[column]]
    error, bound = worst(
        np.abs(total.astype(np.float64) - exact), job.bounds(job.exact())["y"]
    )
    assert error > bound


@pytest.mark.parametrize("dtype", Dtype)
def test_products_of_small_integers_are_exact_until_they_are_rounded(
    dtype: Dtype,
) -> None:
    job = integer_products(np.random.default_rng(0), (5000, 7, 5), dtype)
    exact = {name: rounded(right, dtype) for name, right in job.exact().items()}
    assert count_different(as_a_server_would(job), exact) == 0


def test_the_worst_element_is_the_one_that_uses_most_of_its_bound() -> None:
    error, bound = np.array([1.0, 2.0, 0.0]), np.array([0.5, 4.0, 0.0])
    assert worst(error, bound) == (1.0, 0.5)
    assert worst(np.array([0.0, 3.0]), np.zeros(())) == (3.0, 0.0)
    assert worst(np.array([1.0, np.nan]), np.array([0.5, 9.0])) == (np.inf, 9.0)
    assert worst(np.empty((0, 3)), np.empty((0, 3))) == (0.0, 0.0)


def test_equal_infinities_and_nans_do_not_differ() -> None:
    inf, nan = np.inf, np.nan
    result = np.array([inf, -inf, nan, 1.0, inf, nan])
    expected = np.array([inf, -inf, nan, 1.0, -inf, 1.0])
    np.testing.assert_array_equal(differences(result, expected), [0, 0, 0, 0, inf, nan])
    assert count_different({"y": result}, {"y": expected}) == 2
    assert count_different({"y": result[:3]}, {"y": expected}) == 6
    assert count_different({"y": np.empty((0, 3))}, {"y": np.empty((3, 0))}) == 1


def test_the_bound_covers_a_result_of_a_wider_dtype_without_rounding() -> None:
    exact, magnitude = np.array([1.0]), np.array([2.0])
    narrow, wide = (
        Arithmetic(Dtype.FLOAT16, result, 8).bound(exact, magnitude, 8)
        for result in (Dtype.FLOAT16, Dtype.FLOAT32)
    )
    assert wide[0] < 2**-19 < 2**-11 < narrow[0]
