"""Checks that a server computes correctly.

Each check compares the server's results with finite differences, with local
float64 products, or with exact values. This module does not print.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from gradwire import CallError, Client, ProtocolError, Receipt, UnavailableError
from gradwire._integrity.rounding_error import gamma
from gradwire_cli.checks.bounds import worst
from gradwire_cli.checks.reference import (
    RESULTS,
    Array,
    Products,
    Results,
    Shape,
    count_different,
    differences,
    integer_products,
    normal_products,
    rounded,
)
from gradwire_protocol.dtypes import Dtype


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The outcome of one check for one result."""

    check: str
    dtype: str
    shape: Shape | None
    """m, n and k."""

    result: str
    """``y``, ``dx``, ``dw`` or ``db``; ``all`` for all results together."""

    error: float
    """Error of the element with the largest ratio of error to bound, or, for an
    exact check, the number of wrong elements."""

    bound: float
    """Bound on the error."""

    note: str = ""
    """Why the check could not run; empty if it ran."""

    @property
    def passed(self) -> bool:
        """Whether the check ran and the error is within the bound."""
        return not self.note and self.error <= self.bound


Check: TypeAlias = Callable[[Client, Dtype, np.random.Generator], Iterator[CheckResult]]


def run_checks(
    client: Client, offered: Collection[Dtype], seed: int
) -> Iterator[CheckResult]:
    """Run all checks and yield their results.

    A job that the server fails or refuses, or that breaks the contract, is a
    result, too.

    Args:
        client: Client of the server to check.
        offered: Dtypes that the server computes with.
        seed: Seed of the random operands.

    Raises:
        GradwireError: The server is unreachable or about to stop.
    """
    for name, (check, dtypes) in CHECKS.items():
        for dtype in dtypes:
            if dtype not in offered:
                continue
            rng = np.random.default_rng([seed, dtype])
            try:
                yield from check(client, dtype, rng)
            except UnavailableError:
                raise
            except (CallError, ProtocolError) as error:
                yield CheckResult(
                    name, dtype.label, None, "all", math.inf, 0, str(error)
                )


def finite_differences(
    client: Client, dtype: Dtype, rng: np.random.Generator
) -> Iterator[CheckResult]:
    """Compare dX and dW along random directions with differences of the loss.

    The loss L(X, W) = <dY, X W> uses the server's own Y. L is linear in X and in
    W, so the central difference (L(X + E, W) - L(X - E, W)) / 2 equals the
    derivative <dX, E> without truncation error. A step of length 1 has the
    smallest rounding error.
    """
    job = normal_products(rng, (37, 29, 23), dtype)
    (x, w, dy), (m, n, k) = job.operands, job.shape
    gradients = client.gradients(x, w, dy, results=("dx", "dw"))
    u = dtype.unit_roundoff

    def loss(x: Array, w: Array) -> tuple[float, float]:
        """L, and a bound on its rounding error."""
        y = client.gradients(x, w, None, results=("y",)).y
        # Rounding errors: the shifted operand, n terms of each element of Y, their
        # products with dY, and the final sum, rounded once by fsum.
        size = float(np.sum(np.abs(dy) * (np.abs(x) @ np.abs(w))))
        return math.fsum((dy * y).flat), gamma(n + 3, u) * size

    for name, gradient, operand, magnitude, length in (
        ("dx", gradients.dx, x, np.abs(dy) @ np.abs(w).T, k),
        ("dw", gradients.dw, w, np.abs(x).T @ np.abs(dy), m),
    ):
        errors, bounds = [], []
        for _ in range(3):
            step = rng.standard_normal(operand.shape)
            ends = [
                loss(operand + h, w) if operand is x else loss(x, operand + h)
                for h in (step, -step)
            ]
            difference = (ends[0][0] - ends[1][0]) / 2
            along = math.fsum((gradient * step).flat)
            errors.append(abs(along - difference))
            bounds.append(
                (ends[0][1] + ends[1][1]) / 2
                + gamma(length + 3, u) * float(np.sum(magnitude * np.abs(step)))
            )
        yield CheckResult(
            "finite differences",
            dtype.label,
            job.shape,
            name,
            *worst(np.array(errors), np.array(bounds)),
        )


def products(
    client: Client, dtype: Dtype, rng: np.random.Generator
) -> Iterator[CheckResult]:
    """Compare all results for normal operands with float64 products.

    The sums are short, so the bound is tight: rounding the operands to TF32
    exceeds it many times.
    """
    job = normal_products(rng, (48, 40, 56), dtype)
    results = client.gradients(*job.operands, results=RESULTS)
    called = {name: getattr(results, name) for name in RESULTS}
    exact = job.exact()
    for name, bound in job.bounds(exact, results.receipt.device).items():
        error = differences(called[name], exact[name])
        yield CheckResult(
            "products", dtype.label, job.shape, name, *worst(error, bound)
        )


def same_bits(
    client: Client, dtype: Dtype, rng: np.random.Generator
) -> Iterator[CheckResult]:
    """Run one job as a call and as a stream: every bit must be equal."""
    job = normal_products(rng, (48, 40, 56), dtype)
    called = _called(client, job)
    streamed, _ = _streamed(client, job, rows_at_once=11)
    same = {name: result.astype(np.float64) for name, result in called.items()}
    yield _count("call = stream", job, streamed, same)


def row_blocks(
    client: Client, dtype: Dtype, rng: np.random.Generator
) -> Iterator[CheckResult]:
    """Check integer results over several row blocks, which must be exact."""
    few = integer_products(rng, (9, 7, 5), dtype)
    rows = _streamed(client, few, rows_at_once=9)[1].block_rows
    m = min(max(2 * rows + rows // 3 + 1, 999), _MOST_ROWS)
    job = integer_products(rng, (m, 7, 5), dtype)
    streamed, _ = _streamed(client, job, rows_at_once=m // 7 + 1)
    yield from _exactly("row blocks", job, streamed)


def long_rows(
    client: Client, dtype: Dtype, rng: np.random.Generator
) -> Iterator[CheckResult]:
    """Check integer results with rows of X larger than a stream message."""
    job = integer_products(rng, (9, 300_001, 2), dtype)
    streamed, _ = _streamed(client, job, rows_at_once=2)
    yield from _exactly("long rows", job, streamed)


def wide_accumulator(
    client: Client, dtype: Dtype, rng: np.random.Generator
) -> Iterator[CheckResult]:
    """Check dW with a float64 accumulator, which must be exact.

    float32 can represent the sum of these integers over one row block, but not
    over three.
    """
    few = integer_products(rng, (9, 7, 5), dtype)
    rows = _streamed(client, few, rows_at_once=9)[1].block_rows
    m, largest = 3 * rows, math.isqrt(2**24 // rows)
    if m > _MOST_ROWS:
        return
    x, dy = (
        rng.integers(largest * 4 // 5, largest + 1, size).astype(dtype.numpy)
        for size in ((m, 7), (m, 5))
    )
    job = Products(x, few.w, dy)
    got = client.gradients(
        x,
        None,
        dy,
        results=("dw",),
        dw_accumulator="float64",
        result_dtype={"dw": "float64"},
    )
    error = differences(got.dw, job.exact()["dw"])
    yield CheckResult(
        "float64 sum", dtype.label, job.shape, "dw", *worst(error, np.zeros(()))
    )


def zero_sizes(
    client: Client, dtype: Dtype, rng: np.random.Generator
) -> Iterator[CheckResult]:
    """Check that empty sums are zero and empty results have the right shape."""
    for shape in ((0, 5, 3), (5, 0, 3), (5, 3, 0)):
        job = integer_products(rng, shape, dtype)
        yield _count("zero sizes", job, _called(client, job), job.exact())


def not_finite(
    client: Client, dtype: Dtype, rng: np.random.Generator
) -> Iterator[CheckResult]:
    """Check that NaN and Inf propagate as in IEEE 754, and no further."""
    # No zeros: a library may skip them, although 0 times Inf is NaN.
    x, w, dy = (
        (rng.integers(1, 4, size) * rng.choice([-1, 1], size)).astype(dtype.numpy)
        for size in ((6, 5), (5, 4), (6, 4))
    )
    x[1, 2], x[3, 0], w[2, 1], dy[4, 3] = math.nan, math.inf, -math.inf, math.nan
    job = Products(x, w, dy)
    a, b, c = (operand.astype(np.float64) for operand in job.operands)
    with np.errstate(invalid="ignore"):
        # Element by element, not by BLAS: a server may use the same BLAS.
        expected = {
            "y": np.sum(a[:, :, None] * b[None], axis=1),
            "dx": np.sum(c[:, :, None] * b.T[None], axis=1),
            "dw": np.sum(a.T[:, :, None] * c[None], axis=1),
            "db": np.sum(c, axis=0),
        }
    yield _count("NaN and Inf", job, _called(client, job), expected)


def overflow(
    client: Client, dtype: Dtype, rng: np.random.Generator
) -> Iterator[CheckResult]:
    """Check that sums beyond the dtype's largest number become Inf of their sign."""
    x, w, dy = (
        (_HUGE * rng.choice([-1, 1], size)).astype(dtype.numpy)
        for size in ((6, 5), (5, 4), (6, 4))
    )
    job = Products(x, w, dy)
    expected = {name: rounded(right, dtype) for name, right in job.exact().items()}
    yield _count("overflow to Inf", job, _called(client, job), expected)


_HUGE = 300
"""Magnitude of the operands of `overflow`: its square is no float16."""

CHECKS: dict[str, tuple[Check, tuple[Dtype, ...]]] = {
    "finite differences": (finite_differences, (Dtype.FLOAT64,)),
    "products": (products, tuple(Dtype)),
    "call = stream": (same_bits, tuple(Dtype)),
    "row blocks": (row_blocks, tuple(Dtype)),
    "long rows": (long_rows, tuple(Dtype)),
    "float64 sum": (wide_accumulator, (Dtype.FLOAT32,)),
    "zero sizes": (zero_sizes, tuple(Dtype)),
    "NaN and Inf": (not_finite, tuple(Dtype)),
    "overflow to Inf": (
        overflow,
        tuple(dtype for dtype in Dtype if dtype.largest < _HUGE**2),
    ),
}
"""Every check and its dtypes."""

_MOST_ROWS = 1_800_000
"""Limit on rows, so that `integer_products` stay exact."""


def _called(client: Client, job: Products) -> Results:
    results = client.gradients(*job.operands, results=RESULTS)
    return {name: getattr(results, name) for name in RESULTS}


def _streamed(
    client: Client, job: Products, *, rows_at_once: int
) -> tuple[Results, Receipt]:
    """Run the job as a stream of unknown length."""
    (x, w, dy), (m, n, k) = job.operands, job.shape
    # Missing elements stay NaN, so the comparison fails.
    results = {
        "y": np.full((m, k), np.nan, x.dtype),
        "dx": np.full((m, n), np.nan, x.dtype),
    }
    rows = (
        (x[first : first + rows_at_once], dy[first : first + rows_at_once])
        for first in range(0, m, rows_at_once)
    )
    with client.stream(rows, w, results=RESULTS) as stream:
        for block in stream:
            here = slice(block.first_row, block.first_row + len(block))
            results["y"][here] = block.y
            results["dx"][here] = block.dx
        sums = {"dw": stream.dw, "db": stream.db}
    for name, array in sums.items():
        if array is None:
            raise TypeError(f"an exhausted stream has {name} if it was requested")
        results[name] = array
    return results, stream.receipt


def _exactly(check: str, job: Products, got: Results) -> Iterator[CheckResult]:
    for name, exact in job.exact().items():
        error = differences(got[name], rounded(exact, job.dtype))
        yield CheckResult(
            check, job.dtype.label, job.shape, name, *worst(error, np.zeros(()))
        )


def _count(
    check: str, job: Products, got: Results, expected: dict[str, Array]
) -> CheckResult:
    wrong = count_different(got, expected)
    return CheckResult(check, job.dtype.label, job.shape, "all", wrong, 0)
