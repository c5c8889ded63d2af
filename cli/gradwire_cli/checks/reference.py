"""Reference products to compare a server's results with."""

from __future__ import annotations

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


class Products:
    """Operands of a job and their reference results.

    Args:
        x: X, shape (m, n).
        w: W, shape (n, k).
        dy: dY, shape (m, k), of the same dtype as the others.
    """

    def __init__(self, x: Array, w: Array, dy: Array) -> None:
        self.x, self.w, self.dy = x, w, dy
        self.shape: Shape = (*x.shape, w.shape[1])
        self.dtype = Dtype.of(x.dtype)

    @property
    def operands(self) -> tuple[Array, Array, Array]:
        """X, W and dY."""
        return self.x, self.w, self.dy

    def exact(self) -> dict[str, Doubles]:
        """The results in float64."""
        return _products(*self._widened())

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
        magnitudes = _products(*(np.abs(a) for a in self._widened()))
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
    """A job with integers from -3 to 3.

    Sums of up to 1.8 million of their products are integers below 2**24. float32
    represents them exactly, so every order of summation gives the same sum.
    """
    m, n, k = shape
    sizes = ((m, n), (n, k), (m, k))
    integers = (rng.integers(-3, 4, size, dtype=np.int8) for size in sizes)
    return Products(*(a.astype(dtype.numpy) for a in integers))


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


def _products(x: Array, w: Array, dy: Array) -> dict[str, Doubles]:
    # In extended precision if available, and never with BLAS: a server on this
    # machine may use the same BLAS.
    x, w, dy = (a.astype(np.longdouble) for a in (x, w, dy))
    products = {
        "y": np.einsum("mn,nk->mk", x, w),
        "dx": np.einsum("mk,nk->mn", dy, w),
        "dw": np.einsum("mn,mk->nk", x, dy),
        "db": np.einsum("mk->k", dy),
    }
    return {name: a.astype(np.float64) for name, a in products.items()}
