"""Every conversion to a dtype rounds once, to nearest, ties to even."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwire_protocol.dtypes import Dtype, rounded

BITS = np.arange(2**16, dtype=np.uint16)


def numbers(dtype: Dtype) -> np.ndarray:
    """All finite numbers of a 16-bit dtype, ascending."""
    with np.errstate(invalid="ignore"):
        found = BITS.view(dtype.numpy).astype(np.float64)
    return np.unique(found[np.isfinite(found)])


NARROW = [dtype for dtype in Dtype if dtype.itemsize == 2]
NUMBERS = {dtype: numbers(dtype) for dtype in NARROW}


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("away", [-(2.0**-40), -(2.0**-52), 0.0, 2.0**-52, 2.0**-40])
def test_around_every_middle_of_two_neighbours(dtype: Dtype, away: float) -> None:
    low, high = NUMBERS[dtype][:-1], NUMBERS[dtype][1:]
    middle = (low + high) / 2  # exact in float64
    values = middle * (1 + away)
    even = np.where(low.astype(dtype.numpy).view(np.uint16) % 2 == 0, low, high)
    expected = np.where(values == middle, even, np.where(values < middle, low, high))
    np.testing.assert_array_equal(rounded(values, dtype).astype(np.float64), expected)


def test_the_smallest_case_of_rounding_twice() -> None:
    value = np.array([[1 + 2**-8 + 2**-40]])
    assert rounded(value, Dtype.BFLOAT16)[0, 0] == 1.0078125
    assert value.astype(ml_dtypes.bfloat16)[0, 0] == 1.0  # by way of float32


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_any_float64_goes_to_its_nearest_bfloat16(value: float) -> None:
    result = float(rounded(np.array([value]), Dtype.BFLOAT16)[0])
    largest = Fraction(Dtype.BFLOAT16.largest)
    exact = Fraction(value)
    if np.isinf(result):
        assert abs(exact) >= largest + Fraction(2) ** 119  # half a step
        assert (result > 0) == (value > 0)
        return
    known = NUMBERS[Dtype.BFLOAT16]
    at = int(np.searchsorted(known, result))
    distance = abs(exact - Fraction(result))
    for other in known[max(0, at - 1) : at + 2]:
        assert distance <= abs(exact - Fraction(float(other)))


@pytest.mark.parametrize("dtype", Dtype)
def test_what_is_not_finite_and_zeros_keep_their_sign(dtype: Dtype) -> None:
    values = np.array([np.inf, -np.inf, 0.0, -0.0, 1e-320, -1e-320, 1e308, -1e308])
    with np.errstate(over="ignore"):
        result = rounded(values, dtype).astype(np.float64)
    np.testing.assert_array_equal(np.signbit(result), np.signbit(values))
    assert np.isinf(result[:2]).all()
    assert np.isnan(rounded(np.array([np.nan]), dtype).astype(np.float64)).all()


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (70_000,), (300, 300), (2, 3, 4)])
def test_any_shape_and_a_given_array(shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).standard_normal(shape)
    out = np.empty(shape, ml_dtypes.bfloat16)
    assert rounded(values, Dtype.BFLOAT16, out) is out
    np.testing.assert_array_equal(out, rounded(values, Dtype.BFLOAT16))
    assert rounded(values, Dtype.FLOAT64) is values
