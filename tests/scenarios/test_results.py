"""What comes back is right, whatever was given and wherever it goes."""

from __future__ import annotations

import functools
import math
import subprocess
import sys
from fractions import Fraction
from typing import Any

import autograd
import autograd.numpy as anp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gradwire
from tests.scenarios import ways
from tests.scenarios.callers import CALLERS
from tests.scenarios.ways import Way
from tests.support import oracle
from tests.support.serving import BACKEND, ServerProcess


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_every_dtype_is_as_right_as_its_arithmetic_allows(
    caller: Any, dtype: str
) -> None:
    x, w, dy = oracle.operands(150, 40, 30, dtype)
    result = caller.gradients(x, w, dy)
    assert result.receipt.blocks > 1
    oracle.assert_right(result, x, w, dy, dtype)


# The session's clients and server have no state that an example could leave.
@settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    way=st.sampled_from(ways.WAYS),
    kind=st.sampled_from(list(CALLERS)),
    m=st.one_of(st.integers(0, 5), st.integers(0, 1000)),
    n=st.one_of(st.integers(0, 5), st.integers(0, 60)),
    k=st.one_of(st.integers(0, 5), st.integers(0, 60)),
    dtype=st.sampled_from(oracle.DTYPES),
    results=st.sets(st.sampled_from(("y", "dx", "dw")), min_size=1),
)
def test_any_shape_and_any_results_have_the_same_bits_in_any_way(
    client: gradwire.Client,
    caller_of: Any,
    way: Way,
    kind: str,
    m: int,
    n: int,
    k: int,
    dtype: str,
    results: set[str],
) -> None:
    x, w, dy = oracle.operands(m, n, k, dtype)
    result = caller_of(kind, way).gradients(x, w, dy, results=results)
    wanted = {name for name in ("y", "dx", "dw") if getattr(result, name) is not None}
    assert wanted == results
    oracle.assert_right(result, x, w, dy, dtype)
    for one, other in zip(
        result, client.gradients(x, w, dy, results=results), strict=True
    ):
        assert (one is None and other is None) or oracle.same_bits(one, other)


@pytest.mark.parametrize(
    ("m", "n", "k"),
    [
        pytest.param(20000, 3, 2, id="tall"),
        pytest.param(3, 2, 3000, id="wide output"),
        pytest.param(2, 3000, 3, id="wide input"),
        pytest.param(1, 1, 1, id="one element"),
        pytest.param(1, 2500, 1, id="outer product"),
        pytest.param(40, 30, 20, id="few blocks"),
        pytest.param(0, 30, 20, id="no rows"),
        pytest.param(129, 30, 20, id="a last block of one row"),
        pytest.param(500, 0, 20, id="rows of x without elements"),
    ],
)
def test_lopsided_shapes(caller: Any, m: int, n: int, k: int) -> None:
    x, w, dy = oracle.operands(m, n, k)
    oracle.assert_right(caller.gradients(x, w, dy), x, w, dy, "float32")


def test_an_independent_autograd_agrees(caller: Any) -> None:
    x, w, dy = oracle.operands(60, 20, 10, "float64")

    def loss(x: Any, w: Any) -> Any:
        return anp.sum(dy * anp.dot(x, w))

    dx, dw = autograd.grad(loss, (0, 1))(x, w)
    result = caller.backward(x, w, dy)
    allowed = oracle.bounds(x, w, dy, "float64")
    # Both may be off by the bound, in opposite directions.
    assert (np.abs(result.dx - dx) <= 2 * allowed["dx"]).all()
    assert (np.abs(result.dw - dw) <= 2 * allowed["dw"]).all()


def test_the_three_methods_agree(caller: Any) -> None:
    x, w, dy = oracle.operands(100, 20, 30)
    y, dx, dw = result = caller.gradients(x, w, dy)
    assert caller.client.last_receipt == result.receipt
    assert oracle.same_bits(caller.forward(x, w), y)
    backward = caller.backward(x, w, dy)
    assert oracle.same_bits(backward.dx, dx)
    assert oracle.same_bits(backward.dw, dw)
    assert caller.client.last_receipt == backward.receipt


LAYOUTS: dict[str, Any] = {
    "fortran": np.asfortranarray,
    "every other column": lambda a: np.repeat(a, 2, axis=1)[:, ::2],
    "reversed": lambda a: a[::-1, ::-1].copy()[::-1, ::-1],
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "read-only": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
}


@pytest.mark.thorough
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_the_layout_of_an_operand_changes_no_bit(
    caller: Any, layout: str, dtype: str
) -> None:
    operands = oracle.operands(70, 20, 30, dtype)
    expected = caller.gradients(*operands)
    actual = caller.gradients(*(LAYOUTS[layout](operand) for operand in operands))
    for one, other in zip(actual, expected, strict=True):
        assert oracle.same_bits(one, other)


@pytest.mark.parametrize("lead", [(2, 3, 4), (24, 1), (1, 1, 24), (0, 3), (2, 0, 2)])
@pytest.mark.parametrize("moved", [False, True])
def test_leading_dimensions_come_back(
    caller: Any, lead: tuple[int, ...], moved: bool
) -> None:
    rng = np.random.default_rng(0)
    w = rng.normal(size=(5, 6))
    x, dy = rng.normal(size=(*lead, 5)), rng.normal(size=(*lead, 6))
    if moved:
        x = np.asfortranarray(x)
    result = caller.gradients(x, w, dy)
    assert result.y.shape == (*lead, 6)
    assert result.dx.shape == (*lead, 5)
    flat = gradwire.Gradients(
        result.y.reshape(-1, 6), result.dx.reshape(-1, 5), result.dw, result.receipt
    )
    oracle.assert_right(flat, x.reshape(-1, 5), w, dy.reshape(-1, 6), "float64")


OUT_LAYOUTS: dict[str, Any] = {
    "c": None,  # as the way's callers have their arrays
    "fortran": lambda shape, dtype: np.empty(shape, dtype, order="F"),
    "strided": lambda shape, dtype: np.empty((shape[0], 2 * shape[1]), dtype)[:, ::2],
    "big-endian": lambda shape, dtype: np.empty(shape, dtype.newbyteorder(">")),
}


@pytest.mark.parametrize("turn", range(len(oracle.DTYPES) // 2))
@pytest.mark.parametrize("layout", OUT_LAYOUTS)
def test_results_are_written_where_the_caller_says(
    caller: Any, layout: str, turn: int
) -> None:
    # The two clients share the dtypes of each layout on each way.
    of_sync = isinstance(caller.client, gradwire.Client)
    first = list(OUT_LAYOUTS).index(layout) + of_sync
    dtype = oracle.DTYPES[(first + 2 * turn) % len(oracle.DTYPES)]
    x, w, dy = oracle.operands(70, 20, 30, dtype)
    expected = caller.gradients(x, w, dy)
    make = OUT_LAYOUTS[layout] or caller.empty
    out = {
        name: make(getattr(expected, name).shape, x.dtype) for name in ("y", "dx", "dw")
    }
    result = caller.gradients(x, w, dy, out=out)
    for name, array in out.items():
        assert getattr(result, name) is array
        native = np.ascontiguousarray(array).astype(x.dtype)
        assert oracle.same_bits(native, getattr(expected, name))


def test_forward_writes_to_one_array_and_backward_to_two(caller: Any) -> None:
    x, w, dy = oracle.operands(7, 4, 3)
    y, dw = np.empty((7, 3), "f4"), np.empty((4, 3), "f4")
    assert caller.forward(x, w, out=y) is y
    result = caller.backward(x, w, dy, out=(None, dw))
    assert result.dw is dw
    oracle.assert_right(
        gradwire.Gradients(y, *result, result.receipt), x, w, dy, "float32"
    )


def test_float64_sums_become_bfloat16_in_one_rounding(caller: Any) -> None:
    """By way of float32, each of these would be rounded to 1 instead."""
    one = np.ones((1, 1))
    above = one + 2.0**-8 + 2.0**-40
    result = caller.gradients(above, one, above, result_dtype="bfloat16")
    assert result.y == 1.0078125
    assert result.dx == 1.0078125
    dw = caller.gradients(above, None, one, results="dw", result_dtype="bfloat16").dw
    assert dw == 1.0078125


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("result_dtype", oracle.DTYPES)
def test_results_of_another_dtype_are_rounded_once(
    caller: Any, dtype: str, result_dtype: str
) -> None:
    x, w, dy = oracle.operands(50, 10, 20, dtype)
    result = caller.gradients(x, w, dy, result_dtype=result_dtype)
    oracle.assert_right(result, x, w, dy, dtype, result_dtype)


def test_one_result_alone_may_have_another_dtype(caller: Any) -> None:
    x, w, dy = oracle.operands(50, 10, 20, "bfloat16")
    result = caller.gradients(x, w, dy, result_dtype={"dw": "float32"})
    assert result.y.dtype == result.dx.dtype == ml_dtypes.bfloat16
    assert result.dw.dtype == np.float32


def test_a_wider_accumulator_of_dw_loses_less(caller: Any) -> None:
    # Blocks whose sums differ so much that float32 forgets the later ones.
    rows = 512
    m = 3 * rows
    x = np.zeros((m, 1), np.float32)
    x[0], x[rows::rows] = 2.0**25, 1.0
    dy = np.ones((m, 1), np.float32)
    options: Any = {"results": "dw", "result_dtype": "float64"}
    narrow = caller.gradients(x, None, dy, dw_accumulator="float32", **options)
    wide = caller.gradients(x, None, dy, dw_accumulator="float64", **options)
    assert narrow.receipt.block_rows == rows
    assert narrow.dw.item() == 2.0**25
    assert wide.dw.item() == 2.0**25 + 2
    default = caller.gradients(x, None, dy, **options)
    assert default.dw.item() == wide.dw.item()


@functools.cache
def _long_sums() -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(14)
    m, n, k = 40_000, 3, 2
    x, dy = (rng.random((m, columns), np.float32) for columns in (n, k))
    # Products of two float32 are exact in float64, and fsum rounds their sum once.
    products = x.T.astype(np.float64)[:, None] * dy.T.astype(np.float64)[None]
    return x, dy, np.array([[math.fsum(one) for one in row] for row in products])


def test_a_long_sum_of_one_sign_is_as_exact_as_its_last_rounding(caller: Any) -> None:
    """Rounded to float32 after every block it loses several units of roundoff."""
    x, dy, exact = _long_sums()

    def roundoffs(**options: Any) -> float:
        result = caller.gradients(x, None, dy, results="dw", **options)
        assert result.dw.dtype == np.float32
        assert result.receipt.blocks > 100
        return float(np.max(np.abs(result.dw - exact) / exact)) * 2.0**24

    default = roundoffs()
    assert default <= 1
    assert roundoffs(dw_accumulator="float64") == default
    assert roundoffs(dw_accumulator="float32") > 2


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_products_that_underflow_add_half_a_subnormal_each(
    caller: Any, dtype: str
) -> None:
    """The documented bound, with an oracle of rational numbers."""
    m, n, k = 40, 6, 5
    limits = np.finfo(oracle.numpy_dtype(dtype))
    eta = Fraction(float(limits.smallest_subnormal)) / 2
    u = Fraction(float(limits.eps)) / 2
    # Products of about the smallest subnormal number.
    scale = 2.0 ** (math.log2(float(limits.smallest_subnormal)) / 2 + 0.5)
    x, w, dy = (a * limits.dtype.type(scale) for a in oracle.operands(m, n, k, dtype))
    result = caller.gradients(x, w, dy)

    def gamma(length: int) -> Fraction:
        return length * u / (1 - length * u)

    blocks = result.receipt.blocks
    length_of_dw = min(m, result.receipt.block_rows) + blocks
    needed = False
    for found, a, b, length in (
        (result.y, x, w, n),
        (result.dx, dy, w.T, k),
        (result.dw, x.T, dy, length_of_dw),
    ):
        for (i, j), element in np.ndenumerate(found):
            products = [
                Fraction(float(one)) * Fraction(float(other))
                for one, other in zip(a[i], b[:, j], strict=True)
            ]
            error = abs(Fraction(float(element)) - sum(products))
            relative = gamma(length) * sum(map(abs, products))
            assert error <= relative + (1 + gamma(length)) * len(products) * eta
            needed |= error > relative
    assert needed  # without the term, the bound does not hold


def test_a_row_alone_is_as_exact_as_in_its_batch(caller: Any) -> None:
    """Its bits may be others: a BLAS has other kernels for it."""
    x, w, dy = oracle.operands(50, 40, 30)
    batch = caller.gradients(x, w, dy)
    oracle.assert_right(batch, x, w, dy, "float32")
    for row in (0, 17, 49):
        one = slice(row, row + 1)
        alone = caller.gradients(x[one], w, dy[one])
        oracle.assert_right(alone, x[one], w, dy[one], "float32")
        again = caller.gradients(x[one], w, dy[one])
        assert all(map(oracle.same_bits, alone, again))


def test_nan_and_infinity_are_data(caller: Any) -> None:
    x = np.array([[np.nan, 1.0], [np.inf, 2.0]], np.float32)
    w, dy = np.ones((2, 2), np.float32), np.ones((2, 2), np.float32)
    result = caller.gradients(x, w, dy)
    assert np.isnan(result.y[0]).all()
    assert np.isposinf(result.y[1]).all()
    assert np.isnan(result.dw[0]).all()
    assert np.array_equal(result.dw[1], [3, 3])


def test_the_receipt_says_what_became_of_the_job(caller: Any) -> None:
    x, w, dy = oracle.operands(150, 40, 30)
    result = caller.gradients(x, w, dy, request_id="my own id")
    receipt = result.receipt
    assert receipt.job_id == "my own id"
    assert receipt.m == 150
    assert receipt.blocks == -(-150 // receipt.block_rows)
    assert receipt.bytes_received == x.nbytes + w.nbytes + dy.nbytes
    assert receipt.bytes_sent == sum(array.nbytes for array in result)
    assert receipt.server_instance == caller.server_info().server_instance
    assert receipt.fingerprint.block_rows == receipt.block_rows
    assert receipt.device.backend == BACKEND
    assert 0 < receipt.computing_s <= receipt.total_s


def test_results_can_be_pickled(caller: Any) -> None:
    import pickle

    for result in (
        caller.gradients(*oracle.operands(3, 4, 5)),
        caller.backward(*oracle.operands(3, 4, 5)),
    ):
        twin = pickle.loads(pickle.dumps(result))
        assert type(twin) is type(result)
        assert twin.receipt == result.receipt
        assert oracle.same_bits(twin.dw, result.dw)


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch")


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_torch_tensors_are_operands_with_or_without_grad(
    caller: Any, torch: Any, dtype: str
) -> None:
    operands = oracle.operands(20, 10, 15, dtype)
    expected = caller.gradients(*operands)
    tensors = []
    for operand in operands:
        wide = torch.from_numpy(operand.astype(np.float64))
        tensors.append(wide.to(getattr(torch, dtype)).requires_grad_())
    turned = [tensor.T.contiguous().T for tensor in tensors]
    for layout in (tensors, turned):
        for one, other in zip(caller.gradients(*layout), expected, strict=True):
            assert one.dtype is getattr(torch, dtype)
            assert not one.requires_grad
            assert one.double().numpy().tolist() == other.astype("f8").tolist()


def test_a_tensor_that_is_only_traced_is_refused(caller: Any, torch: Any) -> None:
    """Instead of computing with whatever is in memory."""
    x, w, _ = oracle.operands(20, 10, 15)

    def traced(rows: Any) -> Any:
        return torch.as_tensor(caller.forward(rows, w))

    with pytest.raises(gradwire.InputError, match="no memory of its own"):
        torch.func.functionalize(traced)(torch.from_numpy(x))


def test_an_image_of_pillow_is_an_operand(caller: Any) -> None:
    image = pytest.importorskip("PIL.Image")
    x, w, _ = oracle.operands(20, 10, 15)
    actual = caller.forward(image.fromarray(x), w)
    assert oracle.same_bits(actual, caller.forward(x, w))


def test_torchs_own_autograd_agrees(caller: Any, torch: Any) -> None:
    x, w, dy = oracle.operands(60, 20, 10, "float64")
    tx = torch.from_numpy(x).requires_grad_()
    tw = torch.from_numpy(w).requires_grad_()
    (tx @ tw).backward(torch.from_numpy(dy))
    result = caller.backward(x, w, dy)
    allowed = oracle.bounds(x, w, dy, "float64")
    assert (np.abs(result.dx - tx.grad.numpy()) <= 2 * allowed["dx"]).all()
    assert (np.abs(result.dw - tw.grad.numpy()) <= 2 * allowed["dw"]).all()


def test_a_torch_tensor_takes_a_result(caller: Any, torch: Any) -> None:
    x, w, _ = oracle.operands(20, 10, 15)
    for dtype in ("float32", "bfloat16"):
        y = torch.empty((20, 15), dtype=getattr(torch, dtype))
        assert caller.forward(x, w, out=y, result_dtype=dtype) is y
        expected = caller.forward(x, w, result_dtype=dtype)
        assert torch.equal(y.double(), torch.from_numpy(expected.astype(np.float64)))
    with pytest.raises(gradwire.InputError, match="requires grad"):
        caller.forward(x, w, out=torch.empty((20, 15), requires_grad=True))


def test_jax_arrays_are_operands(caller: Any) -> None:
    jax_numpy = pytest.importorskip("jax.numpy")
    for dtype in ("float32", "bfloat16"):
        operands = oracle.operands(20, 10, 15, dtype)
        expected = caller.gradients(*operands)
        actual = caller.gradients(*(jax_numpy.asarray(a) for a in operands))
        for one, other in zip(actual, expected, strict=True):
            assert oracle.same_bits(one, other)


def test_no_array_library_is_imported_for_it(small_blocks: ServerProcess) -> None:
    program = """if True:
        import sys
        import numpy as np
        import gradwire

        with gradwire.connect(sys.argv[1], timeout_s=30) as client:
            ones = np.ones((3, 3))
            assert client.gradients(ones, ones, ones).dw.sum() == 27
        print({"cupy", "torch", "jax"} & set(sys.modules))
    """
    done = subprocess.run(
        [sys.executable, "-c", program, small_blocks.address],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "set()\n", done.stderr
