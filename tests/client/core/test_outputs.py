from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import gradwire
from gradwire._api.options import parse_options
from gradwire._arrays.array_sink import ArraySink
from gradwire._arrays.buffer_pool import ResultPool
from gradwire._core.job_plan import plan_arrays, read_operands
from gradwire._core.outputs import (
    ArrayOutputs,
    given_outputs,
    named_outputs,
    output_shapes,
)
from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.matrices import DEFAULT_RESULTS, RESULTS, Matrix

X, W, DY = np.ones((3, 4), "f4"), np.ones((4, 6), "f4"), np.ones((3, 6), "f4")


def make(out: Any, **options: Any) -> Any:
    given = {Matrix.X: X, Matrix.W: W, Matrix.DY: DY}
    parsed = parse_options(**{"results": ("y", "dx", "dw")} | options)
    plan, operands = plan_arrays(read_operands(given, parsed), parsed)
    return given_outputs(
        plan,
        operands,
        named_outputs(out, RESULTS),
        output_shapes(plan, operands),
    )


def empty(*shape: int, dtype: Any = "f4") -> Any:
    return np.empty(shape, dtype)


def test_arrays_are_made_where_none_are_given() -> None:
    assert make({"dx": None}) == {}
    options = parse_options(results=("y", "dx", "dw"))
    given = {Matrix.X: X, Matrix.W: W, Matrix.DY: DY}
    plan, operands = plan_arrays(read_operands(given, options), options)
    outputs = ArrayOutputs(plan, output_shapes(plan, operands), {}, ResultPool())
    outputs.all()
    shapes = [array.shape for array in outputs.results(DEFAULT_RESULTS)]
    assert shapes == [(3, 6), (3, 4), (4, 6)]


@pytest.mark.parametrize("form", ["mapping", "tuple"])
def test_the_callers_own_array_is_written_and_handed_back(form: str) -> None:
    dw = empty(4, 6)
    made = make({"dw": dw} if form == "mapping" else (None, None, dw))
    assert made[Matrix.DW].handed_back is dw
    assert np.shares_memory(made[Matrix.DW].array, dw)


def strided(*strides: int) -> Any:
    return np.lib.stride_tricks.as_strided(empty(100), (3, 6), strides)


@pytest.mark.parametrize(
    ("out", "options", "says"),
    [
        ({"x": empty(3, 4)}, {}, "out has 'x'; it can have y, dx, dw, db"),
        (
            (empty(3, 6),),
            {},
            "out has 1 entries: expected 3 (y, dx, dw), with None for arrays to be"
            " created",
        ),
        (
            empty(3, 6),
            {},
            'out is a ndarray: expected a mapping such as {"y": array}, or a tuple of'
            " y,"
            " dx, dw",
        ),
        (
            {"dx": empty(3, 4)},
            {"results": "y"},
            "out has dx, which is not in results",
        ),
        ({"y": empty(6, 3)}, {}, "out's y has shape (6, 3): expected (3, 6)"),
        (
            {"y": empty(3, 6, dtype="f8")},
            {},
            "out's y is float64: expected float32; to change that, set"
            ' result_dtype={"y": ...}',
        ),
        (
            {"y": [[0.0] * 6] * 3},
            {},
            "out's y is a list: expected a NumPy array, a PyTorch tensor or a CuPy"
            " array",
        ),
        ({"y": np.broadcast_to(empty(1, 6), (3, 6))}, {}, "out's y is read-only"),
        (
            {"y": strided(0, 4)},
            {},
            "out's y overlaps itself: elements share memory",
        ),
        (
            {"y": strided(4, 4)},
            {},
            "out's y overlaps itself: elements share memory",
        ),
        (
            {"dx": X},
            {},
            "out's dx shares memory with x, which is read while results are written",
        ),
    ],
)
def test_an_array_that_cannot_take_a_result_is_refused_beforehand(
    out: Any, options: Any, says: str
) -> None:
    with pytest.raises(gradwire.InputError) as refused:
        make(out, **options)
    assert str(refused.value) == says


def test_a_tensor_whose_memory_is_not_its_elements_is_refused() -> None:
    torch = pytest.importorskip("torch")
    negated = torch.zeros(3, 6, dtype=torch.complex64).conj().imag
    with pytest.raises(gradwire.InputError, match="would be written to a copy"):
        make({"y": negated})
    with pytest.raises(gradwire.InputError, match="written to a copy"):
        make({"y": torch._efficientzerotensor((3, 6), dtype=torch.float32)})
    with pytest.raises(gradwire.InputError, match="meta device, which has no memory"):
        make({"y": torch.empty(3, 6, device="meta")})
    plain = torch.zeros(3, 6)
    assert make({"y": plain})[Matrix.Y].array.ctypes.data == plain.data_ptr()


def test_a_masked_array_is_no_output() -> None:
    with pytest.raises(gradwire.InputError, match="masked array: pass"):
        make({"y": np.ma.masked_array(empty(3, 6))})


def test_two_outputs_in_the_same_memory_are_refused() -> None:
    shared = empty(4, 6)
    with pytest.raises(gradwire.InputError, match="dw shares memory with out's y"):
        make({"y": shared[:3], "dw": shared})


def test_interleaved_columns_of_one_array_do_not_overlap() -> None:
    both = empty(3, 12)
    made = make({"y": both[:, ::2]})
    assert made[Matrix.Y].handed_back.base is both


def test_strides_of_axes_that_are_not_walked_do_not_matter() -> None:
    for shape, strides in (((1, 6), (0, 4)), ((3, 1), (4, 0)), ((0, 6), (4, 4))):
        array = np.lib.stride_tricks.as_strided(empty(100), shape, strides)
        x, w = np.ones((shape[0], 4), "f4"), np.ones((4, shape[1]), "f4")
        options = parse_options(results="y")
        plan, operands = plan_arrays(
            read_operands({Matrix.X: x, Matrix.W: w}, options), options
        )
        made = given_outputs(
            plan, operands, {Matrix.Y: array}, output_shapes(plan, operands)
        )
        assert made[Matrix.Y].handed_back is array


LAYOUTS: dict[str, Any] = {
    "c": np.empty,
    "fortran": lambda shape, dtype: np.empty(shape, dtype, order="F"),
    "strided": lambda shape, dtype: np.empty((*shape[:-1], 2 * shape[-1]), dtype)[
        ..., ::2
    ],
    "reversed": lambda shape, dtype: np.empty(shape, dtype)[::-1],
    "big-endian": lambda shape, dtype: np.empty(shape, dtype.newbyteorder(">")),
    "moved axes": lambda shape, dtype: np.moveaxis(
        np.empty((shape[-1], *shape[:-1]), dtype), 0, -1
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 4), (2, 0, 3), (0, 4), (3, 0)])
@pytest.mark.parametrize("step", [1, 2, 7, 100])
def test_elements_arrive_in_any_layout_in_pieces_of_any_size(
    layout: str, shape: tuple[int, ...], step: int
) -> None:
    expected = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    array = LAYOUTS[layout](shape, expected.dtype)
    sink = ArraySink(array, Dtype.FLOAT32)
    payload = memoryview(expected.tobytes())
    for at in range(0, len(payload), 4 * step):
        sink.write(payload[at : at + 4 * step])
    sink.close()
    assert np.array_equal(array, expected)


def test_a_large_array_in_another_layout_is_filled_in_parts() -> None:
    expected = np.arange(3 << 18, dtype=np.float32).reshape(-1, 256)
    array = np.empty(expected.shape, np.float32, order="F")
    sink = ArraySink(array, Dtype.FLOAT32)
    sink.write(memoryview(expected.tobytes()))
    sink.close()
    assert np.array_equal(array, expected)
