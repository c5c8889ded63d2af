"""The benchmark's work: shapes, operands, and a check of results."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]

FORMS = ("fresh", "reused")
"""Results in new arrays, or in the arrays of the previous call."""

PRODUCTS_VARIABLE = "BENCH_PRODUCTS"
"""Environment variable; "none": servers compute nothing, so that a call takes as long
as its transport. Results are then whatever is in memory."""

COMPUTES = os.environ.get(PRODUCTS_VARIABLE) != "none"


@dataclass(frozen=True, slots=True, order=True)
class Shape:
    """X is (m, n), W is (n, k), dY is (m, k)."""

    m: int
    n: int
    k: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Parse ``MxNxK``, or a single number for a cube.

        Raises:
            ValueError: The text is neither.
        """
        sizes = [int(part) for part in text.split("x")]
        if len(sizes) == 1:
            sizes *= 3
        if len(sizes) != 3 or min(sizes) < 1:
            raise ValueError(f"a shape is MxNxK or one number, not {text!r}")
        return cls(*sizes)

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k}"

    @property
    def label(self) -> str:
        """The shape for people: a cube by its side."""
        return f"{self.m}³" if self.m == self.n == self.k else str(self)

    @property
    def operations(self) -> int:
        """Multiplications and additions of the three products."""
        return 6 * self.m * self.n * self.k

    @property
    def bytes_each_way(self) -> int:
        """Bytes of the operands, and of the results, in float32."""
        return 4 * (self.m * self.n + self.n * self.k + self.m * self.k)


def operands(shape: Shape, seed: int = 7) -> tuple[Array, Array, Array]:
    """X, W and dY: float32, standard normal, the same in every process."""
    rng = np.random.default_rng(seed)
    return (
        rng.standard_normal((shape.m, shape.n), dtype=np.float32),
        rng.standard_normal((shape.n, shape.k), dtype=np.float32),
        rng.standard_normal((shape.m, shape.k), dtype=np.float32),
    )


def empty_results(x: Array, w: Array, dy: Array) -> tuple[Array, Array, Array]:
    """Uninitialised arrays for Y, dX and dW."""
    return (
        np.empty((x.shape[0], w.shape[1]), x.dtype),
        np.empty(x.shape, x.dtype),
        np.empty((x.shape[1], dy.shape[1]), x.dtype),
    )


@functools.lru_cache(maxsize=1)
def unset_results(m: int, n: int, k: int) -> tuple[Array, Array, Array]:
    """Arrays that a server which computes nothing sends as Y, dX and dW.

    They have been written: pages that never were are all the same page of zeros, which
    the processor's cache holds, so that sending them would cost less.
    """
    shapes = ((m, k), (m, n), (n, k))
    y, dx, dw = (np.ones(shape, np.float32) for shape in shapes)
    return y, dx, dw


def copied(
    arrays: tuple[Array, Array, Array], into: tuple[Array, Array, Array]
) -> tuple[Array, Array, Array]:
    """Copy three arrays into three others, and return the copies."""
    for theirs, ours in zip(arrays, into, strict=True):
        np.copyto(ours, theirs)
    return into


def products(
    x: Array, w: Array, dy: Array, out: tuple[Array, Array, Array] | None = None
) -> tuple[Array, Array, Array]:
    """Y = X W, dX = dY Wᵀ and dW = Xᵀ dY with NumPy, in new arrays or in `out`.

    Contenders without their own products use this function. Without `COMPUTES` it
    returns the same arrays in every call.
    """
    if not COMPUTES:
        return out or unset_results(*x.shape, w.shape[1])
    y, dx, dw = out or (None, None, None)
    return (
        np.matmul(x, w, out=y),
        np.matmul(dy, w.T, out=dx),
        np.matmul(x.T, dy, out=dw),
    )


def worst_error(
    given: tuple[Array, Array, Array], results: tuple[Array, Array, Array]
) -> float:
    """Largest relative error of the three results along a random direction.

    Compares Y r with X (W r), and so on, in float64. Products with a vector are
    cheap, so the check suits large results.
    """
    x, w, dy = given
    y, dx, dw = results
    rng = np.random.default_rng(11)
    errors = []
    for result, left, right in ((y, x, w), (dx, dy, w.T), (dw, x.T, dy)):
        if result.shape != (left.shape[0], right.shape[1]):
            return float("inf")
        direction = rng.standard_normal(right.shape[1])
        expected = left @ (right @ direction)
        actual = result @ direction
        errors.append(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
    return float(max(errors))
