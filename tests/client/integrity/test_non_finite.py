"""NaN, Inf and overflow in dW of a stream: no false alarm, and nothing is swallowed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gradwire._api.verify import Verify
from gradwire._integrity.freivalds import Wrong
from gradwire._integrity.product_checks import ColumnSums, RowProduct, SumProduct
from gradwire._integrity.random_sums import RandomSums
from gradwire._integrity.rounding_error import Arithmetic
from gradwire_protocol.dtypes import Dtype, rounded


def scaled_too_far(rng: Any, x: Any, dy: Any, largest: float) -> None:
    """As GradScaler tries it: a loss scale of which some gradients overflow."""
    dy *= largest / np.abs(dy).max() / rng.uniform(2, 50)


def overflowing(rng: Any, x: Any, dy: Any, largest: float) -> None:
    r, i, j = (rng.integers(size) for size in (len(x), x.shape[1], dy.shape[1]))
    x[r, i] = largest**0.5 * rng.uniform(2, 40)
    dy[r, j] = largest**0.5 * rng.uniform(2, 40)


def large_x(rng: Any, x: Any, dy: Any, largest: float) -> None:
    x[rng.integers(len(x)), rng.integers(x.shape[1])] = largest * rng.uniform(0.1, 1)


def large_dy(rng: Any, x: Any, dy: Any, largest: float) -> None:
    dy[rng.integers(len(x)), rng.integers(dy.shape[1])] = largest * rng.uniform(0.1, 1)


def mostly_zeros(rng: Any, x: Any, dy: Any, largest: float) -> None:
    x *= rng.random(x.shape) < 0.05
    dy *= rng.random(dy.shape) < 0.05
    r = rng.integers(len(x))
    x[r, rng.integers(x.shape[1])] = dy[r, rng.integers(dy.shape[1])] = largest * 0.9


def put(value: float, into: int) -> Any:
    def put_into(rng: Any, x: Any, dy: Any, largest: float) -> None:
        array = (x, dy)[into]
        array[rng.integers(len(array)), rng.integers(array.shape[1])] = value

    return put_into


KINDS = {
    "ordinary": lambda *_: None,
    "loss scale": scaled_too_far,
    "overflow": overflowing,
    "large x": large_x,
    "large dy": large_dy,
    "mostly zeros": mostly_zeros,
    "Inf in x": put(np.inf, 0),
    "NaN in x": put(np.nan, 0),
    "Inf in dy": put(np.inf, 1),
    "NaN in dy": put(np.nan, 1),
}


def verdict(sums: SumProduct, dw: Any, arithmetic: Arithmetic) -> bool:
    """Whether a stream's dW is called wrong."""
    if sums.misplaced(dw, arithmetic) is not None:
        return True
    return bool(sums.suspects(dw, arithmetic)[0].certain.any())


def alarms(kind: str, dtype: Dtype, seed: int) -> tuple[bool, bool | None]:
    """Whether a right dW is called wrong, and one with 0 for all that is not finite."""
    rng = np.random.default_rng([seed, *kind.encode()])
    m, n, k = (int(rng.integers(1, most)) for most in (300, 80, 80))
    scale = 10.0 ** rng.integers(-2, 3)
    with np.errstate(all="ignore"):
        x, dy = (rng.standard_normal((m, size)) * scale for size in (n, k))
        KINDS[kind](rng, x, dy, dtype.largest)
        wide = dtype.sums_in.numpy
        x, dy = (rounded(v, dtype).astype(wide) for v in (x, dy))
        block = int(2 ** rng.integers(2, 8))
        total = np.zeros((n, k), wide)
        for first in range(0, m, block):
            total += x[first : first + block].T @ dy[first : first + block]
        dw = rounded(total, dtype)
        verify = Verify()
        groups = verify.groups_for(k, dtype)
        sums = SumProduct(
            n, RandomSums(k, verify.rounds, groups, m, dtype=wide, rng=rng)
        )
        step = int(rng.integers(1, m + 1))
        for first in range(0, m, step):
            sums.add(x[first : first + step], dy[first : first + step])
        arithmetic = Arithmetic(dtype, dtype, min(m, block) + -(-m // block))
        right = verdict(sums, dw, arithmetic)
        lost = ~np.isfinite(dw)
        if not lost.any():
            return right, None
        return right, verdict(sums, np.where(lost, 0, dw), arithmetic)


@pytest.mark.parametrize(
    "seeds",
    [
        pytest.param(range(10), id="400 jobs"),
        pytest.param(range(10, 170), id="6400 jobs", marks=pytest.mark.big),
    ],
)
def test_no_false_alarm_and_nothing_swallowed(seeds: range) -> None:
    found = {
        (kind, dtype.label, seed): alarms(kind, dtype, seed)
        for kind in KINDS
        for dtype in Dtype
        for seed in seeds
    }
    assert [job for job, (right, _) in found.items() if right] == []
    assert [job for job, (_, lost) in found.items() if lost is False] == []
    assert sum(lost is not None for _, lost in found.values()) > 20 * len(seeds)


@pytest.mark.parametrize("dtype", Dtype)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_no_row_of_y_may_lose_nan_or_inf(dtype: Dtype, value: float) -> None:
    """Whichever row, also beyond those that are computed again at most."""
    rng = np.random.default_rng(0)
    wide = dtype.sums_in.numpy
    a, b = rng.standard_normal((40, 20)), rng.standard_normal((20, 30))
    a[:, 3], b[5, 7] = value, value
    with np.errstate(all="ignore"):
        a, b = (rounded(v, dtype).astype(wide) for v in (a, b))
        c = rounded(a @ b, dtype)
        sums = RandomSums(30, 2, 8, 20, dtype=wide, rng=rng)
        product, arithmetic = RowProduct(b, sums), Arithmetic(dtype, dtype, 20)
        assert product.wrong(a, c, arithmetic) is None
        c[33, 11] = 1.5
        wrong = product.wrong(a, c, arithmetic)
    assert wrong is not None
    assert (wrong.row, wrong.column, wrong.value) == (33, 11, 1.5)
    assert np.isnan(wrong.exact)


@pytest.mark.parametrize("dtype", Dtype)
def test_inf_for_no_reason_is_wrong(dtype: Dtype) -> None:
    rng = np.random.default_rng(0)
    wide = dtype.sums_in.numpy
    a, b = rng.standard_normal((4, 20)), rng.standard_normal((20, 30))
    a, b = (rounded(v, dtype).astype(wide) for v in (a, b))
    c = rounded(a @ b, dtype)
    c[2, 5] = np.inf
    with np.errstate(all="ignore"):
        sums = RandomSums(30, 2, 8, 20, dtype=wide, rng=rng)
        wrong = RowProduct(b, sums).wrong(a, c, Arithmetic(dtype, dtype, 20))
    assert wrong == Wrong(2, 5, np.inf, 0.0, np.inf)


@pytest.mark.parametrize("dtype", Dtype)
def test_column_sums_may_not_lose_nan_or_inf(dtype: Dtype) -> None:
    rows = np.ones((5, 3), dtype.numpy)
    rows[2, 1] = np.nan
    sums = ColumnSums(3)
    with np.errstate(all="ignore"):
        sums.add(rows)
        arithmetic = Arithmetic(dtype, dtype, 5)
        right = np.array([5, np.nan, 5], dtype.numpy)
        assert sums.wrong(right, arithmetic) is None
        lost = sums.wrong(np.array([5, 5, 5], dtype.numpy), arithmetic)
    assert lost is not None
    assert lost.column == 1
