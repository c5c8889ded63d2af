"""What the GPU computes is as right as the dtype of its sums allows."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

import gradwire
from tests.gpu.conftest import BACKEND
from tests.support import oracle

NAMES = ("y", "dx", "dw")
U = 2.0**-24
"""Unit roundoff of float32."""
LONG = 2048
"""Length of a sum whose order and kernel are those of large products."""


def as_tf32(array: Any) -> Any:
    """float32 operands as TF32 has them: 10 bits behind the point."""
    bits = array.view(np.uint32)
    return ((bits + 0x1000) & 0xFFFFE000).view(np.float32)


def rms(array: Any) -> float:
    return float(np.sqrt(np.mean(np.square(array, dtype=np.float64))))


@pytest.mark.parametrize("blocks", ["client", "large_blocks"])
@pytest.mark.parametrize(
    ("name", "shape"),
    [("y", (4096, 64, 1024)), ("dx", (4096, 1024, 64)), ("dw", (64, 1024, 1024))],
)
def test_float32_is_true_float32_in_every_element(
    request: pytest.FixtureRequest, name: str, shape: tuple[int, int, int], blocks: str
) -> None:
    """Sums so short that TF32's operands alone would be off by more."""
    x, w, dy = oracle.operands(*shape)
    result = request.getfixturevalue(blocks).gradients(x, w, dy, results=name)
    oracle.assert_right(result, x, w, dy, "float32", backend=BACKEND)
    allowed = oracle.bounds(x, w, dy, "float32", backend=BACKEND)[name]
    rough = oracle.exact(*map(as_tf32, (x, w, dy)))[name]
    exceeded = np.abs(rough - oracle.exact(x, w, dy)[name]) > allowed
    assert exceeded.mean() > 0.5


@pytest.fixture(scope="module")
def cube() -> Any:
    """Operands of long sums, and the exact results."""
    operands = oracle.operands(LONG, LONG, LONG)
    return operands, oracle.exact(*operands)


@pytest.fixture(scope="module")
def in_float32(large_blocks: gradwire.Client, cube: Any) -> Any:
    return large_blocks.gradients(*cube[0])


def test_float32_is_true_float32_in_long_sums(cube: Any, in_float32: Any) -> None:
    """A sum of L products of variance 1 strays by less than L u.

    Its i-th step rounds a partial sum of size sqrt(i) by at most u, and where
    roundings are independent that comes to u sqrt(1 + 2 + ... + L) at most.
    """
    operands, exact = cube
    rough = oracle.exact(*map(as_tf32, operands))
    for name in NAMES:
        assert rms(getattr(in_float32, name) - exact[name]) < LONG * U
        assert rms(rough[name] - exact[name]) > 20 * LONG * U


def test_tf32_is_for_the_jobs_that_allow_it(
    large_blocks: gradwire.Client, cube: Any, in_float32: Any
) -> None:
    """An operand may lose what is behind 10 bits, by rounding or by cutting."""
    operands, exact = cube
    magnitude = oracle.exact(*map(np.abs, operands))
    result = large_blocks.gradients(*operands, allow_tf32=True)
    for name in NAMES:
        error = getattr(result, name) - exact[name]
        cut = (1 + 2.0**-10) ** 2 - 1
        assert (np.abs(error) <= (cut + 4 * LONG * U) * magnitude[name]).all()
        if has_tf32():
            assert rms(error) > LONG * U
    again = large_blocks.gradients(*operands)
    for name in NAMES:
        assert oracle.same_bits(getattr(again, name), getattr(in_float32, name))


def has_tf32() -> bool:
    import cupy

    return int(cupy.cuda.Device(0).compute_capability) >= 80


def test_jobs_with_and_without_tf32_run_side_by_side(client: gradwire.Client) -> None:
    operands = oracle.operands(512, 256, 256)
    expected = {tf32: client.gradients(*operands, allow_tf32=tf32) for tf32 in (0, 1)}
    wrong: list[str] = []

    def run(tf32: int) -> None:
        for _ in range(40):
            result = client.gradients(*operands, allow_tf32=bool(tf32))
            for name, one, other in zip(NAMES, result, expected[tf32], strict=True):
                if not oracle.same_bits(one, other):
                    wrong.append(f"{name} {tf32}")

    threads = [threading.Thread(target=run, args=(tf32,)) for tf32 in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("shape", [(300, 40, 30), (1500, 512, 256)], ids=str)
@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_every_dtype_agrees_with_float64(
    client: gradwire.Client, dtype: str, shape: tuple[int, int, int]
) -> None:
    x, w, dy = oracle.operands(*shape, dtype)
    result = client.gradients(x, w, dy)
    assert result.receipt.blocks > 1
    oracle.assert_right(result, x, w, dy, dtype, backend=BACKEND)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_every_dtype_agrees_with_torchs_autograd(
    client: gradwire.Client, dtype: str
) -> None:
    torch = pytest.importorskip("torch")
    x, w, dy = oracle.operands(500, 130, 70, dtype)
    tx, tw, tdy = (torch.from_numpy(a.astype(np.float64)) for a in (x, w, dy))
    tx.requires_grad_()
    tw.requires_grad_()
    ty = tx @ tw
    ty.backward(tdy)
    result = client.gradients(x, w, dy)
    allowed = oracle.bounds(x, w, dy, dtype, backend=BACKEND)
    for name, expected in (("y", ty.detach()), ("dx", tx.grad), ("dw", tw.grad)):
        error = np.abs(getattr(result, name).astype(np.float64) - expected.numpy())
        # Both may be off by the bound, in opposite directions.
        assert (error <= 2 * allowed[name]).all(), name


@pytest.mark.parametrize("accumulator", ["float32", "float64"])
@pytest.mark.parametrize("result_dtype", oracle.DTYPES)
@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_every_result_dtype_and_accumulator(
    client: gradwire.Client, dtype: str, result_dtype: str, accumulator: str
) -> None:
    if (dtype, accumulator) == ("float64", "float32"):
        pytest.skip("dW of float64 operands is summed in float64")
    x, w, dy = oracle.operands(700, 100, 60, dtype)
    result = client.gradients(
        x, w, dy, result_dtype=result_dtype, dw_accumulator=accumulator
    )
    assert result.receipt.blocks > 1
    oracle.assert_right(result, x, w, dy, dtype, result_dtype, backend=BACKEND)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_float64_accumulator_keeps_what_float32_would_lose(
    client: gradwire.Client, dtype: str
) -> None:
    """2**24, and then 1 from every row block: float32 has no 2**24 + 1."""
    m, n = 200, 2000
    x, dy = (np.zeros((m, c), oracle.numpy_dtype(dtype)) for c in (n, 1))
    dy[...] = 1
    options: dict[str, Any] = {"results": "dw", "result_dtype": "float64"}
    block = client.gradients(x, None, dy, **options).receipt.block_rows
    assert block < m
    x[::block] = 1
    x[0] = dy[0] = 4096
    wide = client.gradients(x, None, dy, dw_accumulator="float64", **options)
    narrow = client.gradients(x, None, dy, dw_accumulator="float32", **options)
    assert (wide.dw == 2**24 + wide.receipt.blocks - 1).all()
    assert (narrow.dw == 2**24).all()


def test_float64_is_true_float64(client: gradwire.Client) -> None:
    """Whole numbers up to 2**53 are exact, and no narrower arithmetic has them."""
    rng = np.random.default_rng(0)
    x, w, dy = (
        rng.integers(-(2**22), 2**22, shape).astype(np.float64)
        for shape in ((300, 120), (120, 90), (300, 90))
    )
    result = client.gradients(x, w, dy)
    for name, expected in oracle.exact(x, w, dy).items():
        np.testing.assert_array_equal(getattr(result, name), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_operands_are_summed_in_float32(
    client: gradwire.Client, dtype: str
) -> None:
    """Were partial sums rounded to 16 bits, digits of these would be lost."""
    rng = np.random.default_rng(1)
    x, w = (
        rng.integers(-8, 9, shape).astype(oracle.numpy_dtype(dtype))
        for shape in ((40, 4096), (4096, 24))
    )
    y = client.forward(x, w, result_dtype="float32")
    exact = oracle.exact(x, w, np.ones((40, 24)))["y"]
    assert np.abs(exact).max() > 2**11
    np.testing.assert_array_equal(y, exact)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_nan_and_infinity_are_data(client: gradwire.Client, dtype: str) -> None:
    rng = np.random.default_rng(0)
    x, w, dy = (
        rng.integers(-4, 5, shape).astype(oracle.numpy_dtype(dtype))
        for shape in ((300, 20), (20, 12), (300, 12))
    )
    x[3, 2], x[140, 1], dy[250, 4] = np.nan, np.inf, -np.inf
    result = client.gradients(x, w, dy)
    with np.errstate(all="ignore"):
        exact = oracle.exact(x, w, dy)
    for name in NAMES:
        rounded = exact[name].astype(x.dtype)
        np.testing.assert_array_equal(
            getattr(result, name).astype(np.float64), rounded.astype(np.float64)
        )


def test_float16_overflows_to_infinity(client: gradwire.Client) -> None:
    x, w = np.full((40, 3), 300, np.float16), np.full((3, 2), 300, np.float16)
    result = client.gradients(x, w, np.ones((40, 2), np.float16))
    assert np.isposinf(result.y).all()
    assert (result.dx == 600).all()
    assert (result.dw == 12000).all()
