from __future__ import annotations

import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import gradwire
from gradwire._api.options import parse_options
from gradwire._arrays.array_sink import ArraySink
from gradwire._arrays.operand import operand
from gradwire._arrays.wire_cast import overflows_from
from gradwire._core.job_plan import plan_arrays, read_operands
from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.matrices import Matrix
from tests.client.arrays.test_operand import LAYOUTS

NARROW = (Dtype.BFLOAT16, Dtype.FLOAT16)


def rounded(value: Any, dtype: Dtype) -> Any:
    """The same by NumPy and ml_dtypes themselves."""
    with np.errstate(all="ignore"):
        return np.ascontiguousarray(value).astype(np.float32).astype(dtype.numpy)


def sent(value: Any, dtype: Dtype, elements: int = 5) -> bytes:
    taken = operand(value, "x", dtype)
    assert taken.dtype is dtype
    data = b""
    for index, payload in taken.pieces(0, taken.rows, elements):
        assert index * 2 == len(data)
        data += payload
    assert len(data) == taken.size_bytes
    return data


floats = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=4, min_side=0, max_side=5),
    elements=st.floats(-65504, 65504, width=32) | st.sampled_from([np.nan, np.inf]),
)


@given(value=floats, dtype=st.sampled_from(NARROW), elements=st.integers(1, 9))
def test_every_element_is_rounded_to_nearest(
    value: Any, dtype: Dtype, elements: int
) -> None:
    expected = rounded(value, dtype)
    assert sent(value, dtype, elements) == expected.tobytes()
    taken = operand(value, "x", dtype)
    assert taken.take(0, taken.rows).tobytes() == expected.tobytes()
    room = np.empty(taken.size_bytes, np.uint8)
    taken.copy_to(room)
    assert room.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("elements", [1, 3, 4, 9, 100])
def test_every_layout_is_rounded_the_same(
    dtype: Dtype, layout: str, elements: int
) -> None:
    value = LAYOUTS[layout](np.linspace(-3, 7, 12, dtype="f4").reshape(3, 4))
    assert sent(value, dtype, elements) == rounded(value, dtype).tobytes()


@pytest.mark.parametrize("dtype", NARROW)
def test_rounding_takes_no_memory_that_grows_with_the_operand(dtype: Dtype) -> None:
    wide = np.ones((1, 1 << 22), np.float32)
    for value in (wide, wide.reshape(2048, 2048), wide.reshape(2048, 2048).T):
        taken = operand(value, "x", dtype)
        tracemalloc.start()
        for _ in taken.pieces(0, taken.rows, 1 << 14):
            pass
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        # A few pieces, as they are and rounded, where whole it is 8 MiB.
        assert peak < 20 * (1 << 14)


@pytest.mark.parametrize("dtype", NARROW)
def test_the_first_magnitude_that_overflows_is_known(dtype: Dtype) -> None:
    first = np.float32(overflows_from(dtype))
    assert float(first) == overflows_from(dtype)
    below = np.nextafter(first, np.float32(0))
    assert np.isinf(rounded(first, dtype))
    assert np.isfinite(rounded(below, dtype))
    assert sent(np.full((1, 1), below), dtype)


@pytest.mark.parametrize(
    ("dtype", "value", "says"),
    [
        (
            Dtype.FLOAT16,
            -7e4,
            "x has -70000 in row 2, column 1: float16 has at most 65504; use"
            ' wire_dtype="bfloat16", or omit it',
        ),
        (
            Dtype.BFLOAT16,
            3.4e38,
            "x has 3.4e+38 in row 2, column 1: bfloat16 has at most 3.38953e+38; use"
            " no wire_dtype",
        ),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("elements", [1, 5, 100])
def test_a_finite_element_never_becomes_inf(
    dtype: Dtype, value: float, says: str, layout: str, elements: int
) -> None:
    matrix = np.ones((3, 4), np.float32)
    matrix[0] = np.inf, np.nan, -np.inf, 0
    matrix[2, 1] = value
    if layout == "broadcast":
        matrix = matrix[2:]
        says = says.replace("row 2", "row 0")
    with pytest.raises(gradwire.InputError) as refused:
        sent(LAYOUTS[layout](matrix), dtype, elements)
    assert str(refused.value) == says


def test_the_callers_own_error_settings_do_not_matter() -> None:
    value = np.array([[1e-30, 1e-40, np.inf, np.nan]], np.float32)
    with np.errstate(all="raise"):
        assert len(sent(value, Dtype.FLOAT16)) == 8
        with pytest.raises(gradwire.InputError, match="float16 has at most"):
            sent(np.full((1, 1), 1e9, np.float32), Dtype.FLOAT16)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_only_float32_travels_in_fewer_bits(dtype: Any) -> None:
    with pytest.raises(
        gradwire.InputError,
        match=r"x is b?float\d\d, but wire_dtype is for float32 operands",
    ):
        operand(np.ones((2, 2), dtype), "x", Dtype.BFLOAT16)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("float32", "wire_dtype is float32: expected one of float16, bfloat16"),
        ("float", "wire_dtype is 'float': expected one of float16, bfloat16"),
        (np.int8, "wire_dtype is <class 'numpy.int8'>: expected one of float16"),
    ],
)
def test_a_wire_dtype_that_is_none_is_refused(value: Any, says: str) -> None:
    with pytest.raises(gradwire.InputError) as refused:
        parse_options(results="y", wire_dtype=value)
    assert str(refused.value).startswith(says)


@pytest.mark.parametrize("spec", ["bfloat16", ml_dtypes.bfloat16, Dtype.BFLOAT16.numpy])
def test_arrays_are_float32_where_results_travel_in_less(spec: Any) -> None:
    x, w = np.ones((3, 4), "f4"), np.ones((4, 6), "f4")
    options = parse_options(
        results=("y", "dx", "dw"),
        wire_dtype=spec,
        result_dtype={"dw": "float32", "dx": "float16"},
    )
    plan, _ = plan_arrays(
        read_operands({Matrix.X: x, Matrix.W: w, Matrix.DY: x @ w}, options), options
    )
    assert plan.dtype is Dtype.BFLOAT16
    travels = [plan.result_dtype(matrix) for matrix in plan.results]
    arrays = [plan.array_dtype(matrix) for matrix in plan.results]
    assert travels == [Dtype.BFLOAT16, Dtype.FLOAT16, Dtype.FLOAT32]
    assert arrays == [Dtype.FLOAT32, Dtype.FLOAT16, Dtype.FLOAT32]
    assert plan.upload_bytes(3) == 2 * (3 * 4 + 4 * 6 + 3 * 6)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("order", ["C", "F", ">"])
@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 4), (2, 0, 3), (3, 0)])
@pytest.mark.parametrize("step", [1, 7, 100])
def test_results_are_widened_in_any_layout_in_pieces_of_any_size(
    dtype: Dtype, order: str, shape: tuple[int, ...], step: int
) -> None:
    expected = np.arange(np.prod(shape), dtype=dtype.numpy).reshape(shape)
    array = (
        np.empty(shape, ">f4") if order == ">" else np.empty(shape, "f4", order=order)
    )
    sink = ArraySink(array, dtype)
    # At an odd address, as in a message.
    payload = memoryview(b"\0" + expected.tobytes())[1:]
    for at in range(0, len(payload), 2 * step):
        sink.write(payload[at : at + 2 * step])
    sink.close()
    assert np.array_equal(array, expected.astype(np.float32))
