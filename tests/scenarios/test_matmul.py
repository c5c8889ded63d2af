"""Operands of the shapes that numpy.matmul and torch.matmul take."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as np_st

import gradwire
from tests.support import oracle

L, M, S = 20, 10, 5
SAMPLES = [
    ((L,), (L,)),
    ((S, M), (M,)),
    ((M,), (M, S)),
    ((S, M), (M, S)),
    ((S, 0), (0, M)),
    ((S, S, M), (M,)),
    ((S, S, M), (M, S)),
    ((S, S, 0), (0, S)),
    ((M,), (S, M, S)),
    ((S, M), (S, M, S)),
    ((0, 0), (S, 0, 0)),
    ((S, S, M, M), (S, S, M, S)),
    ((S, S, M, M), (M,)),
    ((M,), (S, S, M, S)),
    ((S, S, S), (1, S, S)),
]
"""PyTorch's samples of matmul."""

MORE = [
    ((3, 1, 4, 5), (2, 5, 6)),  # rows and columns
    ((2, 3, 1, 4, 5), (2, 1, 2, 5, 6)),  # a loop, too
    ((7, 4, 5), (7, 5, 6)),
    ((4, 5), (1, 1, 5, 6)),
    ((0, 4, 5), (0, 5, 6)),
    ((2, 0, 4, 5), (2, 0, 5, 6)),
    ((1, 4, 5), (0, 5, 6)),
    ((0, 4, 5), (1, 5, 6)),
    ((3, 0, 5), (3, 5, 6)),
    ((3, 4, 5), (3, 5, 0)),
    ((4, 5), (3, 5, 0)),
]
ALL = ("y", "dx", "dw", "db")


def random(*shape: int, seed: int = 0, dtype: Any = np.float64) -> Any:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def job(x: tuple[int, ...], w: tuple[int, ...], dtype: Any = np.float64) -> Any:
    """Random operands whose X and W have these shapes."""
    one, other = random(*x, dtype=dtype), random(*w, seed=1, dtype=dtype)
    shape = np.shape(np.matmul(one.astype(float), other.astype(float)))
    return one, other, random(*shape, seed=2, dtype=dtype)


def summed(array: Any, shape: tuple[int, ...]) -> Any:
    """An array summed to a shape that broadcasts to the array's."""
    array = array.sum(axis=tuple(range(array.ndim - len(shape))))
    axes = tuple(i for i, size in enumerate(shape) if size != array.shape[i])
    return array.sum(axis=axes, keepdims=True)


def expected(x: Any, w: Any, dy: Any) -> dict[str, Any]:
    """The results by numpy.matmul, in float64."""
    x, w, dy = (np.asarray(each, np.float64) for each in (x, w, dy))
    x2, w2 = (x[None] if x.ndim == 1 else x), (w[:, None] if w.ndim == 1 else w)
    dy2 = dy[..., None] if w.ndim == 1 else dy
    dy2 = dy2[..., None, :] if x.ndim == 1 else dy2
    dx = summed(np.matmul(dy2, np.swapaxes(w2, -1, -2)), x2.shape)
    dw = summed(np.matmul(np.swapaxes(x2, -1, -2), dy2), w2.shape)
    db = dy.sum() if w.ndim == 1 else dy.sum(axis=tuple(range(dy.ndim - 1)))
    return {
        "y": np.asarray(np.matmul(x, w)),
        "dx": dx.reshape(x.shape),
        "dw": dw.reshape(w.shape),
        "db": np.asarray(db),
    }


def assert_right(result: Any, operands: Any, names: Any = ALL) -> None:
    """The results are numpy.matmul's, in shape, dtype and value."""
    right = expected(*operands)
    # Sums of magnitudes: no sum here is longer than all elements together.
    sizes = expected(*map(np.abs, operands))
    length = max(1, *(each.size for each in operands))
    for name in names:
        array = getattr(result, name)
        assert type(array) is np.ndarray
        assert array.shape == right[name].shape, name
        assert array.dtype == operands[0].dtype
        allowed = 2 * length * oracle_eps(array.dtype) * sizes[name]
        assert (np.abs(array.astype(np.float64) - right[name]) <= allowed).all(), name


def oracle_eps(dtype: Any) -> float:
    import ml_dtypes

    return float(ml_dtypes.finfo(dtype).eps)


@pytest.mark.parametrize(("x", "w"), [*SAMPLES, *MORE], ids=str)
def test_results_are_numpys(
    client: gradwire.Client, x: tuple[int, ...], w: tuple[int, ...]
) -> None:
    operands = job(x, w)
    result = client.gradients(*operands, results=ALL, verify=True)
    assert_right(result, operands)
    y = client.forward(*operands[:2])
    assert oracle.same_bits(y, result.y)
    for one, other in zip(client.backward(*operands), result[1:], strict=True):
        assert oracle.same_bits(one, other)


@pytest.mark.parametrize(("x", "w"), [SAMPLES[0], SAMPLES[8], *MORE[:3]], ids=str)
def test_they_are_the_same_over_every_transport(
    caller: Any, client: gradwire.Client, x: tuple[int, ...], w: tuple[int, ...]
) -> None:
    operands = job(x, w)
    placed = tuple(map(caller.placed, operands))
    result = caller.run(caller.client.gradients(*placed, results=ALL))
    assert_right(result, operands)
    caller.way.arrived(result.receipt)
    plain = client.gradients(*operands, results=ALL)
    for name in ALL:
        assert oracle.same_bits(getattr(result, name), getattr(plain, name))


@st.composite
def shapes(draw: Any) -> Any:
    drawn = draw(
        np_st.mutually_broadcastable_shapes(
            signature="(m?,n),(n,k?)->(m?,k?)", min_side=0, max_side=4, max_dims=3
        )
    )
    return drawn.input_shapes


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(pair=shapes(), dtype=st.sampled_from(["float64", "float32", "bfloat16"]))
def test_any_shapes_that_numpy_broadcasts(
    client: gradwire.Client, pair: Any, dtype: str
) -> None:
    operands = job(*pair, dtype=oracle.numpy_dtype(dtype))
    assert_right(client.gradients(*operands, results=ALL), operands)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(("x", "w"), [*SAMPLES, *MORE], ids=str)
def test_torchs_autograd_agrees(
    client: gradwire.Client, x: tuple[int, ...], w: tuple[int, ...], swapped: bool
) -> None:
    """Swapped, they are PyTorch's samples of ``__rmatmul__``, for other shapes of W."""
    torch = pytest.importorskip("torch")
    if swapped:
        x, w = turned(w), turned(x)
    one, other, dy = map(torch.from_numpy, map(np.asarray, job(x, w)))
    one.requires_grad_()
    other.requires_grad_()
    y = torch.matmul(one, other)
    right = torch.autograd.grad(y, (one, other), dy)
    result = client.gradients(one, other, dy)
    for mine, its in zip(result, (y.detach(), *right), strict=True):
        assert mine.dtype is its.dtype
        torch.testing.assert_close(mine, its)


def turned(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a transposed matrix."""
    return shape if len(shape) == 1 else (*shape[:-2], shape[-1], shape[-2])


def test_rows_are_summed_by_the_job_itself(client: gradwire.Client) -> None:
    """A W that is shared sees all rows in one job, as with a W of two dimensions."""
    x, w, dy = job((6, 5, 4), (1, 4, 3))
    result = client.gradients(x, w, dy)
    plain = client.gradients(x, w[0], dy)
    assert result.receipt.jobs == 1
    assert oracle.same_bits(result.dw[0], plain.dw)
    assert oracle.same_bits(result.y, plain.y)


def test_a_shared_x_is_sent_once(client: gradwire.Client) -> None:
    x, w, dy = job((50, 40), (8, 40, 30))
    result = client.gradients(x, w, dy)
    assert result.receipt.jobs == 1
    assert result.receipt.bytes_received == x.nbytes + w.nbytes + dy.nbytes
    assert_right(result, (x, w, dy), ("y", "dx", "dw"))


def test_the_receipt_is_of_all_jobs(client: gradwire.Client) -> None:
    x, w, dy = job((12, 50, 40), (12, 40, 30))
    result = client.gradients(x, w, dy, request_id="mine")
    receipt = result.receipt
    assert receipt.jobs == 12
    assert receipt.m == 12 * 50
    assert receipt.bytes_received == x.nbytes + w.nbytes + dy.nbytes
    assert receipt.bytes_sent == sum(array.nbytes for array in result)
    assert receipt.blocks == 12 * math.ceil(50 / receipt.block_rows)
    assert receipt.job_id == "mine"
    assert receipt.attempts == 1
    assert client.last_receipt == receipt
    assert client.gradients(x[0], w[0], dy[0]).receipt.jobs == 1


def test_operands_that_are_not_needed_may_be_left_out(caller: Any) -> None:
    x, w, dy = job((3, 4, 5), (3, 5, 6))
    right = expected(x, w, dy)
    alone = caller.run(caller.client.gradients(None, w, dy, results="dx")).dx
    np.testing.assert_allclose(alone, right["dx"], rtol=1e-12, atol=1e-12)
    # X is given for its shape alone.
    shared = caller.run(caller.client.gradients(x[:1], w, dy, results="dx")).dx
    np.testing.assert_allclose(shared, right["dx"].sum(0)[None], atol=1e-12)
    dw = caller.run(caller.client.gradients(x[0, 0], None, dy[0, 0], results="dw")).dw
    np.testing.assert_allclose(dw, np.outer(x[0, 0], dy[0, 0]))
    # With W, its batch is known.
    dw = caller.run(caller.client.gradients(x, w, dy, results="dw")).dw
    np.testing.assert_allclose(dw, right["dw"], atol=1e-12)
    db = caller.run(caller.client.gradients(None, None, dy[0, 0], results="db")).db
    assert db.tolist() == dy[0, 0].tolist()


def test_results_go_where_out_says(caller: Any) -> None:
    for x_shape, w_shape in (((5, 4, 3), (5, 3, 6)), ((4, 3), (5, 3, 6)), ((3,), (3,))):
        operands = job(x_shape, w_shape)
        right = expected(*operands)
        # Of any layout: reversed in memory.
        out = {
            name: np.empty(right[name].shape[::-1] or (1,)).T.reshape(
                right[name].shape, copy=False
            )
            for name in ALL
        }
        result = caller.run(caller.client.gradients(*operands, results=ALL, out=out))
        for name in ALL:
            assert getattr(result, name) is out[name]
        assert_right(result, operands)
    x, w, _ = job((4, 3), (5, 3, 6))
    with pytest.raises(gradwire.InputError, match=r"out's y has shape \(4, 6\)"):
        caller.run(caller.client.forward(x, w, out=np.empty((4, 6))))


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_a_bias_gradient_is_rounded_once(client: gradwire.Client, dtype: str) -> None:
    """It is the only result that is added up over jobs."""
    ones = np.ones((128, 1, 1), oracle.numpy_dtype(dtype))
    halves = np.full_like(ones, 2.0**-8)
    halves[0] = 1
    db = client.gradients(ones, ones, halves, results="db").db
    exact = np.asarray(1 + 127 * 2.0**-8).astype(oracle.numpy_dtype(dtype))
    assert db.tolist() == [float(exact)]


def test_tensors_of_bfloat16_are_multiplied_in_batches(
    client: gradwire.Client,
) -> None:
    torch = pytest.importorskip("torch")
    x, w = torch.randn(3, 4, 5).bfloat16(), torch.randn(3, 5, 6).bfloat16()
    y = client.forward(x, w)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y, torch.bmm(x, w), rtol=2**-7, atol=2**-7)


def test_wire_dtype_is_for_every_job(client: gradwire.Client) -> None:
    operands = job((3, 4, 5), (3, 5, 6), np.float32)
    narrow = client.gradients(*operands, wire_dtype="bfloat16")
    for index in range(3):
        one = client.gradients(*(a[index] for a in operands), wire_dtype="bfloat16")
        for mine, its in zip(narrow, one, strict=True):
            assert oracle.same_bits(mine[index], its)


@pytest.mark.parametrize(
    ("x", "w", "dy", "says"),
    [
        ((), (3,), (), r"x has shape \(\): expected at least one dimension"),
        ((3,), (), (), r"w has shape \(\): expected at least one dimension"),
        (
            (4,),
            (3,),
            (),
            r"x has shape \(4,\) and w \(3,\): x's last dimension \(4\) must equal w's"
            r" only dimension \(3\)",
        ),
        (
            (2, 4, 5),
            (3, 5, 6),
            (3, 4, 6),
            r"x has shape \(2, 4, 5\) and w \(3, 5, 6\): the batch dimensions \(2,\)"
            r" and \(3,\) cannot be broadcast",
        ),
        (
            (2, 4, 5),
            (2, 6, 7),
            (2, 4, 7),
            r"x's last dimension \(5\) must equal w's last but one dimension \(6\)",
        ),
        (
            (4, 5),
            (2, 5, 6),
            (4, 6),
            r"x has shape \(4, 5\) and w has shape \(2, 5, 6\): expected dy of Y's"
            r" shape \(2, 4, 6\), but dy has shape \(4, 6\)",
        ),
        ((4, 5), (5,), (4, 1), r"expected dy of Y's shape \(4,\), but dy has"),
        ((3, 4), None, (), r"dy has shape \(\): expected at least one dimension"),
    ],
)
def test_shapes_that_do_not_fit_are_named(
    client: gradwire.Client, x: Any, w: Any, dy: Any, says: str
) -> None:
    given = [None if shape is None else np.ones(shape) for shape in (x, w, dy)]
    results = "dw" if w is None else ("y", "dx", "dw")
    with pytest.raises(gradwire.InputError, match=says):
        client.gradients(*given, results=results)


def test_a_batch_of_dy_alone_must_fit_w(client: gradwire.Client) -> None:
    w, dy = np.ones((2, 5, 6)), np.ones((3, 6))
    with pytest.raises(gradwire.InputError, match="pass x, too, if it is a vector"):
        client.gradients(None, w, dy, results="dx")


def test_streams_take_one_matrix_w(client: gradwire.Client) -> None:
    with (
        pytest.raises(gradwire.InputError, match=r"w has shape .*two dimensions"),
        client.stream([(np.ones((4, 5)), np.ones((4, 6)))], np.ones((2, 5, 6))) as s,
    ):
        next(s)
