"""Checks of the products: rounding, range, special values and empty sums."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from gradwire._integrity.rounding_error import gamma
from gradwire_cli.checks.bounds import worst
from gradwire_cli.checks.clients import Clients, block_rows, called
from gradwire_cli.checks.reference import (
    MOST_ROWS,
    RESULTS,
    Array,
    Products,
    differences,
    integer_products,
    integers,
    normal_products,
    rounded,
)
from gradwire_cli.checks.result import CheckResult, same_in_all
from gradwire_protocol.dtypes import Dtype


def finite_differences(
    clients: Clients, dtype: Dtype, rng: np.random.Generator
) -> Iterator[CheckResult]:
    """Compare dX and dW along random directions with differences of the loss.

    The loss L(X, W) = <dY, X W> uses the server's own Y. L is linear in X and in
    W, so the central difference (L(X + E, W) - L(X - E, W)) / 2 equals the
    derivative <dX, E> without truncation error. A step of length 1 has the
    smallest rounding error.
    """
    client = clients.messages
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
    clients: Clients, dtype: Dtype, rng: np.random.Generator
) -> Iterator[CheckResult]:
    """Compare all results for normal operands with float64 products.

    The sums are short, so the bound is tight: rounding the operands to TF32
    exceeds it many times. A second job of the same shape has other operands, and
    the results of both are compared after both have ended: a server that keeps an
    operand, a sum or the memory of a result from one job to the next is found.
    """
    jobs = [normal_products(rng, (48, 40, 56), dtype) for _ in range(2)]
    results = [
        clients.messages.gradients(*job.operands, results=RESULTS) for job in jobs
    ]
    for number, (job, got) in enumerate(zip(jobs, results, strict=True)):
        right = job.exact()
        for name, bound in job.bounds(right, got.receipt.device).items():
            error = differences(getattr(got, name), right[name])
            yield CheckResult(
                ("products", "next job")[number],
                dtype.label,
                job.shape,
                name,
                *worst(error, bound),
            )


def rounding(
    clients: Clients, dtype: Dtype, rng: np.random.Generator
) -> Iterator[CheckResult]:
    """Check that every sum is rounded once, to nearest, to every dtype of results.

    The sums are exact in the dtype of sums: numbers of the narrow dtype plus or minus
    about half a unit in the last place. So a result shows if a sum was truncated,
    rounded twice, or rounded although the job asked for a wider dtype.
    """
    sums_in = dtype.sums_in
    for to in Dtype:
        narrow = to if to.unit_roundoff > sums_in.unit_roundoff else dtype
        u = narrow.unit_roundoff
        if not narrow.is_narrow and narrow is sums_in:
            u = 2.0**-11  # No rounding: the sums are exact in both dtypes.
        step = max(2 * u, 2 * dtype.unit_roundoff)
        near = max(
            2 * dtype.unit_roundoff, 2.0 ** (-12 if sums_in.itemsize == 4 else -28)
        )
        count = 24
        numbers = 1 + rng.integers(0, min(int(0.5 / step), 2**20), count) * step
        halves = u * (1 + near * np.tile([0, 1, -1], count // 3))
        pair = np.stack([numbers, halves]).astype(dtype.numpy)
        signs = np.array([[1, 1], [1, -1]]).astype(dtype.numpy)
        for job in (
            Products(pair.T, signs, pair.T),
            Products(signs, signs[:, :1] * pair[:1], pair),
        ):
            got = called(clients.messages, job, result_dtype=to.label)
            wanted = {name: rounded(right, to) for name, right in job.exact().items()}
            names = ("y", "dx") if job.shape[0] == count else ("dw", "db")
            found = same_in_all(
                "rounding",
                job,
                {name: got[name] for name in names},
                {name: wanted[name] for name in names},
            )
            yield replace(found, result=f"as {to.label}")


def wide_accumulator(
    clients: Clients, dtype: Dtype, rng: np.random.Generator
) -> Iterator[CheckResult]:
    """Check dW with a float64 accumulator, which must be exact.

    float32 can represent the sum of these integers over one row block, but not
    over three.
    """
    client = clients.messages
    rows = block_rows(client, integer_products(rng, (1, 5, 4), dtype))
    m, largest = 3 * rows, math.isqrt(2**24 // rows)
    largest = min(largest, int(1 / dtype.unit_roundoff))
    if largest**2 * m <= 2**24 or m > MOST_ROWS:
        return
    x, dy = (
        rng.integers(largest * 4 // 5, largest + 1, size).astype(dtype.numpy)
        for size in ((m, 5), (m, 4))
    )
    job = Products(x, integers(rng, (5, 4), 3, dtype), dy)
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
    clients: Clients, dtype: Dtype, rng: np.random.Generator
) -> Iterator[CheckResult]:
    """Check that empty sums are zero and empty results have the right shape."""
    for shape in ((0, 5, 3), (5, 0, 3), (5, 3, 0)):
        job = integer_products(rng, shape, dtype)
        got = called(clients.messages, job)
        yield same_in_all("zero sizes", job, got, job.exact())


def not_finite(
    clients: Clients, dtype: Dtype, rng: np.random.Generator
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
    yield same_in_all("NaN and Inf", job, called(clients.messages, job), expected)


def overflow(
    clients: Clients, dtype: Dtype, rng: np.random.Generator
) -> Iterator[CheckResult]:
    """Check that sums beyond the dtype's largest number become Inf of their sign.

    All terms of a sum have one sign, so that it is Inf and never NaN.
    """
    huge = 2.0 ** (math.frexp(math.sqrt(dtype.largest))[1] + 1)
    m, n, k = 6, 5, 4
    rows, columns = rng.choice([-1, 1], (m, 1)), rng.choice([-1, 1], (1, k))
    x, w, dy = (
        (huge * np.broadcast_to(signs, size)).astype(dtype.numpy)
        for signs, size in ((rows, (m, n)), (columns, (n, k)), (rows * columns, (m, k)))
    )
    expected = {
        "y": np.inf * rows * columns,
        "dx": np.inf * np.broadcast_to(rows, (m, n)),
        "dw": np.inf * np.broadcast_to(columns, (n, k)),
        "db": huge * np.sum(rows) * columns[0],
    }
    job = Products(x, w, dy)
    yield same_in_all("overflow to Inf", job, called(clients.messages, job), expected)


def subnormals(
    clients: Clients, dtype: Dtype, rng: np.random.Generator
) -> Iterator[CheckResult]:
    """Check subnormal operands and results: all are exact multiples of the smallest.

    Once each operand is subnormal, and once none is, but their products are.
    """
    m, n, k = 6, 5, 4
    # 16 times the smallest: a lost element exceeds the bound of underflow.
    tiny = 16 * dtype.smallest_subnormal
    half = 2.0 ** (math.frexp(tiny)[1] // 2)
    for scales in (
        (tiny, 1, 1),
        (1, tiny, 1),
        (1, 1, tiny),
        (half, tiny / half, tiny / half),
    ):
        small = [
            integers(rng, size, 3, Dtype.FLOAT64) for size in ((m, n), (n, k), (m, k))
        ]
        job = Products(
            *((a * s).astype(dtype.numpy) for a, s in zip(small, scales, strict=True))
        )
        a, b, c = scales
        units = {"y": a * b, "dx": b * c, "dw": a * c, "db": c}
        whole = Products(*small).exact()
        expected = {
            name: rounded(whole[name] * unit, dtype) for name, unit in units.items()
        }
        # A product of two subnormals is below the smallest one: half of it is not
        # determined by an exact sum.
        names = [name for name in RESULTS if units[name] >= tiny / 2]
        got = called(clients.messages, job)
        yield same_in_all(
            "subnormals",
            job,
            {name: got[name] for name in names},
            {name: expected[name] for name in names},
        )
