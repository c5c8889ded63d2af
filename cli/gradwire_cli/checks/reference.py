"""Reference products to compare a server's results with."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from gradwire import Device
from gradwire._integrity.rounding_error import Arithmetic
from gradwire_protocol import dtypes
from gradwire_protocol.dtypes import Dtype

Array: TypeAlias = npt.NDArray[Any]
Doubles: TypeAlias = npt.NDArray[np.float64]
Results: TypeAlias = dict[str, Array]
Shape: TypeAlias = tuple[int, int, int]

RESULTS = ("y", "dx", "dw", "db")

MOST_ROWS = 1_800_000
"""Limit on rows, so that sums of `integer_products` are exact."""


class Products:
    """Operands of a job and their reference results.

    The reference results are summed in extended precision, if the platform has it.

    Args:
        x: X, shape (m, n).
        w: W, shape (n, k).
        dy: dY, shape (m, k), of the same dtype as the others.
        whole: Whether all elements are integers, and their sums exact in the dtype of
            sums.
    """

    def __init__(self, x: Array, w: Array, dy: Array, *, whole: bool = False) -> None:
        self._whole = whole
        self.x, self.w, self.dy = x, w, dy
        self.shape: Shape = (*x.shape, w.shape[1])
        self.dtype = Dtype.of(x.dtype)

    @property
    def operands(self) -> tuple[Array, Array, Array]:
        """X, W and dY."""
        return self.x, self.w, self.dy

    def exact(self) -> dict[str, Doubles]:
        """The results in float64."""
        if self._whole:
            return {name: a.astype(np.float64) for name, a in self._sums().items()}
        exact = _products(self._widened(), np.dtype(np.longdouble))
        return {name: a.astype(np.float64) for name, a in exact.items()}

    def expected(self) -> Results:
        """The results of integers, rounded once to the dtype of the operands."""
        with np.errstate(over="ignore"):
            return {
                name: dtypes.rounded(a, self.dtype) for name, a in self._sums().items()
            }

    def _sums(self) -> Results:
        if not self._whole:
            raise ValueError("only sums of integers are exact in the dtype of sums")
        return _products(self.operands, self.dtype.sums_in.numpy)

    def bounds(
        self, exact: dict[str, Doubles], device: Device | None = None
    ) -> dict[str, Doubles]:
        """Bound on the error of each element of each result.

        Args:
            exact: The result of `exact`.
            device: The device that computed, without TF32. None: a device that rounds
                every addition to nearest.
        """

        def arithmetic(length: int) -> Arithmetic:
            if device is None:
                return Arithmetic(self.dtype, self.dtype, length)
            return Arithmetic.of_device(
                device, self.dtype, self.dtype, length, tf32=False
            )

        m, n, k = self.shape
        magnitudes = _products(map(np.abs, self._widened()), np.dtype(np.longdouble))
        lengths = {"y": n, "dx": k, "dw": m, "db": m}
        return {
            name: arithmetic(length).bound(exact[name], magnitudes[name], length)
            for name, length in lengths.items()
        }

    def _widened(self) -> list[Doubles]:
        return [a.astype(np.float64) for a in self.operands]


def normal_products(rng: np.random.Generator, shape: Shape, dtype: Dtype) -> Products:
    """A job with normally distributed operands."""
    m, n, k = shape
    sizes = ((m, n), (n, k), (m, k))
    return Products(*(rng.standard_normal(size).astype(dtype.numpy) for size in sizes))


def integer_products(rng: np.random.Generator, shape: Shape, dtype: Dtype) -> Products:
    """A job with integers so small that sums of their products are exact.

    The dtype of the sums represents every sum of them exactly, so every order of
    summation gives the same sum. They are as large as possible, at most
    `_LARGEST_INTEGER`: so sums of float64 are too large for float32.
    """
    m, n, k = shape
    digits = 1 / dtype.sums_in.unit_roundoff
    largest = math.isqrt(int(digits) // max(m, n, k, 1))
    largest = max(3, min(largest, _LARGEST_INTEGER[dtype]))
    sizes = ((m, n), (n, k), (m, k))
    return Products(
        *(integers(rng, size, largest, dtype) for size in sizes), whole=True
    )


_LARGEST_INTEGER = {
    Dtype.FLOAT16: 15,
    Dtype.BFLOAT16: 15,
    Dtype.FLOAT32: 127,
    Dtype.FLOAT64: 2**17 - 1,
}
"""Largest integers of `integer_products`. They are small for 16-bit dtypes, so that
sums of float16 do not overflow."""


def integers(
    rng: np.random.Generator, size: tuple[int, int], largest: int, dtype: Dtype
) -> Array:
    """Random integers from -largest to largest."""
    kind = np.int8 if largest < 128 else np.int32
    drawn = rng.integers(-largest, largest + 1, size, dtype=kind)
    if dtype is Dtype.BFLOAT16:  # much faster than from int8
        return drawn.astype(np.float32).astype(dtype.numpy)
    return drawn.astype(dtype.numpy)


def weighted_sums(
    rng: np.random.Generator, job: Products, results: Results
) -> tuple[Results, Results]:
    """Return exact weighted sums of the columns of results, one for each row.

    The weights are random integers from -255 to 255. Only dB is whole.

    Args:
        rng: Source of the weights.
        job: A job of `integer_products`, of float32 or float64.
        results: Its results.

    Returns:
        The sums as they should be, and those of `results`.
    """
    _, n, k = job.shape
    by_n, by_k = (rng.integers(-255, 256, size).astype(np.float64) for size in (n, k))
    x, w, dy = job.operands

    def sums(a: Array, weights: Doubles) -> Doubles:
        return np.asarray(np.einsum("ij,j->i", a, weights), np.float64)

    right = {
        "y": sums(x, sums(w, by_k)),
        "dx": sums(dy, sums(w.T, by_n)),
        "dw": sums(x.T, sums(dy, by_k)),
        "db": np.einsum("mk->k", dy.astype(np.float64)),
    }
    found = {
        "y": sums(results["y"], by_k),
        "dx": sums(results["dx"], by_n),
        "dw": sums(results["dw"], by_k),
        "db": results["db"],
    }
    return right, found


def rounded(exact: Doubles, dtype: Dtype) -> Doubles:
    """`exact` rounded to `dtype`; Inf for values that are too large."""
    with np.errstate(over="ignore"):
        return dtypes.rounded(exact, dtype).astype(np.float64)


def differences(result: Array, expected: Doubles) -> Doubles:
    """|result - expected|, and 0 for equal Inf or both NaN."""
    found = result.astype(np.float64)
    with np.errstate(invalid="ignore"):
        return np.where(_same(found, expected), 0.0, np.abs(found - expected))


def count_different(results: Results, expected: dict[str, Doubles]) -> int:
    """The number of wrong elements; all elements of a result of a wrong shape."""
    return sum(
        int(np.count_nonzero(~_same(results[name].astype(np.float64), right)))
        if results[name].shape == right.shape
        else max(right.size, 1)
        for name, right in expected.items()
    )


def _same(a: Doubles, b: Doubles) -> npt.NDArray[np.bool_]:
    same: npt.NDArray[np.bool_] = (a == b) | (np.isnan(a) & np.isnan(b))
    return same


def _products(operands: Iterable[Array], dtype: np.dtype[Any]) -> Results:
    # Never with BLAS: a server on this machine may use the same BLAS.
    x, w, dy = (a.astype(dtype, copy=False) for a in operands)
    return {
        "y": np.einsum("mn,nk->mk", x, w),
        "dx": np.einsum("mk,nk->mn", dy, w),
        "dw": np.einsum("mn,mk->nk", x, dy),
        "db": np.einsum("mk->k", dy),
    }
