"""float32 operands and results in half the bytes, with a bounded error."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gradwire
from bench.links.relay import Link
from tests.scenarios import ways
from tests.scenarios.ways import Way
from tests.support import oracle
from tests.support.serving import ServerProcess

M, N, K = 211, 30, 20
NAMES = ("y", "dx", "dw")
NARROW = ("bfloat16", "float16")
U32 = 2.0**-24


def bounds(
    x: Any, w: Any, dy: Any, wire_dtype: str, block_rows: int, *, full: tuple[str, ...]
) -> dict[str, Any]:
    """The formula of docs/gradients.md; `full`: results that came as float32.

    Those are the contract's to round to float32, in which they are summed.
    """
    v = {"bfloat16": 2.0**-8, "float16": 2.0**-11}[wire_dtype]
    s = {"bfloat16": 2.0**-134, "float16": 2.0**-25}[wire_dtype]
    magnitudes = [np.abs(a.astype(np.float64)) for a in (x, w, dy)]
    exact = oracle.exact(*magnitudes)
    rounded = oracle.exact(*((1 + v) * a + s for a in magnitudes))
    rows = len(x)
    blocks = -(-rows // block_rows)
    lengths = {
        "y": w.shape[0],
        "dx": w.shape[1],
        "dw": min(rows, block_rows + blocks),
    }
    allowed = {}
    for name, length in lengths.items():
        gamma = length * U32 / (1 - length * U32)
        share, tiny = (0.0, 0.0) if name in full else (v, s)
        allowed[name] = (1 + share) * (1 + gamma) * rounded[name] + tiny - exact[name]
    return allowed


def assert_within_bounds(
    result: Any, x: Any, w: Any, dy: Any, wire_dtype: str, full: tuple[str, ...] = ()
) -> None:
    allowed = bounds(x, w, dy, wire_dtype, result.receipt.block_rows, full=full)
    for name, expected in oracle.exact(x, w, dy).items():
        actual = getattr(result, name)
        if actual is None:
            continue
        assert actual.dtype == np.float32
        error = np.abs(actual.astype(np.float64) - expected)
        assert (error <= allowed[name]).all(), name


def rounded(arrays: Any, dtype: str) -> list[Any]:
    return [array.astype(oracle.numpy_dtype(dtype)) for array in arrays]


def assert_same(actual: Any, expected: Any) -> None:
    for name, one, other in zip(NAMES, actual, expected, strict=True):
        assert oracle.same_bits(np.asarray(one), np.asarray(other)), name


def widened(result: Any) -> list[Any]:
    return [array.astype(np.float32) for array in result]


@settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    m=st.integers(0, 300),
    n=st.integers(0, 60),
    k=st.integers(0, 60),
    wire_dtype=st.sampled_from(NARROW),
    # Down to where float16 has no digits left.
    scale=st.sampled_from([1.0, 30.0, 2.0**-13, 2.0**-22]),
    way=st.sampled_from(ways.WAYS),
    full=st.booleans(),
)
def test_the_error_is_within_the_stated_bound(
    caller_of: Any,
    m: int,
    n: int,
    k: int,
    wire_dtype: str,
    scale: float,
    way: Way,
    full: bool,
) -> None:
    x, w, dy = (np.float32(scale) * a for a in oracle.operands(m, n, k))
    result = caller_of("sync", way).gradients(
        x,
        w,
        dy,
        wire_dtype=wire_dtype,
        result_dtype={"dw": "float32"} if full else None,
    )
    assert_within_bounds(result, x, w, dy, wire_dtype, ("dw",) if full else ())


@pytest.mark.parametrize("wire_dtype", NARROW)
@pytest.mark.parametrize("checksum", [False, True])
def test_the_bits_are_those_of_operands_rounded_beforehand(
    caller: Any, wire_dtype: str, checksum: bool
) -> None:
    operands = oracle.operands(M, N, K)
    narrow = caller.gradients(*rounded(operands, wire_dtype))
    result = caller.gradients(*operands, wire_dtype=wire_dtype, checksum=checksum)
    assert_same(result, widened(narrow))
    assert result.receipt.blocks > 2


@pytest.mark.parametrize("wire_dtype", NARROW)
def test_the_bits_are_the_same_in_messages_that_split_rows(
    streamer: Any, wire_dtype: str
) -> None:
    operands = oracle.operands(M, N, K)
    narrow = streamer.gradients(*rounded(operands, wire_dtype))
    streamer.tune(chunk_bytes=50)
    result = streamer.gradients(*operands, wire_dtype=wire_dtype)
    assert_same(result, widened(narrow))


@pytest.mark.parametrize("wire_dtype", NARROW)
def test_half_the_bytes_travel_and_the_receipt_says_so(
    caller: Any, wire_dtype: str
) -> None:
    operands = oracle.operands(M, N, K)
    wide = caller.gradients(*operands)
    told: list[gradwire.Progress] = []
    half = caller.gradients(*operands, wire_dtype=wire_dtype, on_progress=told.append)
    assert half.receipt.bytes_received == wide.receipt.bytes_received // 2
    assert half.receipt.bytes_sent == wide.receipt.bytes_sent // 2
    assert told[-1].bytes_sent == told[-1].bytes_to_send == half.receipt.bytes_received
    assert half.receipt.dtype == wire_dtype
    assert half.receipt.result_dtypes == dict.fromkeys(NAMES, wire_dtype)
    assert wide.receipt.dtype == "float32"
    assert wide.receipt.result_dtypes == dict.fromkeys(NAMES, "float32")


def test_the_network_carries_half_the_bytes(small_blocks: ServerProcess) -> None:
    x, w, dy = oracle.operands(4_000, 32, 32)
    counted = {}
    for wire_dtype in (None, "bfloat16"):
        with (
            Link(small_blocks.address) as link,
            gradwire.connect(link.address, transport="grpc", timeout_s=60) as client,
        ):
            client.gradients(x, w, dy, wire_dtype=wire_dtype)
            counted[wire_dtype] = link.up_bytes, link.down_bytes
    # What gRPC adds to either is a few percent.
    elements = x.size + dy.size
    for wide, half in zip(counted[None], counted["bfloat16"], strict=True):
        assert wide > 4 * elements
        assert 2 * elements < half < 0.55 * wide


def test_a_result_that_is_named_travels_as_it_was_summed(caller: Any) -> None:
    operands = oracle.operands(M, N, K)
    exact = caller.gradients(*rounded(operands, "bfloat16"), result_dtype="float32")
    result = caller.gradients(
        *operands,
        wire_dtype="bfloat16",
        result_dtype={"dw": "float32", "dx": "bfloat16"},
        dw_accumulator="float32",
    )
    assert oracle.same_bits(result.dw, exact.dw)
    assert result.y.dtype == np.float32
    assert result.dx.dtype == ml_dtypes.bfloat16
    assert result.receipt.result_dtypes == {
        "y": "bfloat16",
        "dx": "bfloat16",
        "dw": "float32",
    }


def test_forward_and_backward_take_it_too(caller: Any) -> None:
    x, w, dy = oracle.operands(M, N, K)
    expected = widened(caller.gradients(*rounded((x, w, dy), "float16")))
    y = caller.forward(x, w, wire_dtype="float16")
    assert_same((y, *caller.backward(x, w, dy, wire_dtype="float16")), expected)


@pytest.mark.thorough
@pytest.mark.parametrize("known", [True, False], ids=["known m", "unknown m"])
@pytest.mark.parametrize("sizes", [[M], [1], [1, 0, 7, 64], [63]], ids=str)
@pytest.mark.parametrize("wire_dtype", NARROW)
def test_streams_of_rows_take_it_too(
    streamer: Any, known: bool, sizes: list[int], wire_dtype: str
) -> None:
    x, w, dy = oracle.operands(M, N, K)

    def parts() -> Iterator[Any]:
        row, number = 0, 0
        while row < M:
            size = sizes[number % len(sizes)]
            yield x[row : row + size], dy[row : row + size]
            row, number = row + size, number + 1

    blocks, dw, receipt = streamer.stream(
        parts(), w, m=M if known else None, wire_dtype=wire_dtype
    )
    y = np.concatenate([block.y for block in blocks])
    dx = np.concatenate([block.dx for block in blocks])
    expected = streamer.gradients(*rounded((x, w, dy), wire_dtype))
    assert_same((y, dx, dw), widened(expected))
    assert receipt.dtype == wire_dtype


def out_arrays(layout: str) -> dict[str, Any]:
    shapes = {"y": (M, K), "dx": (M, N), "dw": (N, K)}
    if layout == "big-endian":
        return {name: np.empty(shape, ">f4") for name, shape in shapes.items()}
    order: Any = layout
    return {n: np.empty(shape, "f4", order=order) for n, shape in shapes.items()}


@pytest.mark.parametrize("layout", ["C", "F", "big-endian"])
def test_results_go_to_the_callers_float32_arrays(caller: Any, layout: str) -> None:
    operands = oracle.operands(M, N, K)
    expected = widened(caller.gradients(*rounded(operands, "bfloat16")))
    out = out_arrays(layout)
    result = caller.gradients(*operands, wire_dtype="bfloat16", out=out)
    for name, other in zip(NAMES, expected, strict=True):
        assert getattr(result, name) is out[name]
        native = np.ascontiguousarray(out[name]).astype(np.float32)
        assert oracle.same_bits(native, other)
    narrow = np.empty((M, K), ml_dtypes.bfloat16)
    with pytest.raises(gradwire.InputError, match="out's y is bfloat16: expected floa"):
        caller.gradients(*operands, wire_dtype="bfloat16", out={"y": narrow})


def fortran(array: Any) -> Any:
    return np.asfortranarray(array)


def big_endian(array: Any) -> Any:
    return array.astype(">f4")


def nested_rows(array: Any) -> Any:
    return np.repeat(array, 2, axis=1)[:, ::2]


def torch_tensor(array: Any) -> Any:
    torch = pytest.importorskip("torch")
    return torch.from_numpy(array).requires_grad_()


@pytest.mark.thorough
@pytest.mark.parametrize("kind", [fortran, big_endian, nested_rows, torch_tensor])
def test_every_kind_of_array_is_rounded_the_same(caller: Any, kind: Any) -> None:
    operands = oracle.operands(M, N, K)
    expected = caller.gradients(*operands, wire_dtype="bfloat16")
    given = (kind(operand) for operand in operands)
    assert_same(caller.gradients(*given, wire_dtype="bfloat16"), expected)


@pytest.mark.parametrize("lead", [(2, 3, 4), (0, 3)])
def test_leading_dimensions_come_back(caller: Any, lead: tuple[int, ...]) -> None:
    x, w, dy = oracle.operands(int(np.prod(lead)), N, K)
    flat = caller.gradients(x, w, dy, wire_dtype="float16")
    result = caller.gradients(
        x.reshape(*lead, N), w, dy.reshape(*lead, K), wire_dtype="float16"
    )
    assert result.y.shape == (*lead, K)
    assert result.dx.shape == (*lead, N)
    assert oracle.same_bits(result.dw, flat.dw)
    assert oracle.same_bits(result.y.reshape(-1, K), flat.y)


def test_a_finite_operand_that_would_be_inf_is_refused(caller: Any) -> None:
    x, w, dy = oracle.operands(M, N, K)
    x[200, 7] = 65520
    says = "x has 65520 in row 200, column 7: float16 has at most 65504"
    with pytest.raises(gradwire.InputError, match=says):
        caller.gradients(x, w, dy, wire_dtype="float16")
    # The connection and the server are as good as before.
    x[200, 7] = 65519
    y = caller.forward(x, w, wire_dtype="float16", result_dtype="float32")
    assert np.isfinite(y).all()
    assert np.isfinite(caller.forward(x * 2, w, wire_dtype="bfloat16")).all()


@pytest.mark.parametrize("size", [1, 50])
def test_a_stream_names_the_row_of_the_whole_job(streamer: Any, size: int) -> None:
    x, w, dy = oracle.operands(M, N, K)
    dy[200, 7] = -1e6
    parts = [(x[at : at + size], dy[at : at + size]) for at in range(0, M, size)]
    says = r"dy has -1e\+06 in row 200, column 7: float16"
    with pytest.raises(gradwire.InputError, match=says):
        streamer.stream(parts, w, wire_dtype="float16")


def test_nan_and_infinity_are_data_and_a_result_too_large_is_inf(caller: Any) -> None:
    x = np.array([[np.nan, 1.0], [np.inf, 2.0], [6e4, 6e4]], np.float32)
    w = np.ones((2, 2), np.float32)
    y = caller.forward(x, w, wire_dtype="float16")
    assert np.isnan(y[0]).all()
    assert np.isposinf(y[1:]).all()
    full = caller.forward(x, w, wire_dtype="float16", result_dtype="float32")
    assert np.array_equal(full[2], 2 * x[2])


def test_operands_of_another_dtype_are_refused(caller: Any) -> None:
    operands = oracle.operands(M, N, K, "float64")
    says = "x is float64, but wire_dtype is for float32 operands"
    with pytest.raises(gradwire.InputError, match=says):
        caller.gradients(*operands, wire_dtype="bfloat16")
    with pytest.raises(
        gradwire.InputError, match="wire_dtype is float64: expected one of"
    ):
        caller.gradients(*operands, wire_dtype="float64")


@pytest.mark.parametrize("wire_dtype", NARROW)
@pytest.mark.parametrize("given", [True, False], ids=["out", "fresh"])
def test_arrays_that_the_client_handed_out_stay_float32(
    caller: Any, wire_dtype: str, given: bool
) -> None:
    operands = oracle.operands(M, N, K)
    expected = widened(caller.gradients(*rounded(operands, wire_dtype)))
    arrays = [caller.empty(operand.shape) for operand in operands]
    for one, operand in zip(arrays, operands, strict=True):
        one[...] = operand
    out = tuple(caller.empty(a.shape) for a in expected) if given else None
    result = caller.gradients(*arrays, wire_dtype=wire_dtype, out=out)
    assert_same(result, expected)
    assert_same(arrays, operands)
