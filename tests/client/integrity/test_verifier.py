"""What `verify=` finds and what it lets pass, counted over fixed seeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from gradwire._api.verify import Verify
from gradwire._integrity.freivalds import compare, row_norms
from gradwire._integrity.product_checks import RowProduct, SumProduct
from gradwire._integrity.random_sums import RandomSums
from gradwire._integrity.rounding_error import Arithmetic
from gradwire_protocol.dtypes import Dtype

ROWS = 4


@dataclass
class Product:
    """C = A B as a server computes it, with each element's rounding bound."""

    a: Any
    b: Any
    c: Any
    exact: Any
    typical: Any
    """Of each row: the root of the mean of the squares of its bounds."""
    arithmetic: Arithmetic

    @classmethod
    def of(cls, a: Any, b: Any, dtype: Dtype) -> Product:
        sums = dtype.sums_in.numpy
        a, b = (v.astype(dtype.numpy).astype(sums) for v in (a, b))
        c = (a @ b).astype(dtype.numpy)
        exact = a.astype(np.float64) @ b.astype(np.float64)
        magnitude = np.abs(a).astype(np.float64) @ np.abs(b).astype(np.float64)
        arithmetic = Arithmetic(dtype, dtype, a.shape[1])
        bound = arithmetic.bound(exact, magnitude, a.shape[1])
        typical = np.sqrt(np.mean(bound**2, axis=1))
        return cls(a, b, c, exact, typical, arithmetic)

    def random_sums(self, verify: Verify, seed: int) -> RandomSums:
        length, columns = self.b.shape
        return RandomSums(
            columns,
            verify.rounds,
            verify.groups_for(columns, Dtype.of(self.c.dtype)),
            length,
            dtype=self.b.dtype,
            rng=np.random.default_rng(seed),
        )

    def found(self, c: Any, seed: int, verify: Verify = Verify()) -> Any:  # noqa: B008
        with np.errstate(all="ignore"):  # as while a client verifies
            checked = RowProduct(self.b, self.random_sums(verify, seed))
            return checked.wrong(self.a, c, self.arithmetic)


def drawn(kind: str, length: int, columns: int, dtype: Dtype) -> Product:
    rng = np.random.default_rng([length, columns])
    draw = rng.standard_normal if kind == "normal" else rng.random
    return Product.of(draw((ROWS, length)), draw((length, columns)), dtype)


SIZES = [(1024, 1024), (256, 256), (64, 1024), (1024, 64)]


@pytest.mark.parametrize("kind", ["normal", "positive"])
@pytest.mark.parametrize("dtype", list(Dtype), ids=lambda dtype: dtype.label)
@pytest.mark.parametrize(("length", "columns"), SIZES)
def test_one_element_that_is_off_by_16_rounding_bounds_is_found(
    length: int, columns: int, dtype: Dtype, kind: str
) -> None:
    """Every time, and neither beside others nor next to one's own rounding."""
    product = drawn(kind, length, columns, dtype)
    rng = np.random.default_rng(7)
    for seed in range(10):
        row, column = rng.integers(ROWS), rng.integers(columns)
        wrong = product.c.copy()
        off = rng.choice([-1, 1]) * 16.5 * product.typical[row]
        wrong[row, column] = product.exact[row, column] + off
        found = product.found(wrong, seed)
        assert found is not None
        assert (found.row, found.column) == (row, column)


@pytest.mark.parametrize("scale", [1e-19, 1e-12, 1e12, 3e17])
@pytest.mark.parametrize("dtype", [Dtype.BFLOAT16, Dtype.FLOAT32, Dtype.FLOAT64])
def test_a_wrong_element_is_found_however_large_or_small_all_are(
    dtype: Dtype, scale: float
) -> None:
    """Also where the squares of a result's elements are no float32."""
    rng = np.random.default_rng(4)
    a, b = rng.standard_normal((ROWS, 200)), rng.standard_normal((200, 100))
    product = Product.of(a * scale, b * scale, dtype)
    for seed in range(5):
        assert product.found(product.c, seed) is None
        wrong = product.c.copy()
        wrong[2, 7] = product.exact[2, 7] + 17 * product.typical[2]
        found = product.found(wrong, seed)
        assert found is not None
        assert (found.row, found.column) == (2, 7)


@pytest.mark.parametrize("kind", ["normal", "positive", "constant"])
@pytest.mark.parametrize("dtype", list(Dtype), ids=lambda dtype: dtype.label)
def test_a_right_product_is_never_called_wrong(kind: str, dtype: Dtype) -> None:
    """Not even where all errors have one sign: rows are computed again first."""
    if kind == "constant":
        product = Product.of(np.full((200, 300), 0.1), np.full((300, 200), 0.3), dtype)
    else:
        rng = np.random.default_rng(3)
        draw = rng.standard_normal if kind == "normal" else rng.random
        product = Product.of(draw((200, 300)), draw((300, 200)), dtype)
    for seed in range(6):
        assert product.found(product.c, seed) is None


def test_rows_are_hardly_ever_computed_again_in_vain() -> None:
    """What the threshold for suspicion costs: one row in a thousand at most."""
    suspicious = rows = 0
    for dtype in Dtype:
        for kind in ("normal", "positive"):
            rng = np.random.default_rng(5)
            draw = rng.standard_normal if kind == "normal" else rng.random
            product = Product.of(draw((500, 200)), draw((200, 300)), dtype)
            for seed in range(2):
                random_sums = product.random_sums(Verify(), seed)
                suspects = compare(
                    product.c,
                    product.a @ random_sums.project(product.b),
                    random_sums,
                    product.arithmetic,
                    200,
                    row_norms=row_norms(product.a),
                    group_norms=random_sums.group_norms(
                        np.sum(np.square(product.b.astype(np.longdouble)), axis=0)
                    ),
                )
                suspicious += len(suspects.rows)
                rows += 500
                assert not suspects.certain.any()
    assert suspicious <= rows / 1000


@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_errors_that_may_cancel_are_missed_as_seldom_as_stated(rounds: int) -> None:
    """Two equal ones in a row with one group: half of the times in each round."""
    product = drawn("normal", 32, 8, Dtype.FLOAT32)
    wrong = product.c.copy()
    wrong[1, 2] += 5
    wrong[1, 6] += 5
    trials = 200
    verify = Verify(rounds=rounds, groups=1)
    # Sums of eight, as if the sums' length did not ask for more groups.
    missed = sum(
        RowProduct(
            product.b,
            RandomSums(
                8, rounds, 1, 64, dtype=product.b.dtype, rng=np.random.default_rng(s)
            ),
        ).wrong(product.a, wrong, product.arithmetic)
        is None
        for s in range(trials)
    )
    assert verify.rounds == rounds
    stated = trials / 2**rounds
    assert abs(missed - stated) <= 4 * np.sqrt(stated)
    # In 16 groups of a round they hardly ever meet.
    wide = drawn("normal", 256, 256, Dtype.FLOAT32)
    both = wide.c.copy()
    both[0, 3] += 5
    both[0, 200] += 5
    seldom = sum(wide.found(both, s, Verify(rounds=rounds)) is None for s in range(40))
    assert seldom <= 5


def test_dw_of_a_stream_is_checked_without_its_rows() -> None:
    """From 9 worst cases of a group on, as Cauchy and Schwarz bound them."""
    rng = np.random.default_rng(2)
    x, dy = rng.standard_normal((2, 1000, 64)).astype(np.float32)
    dw = x.T @ dy
    arithmetic = Arithmetic(Dtype.FLOAT32, Dtype.FLOAT32, 250 + 4)
    for seed, factor in enumerate((0, 0, 0, 24, 24, 24)):
        random_sums = RandomSums(
            64, 2, 16, 1000, dtype=x.dtype, rng=np.random.default_rng(seed)
        )
        sums = SumProduct(64, random_sums)
        for first in range(0, 1000, 100):
            sums.add(x[first : first + 100], dy[first : first + 100])
        norms = np.linalg.norm(x[:, 5]) * np.linalg.norm(dy[:, 9])
        wrong = dw.copy()
        wrong[5, 9] += factor * arithmetic.worst * norms
        suspects, _ = sums.suspects(wrong, arithmetic)
        assert list(suspects.rows[suspects.certain]) == ([5] if factor else [])


@pytest.mark.parametrize("scale", [1e-19, 1e-10, 4e18, 1e19])
@pytest.mark.parametrize("dtype", [Dtype.BFLOAT16, Dtype.FLOAT32])
def test_dw_of_a_stream_is_right_however_large_or_small_it_is(
    dtype: Dtype, scale: float
) -> None:
    """Also where some of its elements are Inf, because no float32 is as large."""
    rng = np.random.default_rng(6)
    x, dy = (rng.standard_normal((2, 300, 64)) * scale).astype(dtype.numpy)
    x, dy = x.astype(np.float32), dy.astype(np.float32)
    with np.errstate(all="ignore"):
        dw = (x.T @ dy).astype(dtype.numpy)
        random_sums = RandomSums(
            64, 2, 16, 300, dtype=x.dtype, rng=np.random.default_rng(0)
        )
        sums = SumProduct(64, random_sums)
        sums.add(x, dy)
        suspects, _ = sums.suspects(dw, Arithmetic(dtype, dtype, 300))
    assert not suspects.certain.any()
