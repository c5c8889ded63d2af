"""What results must be, and how far from it arithmetic allows them to be.

A sum of L products in arithmetic of unit roundoff u, in any order, is off by
at most gamma(L) = L u / (1 - L u) times the sum of the products' magnitudes
(Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section
3.1). Rounding the sum to the result's dtype adds its unit roundoff times the
result, and half its smallest subnormal; each product that underflows adds half
the smallest subnormal of the sum's dtype (chapter 2, (2.8)).

The tensor cores of a GPU, which take 16-bit operands, truncate where others
round: b >= 4 products and the sum so far are aligned to the largest of them,
each losing less than 2 u of it, and so does what they add up to (Fasi, Higham,
Mikaitis and Pranesh, Numerical behavior of NVIDIA tensor cores, PeerJ Computer
Science 7:e330, 2021). That is (b + 2) / b times 2 u for each product at most.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from gradwire_protocol.dtypes import Dtype
from tests.support.serving import BACKEND

DTYPES = tuple(dtype.label for dtype in Dtype)


def numpy_dtype(label: str) -> np.dtype[Any]:
    return Dtype.named(label).numpy


def operands(
    m: int, n: int, k: int, dtype: str = "float32", seed: int = 0
) -> tuple[Any, Any, Any]:
    """Random x, w and dy."""
    rng = np.random.default_rng([seed, m, n, k])
    shapes = ((m, n), (n, k), (m, k))
    return tuple(rng.standard_normal(s).astype(numpy_dtype(dtype)) for s in shapes)


def exact(x: Any, w: Any, dy: Any) -> dict[str, Any]:
    """Y, dX, dW and db in float64, of operands in any layout."""
    x, w, dy = (np.asarray(a, dtype=np.float64) for a in (x, w, dy))
    return {"y": x @ w, "dx": dy @ w.T, "dw": x.T @ dy, "db": dy.sum(axis=0)}


def bounds(
    x: Any,
    w: Any,
    dy: Any,
    dtype: str,
    result_dtype: str | None = None,
    backend: str = BACKEND,
) -> dict[str, Any]:
    """How far each element of a backend's result may be from the exact one."""
    magnitudes = exact(*(np.abs(np.asarray(a, dtype=np.float64)) for a in (x, w, dy)))
    lengths = {"y": w.shape[0], "dx": w.shape[1], "dw": x.shape[0]}
    lengths["db"] = x.shape[0]
    sums_in = Dtype.named(dtype).sums_in.numpy
    result = ml_dtypes.finfo(numpy_dtype(result_dtype or dtype))
    allowed = {}
    for name, magnitude in magnitudes.items():
        u = float(ml_dtypes.finfo(sums_in).eps) / 2
        if backend == "cupy" and numpy_dtype(dtype).itemsize == 2:
            u *= 2 * (4 + 2) / 4
        gamma = lengths[name] * u / (1 - lengths[name] * u)
        rounding = float(result.eps) / 2
        tiny = float(result.smallest_subnormal)
        tiny += lengths[name] * float(ml_dtypes.finfo(sums_in).smallest_subnormal)
        allowed[name] = (gamma * (1 + rounding) + rounding) * magnitude + tiny
    return allowed


def assert_right(
    result: Any,
    x: Any,
    w: Any,
    dy: Any,
    dtype: str,
    result_dtype: str | None = None,
    backend: str = BACKEND,
) -> None:
    """Every result that is there is right, element by element."""
    expected = exact(x, w, dy)
    allowed = bounds(x, w, dy, dtype, result_dtype, backend)
    for name in ("y", "dx", "dw", "db"):
        actual = getattr(result, name, None)
        if actual is None:
            continue
        assert actual.dtype == numpy_dtype(result_dtype or dtype)
        assert actual.shape == expected[name].shape
        error = np.abs(actual.astype(np.float64) - expected[name])
        assert (error <= allowed[name]).all(), (
            f"{name} is off by {np.max(error / allowed[name]):.3g} times the bound"
        )


def same_bits(one: Any, other: Any) -> bool:
    """Whether two arrays hold the same elements, bit for bit."""
    return (
        one.shape == other.shape
        and one.dtype == other.dtype
        and one.tobytes() == other.tobytes()
    )
