"""The tables between the wire, NumPy and gRPC are total, both ways."""

import ml_dtypes
import numpy as np
import pytest
from grpc import StatusCode

from gradwire.v1 import matrix_pb2
from gradwire_protocol import limits
from gradwire_protocol.dtypes import ACCUMULATORS, WIRE_DTYPES, Dtype
from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.matrices import (
    DEFAULT_RESULTS,
    OPERANDS,
    PARTIAL_SUMS,
    RESULTS,
    ROW_OPERANDS,
    ROW_RESULTS,
    SUMS,
    Matrix,
    operands_for,
)


def test_every_dtype_of_the_contract_is_known_by_name_and_number():
    of_the_contract = {
        name: number
        for name, number in matrix_pb2.Dtype.items()
        if name != "DTYPE_UNSPECIFIED"
    }
    assert {f"DTYPE_{d.name}": d.value for d in Dtype} == of_the_contract


def test_every_matrix_of_the_contract_is_known_by_name_and_number():
    of_the_contract = {
        name: number
        for name, number in matrix_pb2.Matrix.items()
        if name != "MATRIX_UNSPECIFIED"
    }
    assert {f"MATRIX_{m.name}": m.value for m in Matrix} == of_the_contract


@pytest.mark.parametrize("dtype", Dtype)
def test_a_dtype_is_found_again_from_numpy_and_from_its_name(dtype):
    assert Dtype.of(dtype.numpy) is dtype
    assert Dtype.named(dtype.label) is dtype
    assert np.dtype(dtype.label) == dtype.numpy
    assert dtype.itemsize == dtype.numpy.itemsize


@pytest.mark.parametrize("dtype", [Dtype.FLOAT16, Dtype.FLOAT32, Dtype.FLOAT64])
def test_a_dtype_is_found_in_either_byte_order(dtype):
    assert Dtype.of(dtype.numpy.newbyteorder(">")) is dtype


@pytest.mark.parametrize("name", ["int32", "bool", "complex64", "S4", "O"])
def test_a_dtype_that_the_contract_lacks_is_unknown(name):
    with pytest.raises(KeyError):
        Dtype.of(np.dtype(name))
    with pytest.raises(KeyError):
        Dtype.named(name)


def test_other_16_and_8_bit_floats_are_unknown():
    for other in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2):
        with pytest.raises(KeyError):
            Dtype.of(np.dtype(other))


def test_16_bit_products_are_summed_in_float32_and_others_in_their_own_dtype():
    assert {d: d.sums_in for d in Dtype} == {
        Dtype.FLOAT16: Dtype.FLOAT32,
        Dtype.BFLOAT16: Dtype.FLOAT32,
        Dtype.FLOAT32: Dtype.FLOAT32,
        Dtype.FLOAT64: Dtype.FLOAT64,
    }


def test_dw_is_summed_in_the_dtype_of_the_products_or_a_wider_one():
    assert ACCUMULATORS == (Dtype.FLOAT32, Dtype.FLOAT64)
    for dtype in Dtype:
        wide_only = dtype is Dtype.FLOAT64
        assert dtype.accumulators == ACCUMULATORS[wide_only:]
        assert dtype.default_accumulator in dtype.accumulators


def test_dw_of_float32_is_summed_in_float64_by_default_and_of_16_bits_in_float32():
    assert {d: d.default_accumulator for d in Dtype} == {
        Dtype.FLOAT16: Dtype.FLOAT32,
        Dtype.BFLOAT16: Dtype.FLOAT32,
        Dtype.FLOAT32: Dtype.FLOAT64,
        Dtype.FLOAT64: Dtype.FLOAT64,
    }


def test_float32_alone_may_travel_in_16_bits_and_be_computed_as_tf32():
    assert set(WIRE_DTYPES) == {Dtype.FLOAT16, Dtype.BFLOAT16}
    for dtype in Dtype:
        assert dtype.travels_as == (WIRE_DTYPES if dtype is Dtype.FLOAT32 else ())
        assert dtype.has_tf32 == (dtype is Dtype.FLOAT32)


@pytest.mark.parametrize(
    ("dtype", "unit_roundoff", "smallest_subnormal", "smallest_normal", "largest"),
    [
        (Dtype.FLOAT16, 2.0**-11, 2.0**-24, 2.0**-14, 65504),
        (Dtype.BFLOAT16, 2.0**-8, 2.0**-133, 2.0**-126, 2.0**127 * (2 - 2**-7)),
        (Dtype.FLOAT32, 2.0**-24, 2.0**-149, 2.0**-126, 2.0**127 * (2 - 2**-23)),
        (Dtype.FLOAT64, 2.0**-53, 2.0**-1074, 2.0**-1022, 2.0**1023 * (2 - 2**-52)),
    ],
)
def test_limits_of_a_dtype_are_those_of_ieee_754(
    dtype, unit_roundoff, smallest_subnormal, smallest_normal, largest
):
    assert dtype.unit_roundoff == unit_roundoff
    assert dtype.smallest_subnormal == smallest_subnormal
    assert dtype.smallest_normal == smallest_normal
    assert dtype.largest == largest


def test_operands_and_results_are_all_the_matrices():
    assert set(OPERANDS) | set(RESULTS) == set(Matrix) - set(PARTIAL_SUMS)
    assert not set(OPERANDS) & set(RESULTS)
    assert set(ROW_OPERANDS) < set(OPERANDS)
    assert set(ROW_RESULTS) < set(RESULTS)
    assert all(result.needs for result in RESULTS)
    assert not any(operand.needs for operand in OPERANDS)
    assert set(SUMS) == set(RESULTS) - set(ROW_RESULTS)
    assert set(DEFAULT_RESULTS) < set(RESULTS)


def test_every_sum_has_a_partial_sum_of_its_shape():
    assert PARTIAL_SUMS == {Matrix.DW_SUM: Matrix.DW, Matrix.DB_SUM: Matrix.DB}
    for partial, result in PARTIAL_SUMS.items():
        assert result.partial is partial
        assert partial.shape(2, 3, 5) == result.shape(2, 3, 5)


def test_a_product_takes_two_operations_for_each_of_its_terms():
    operations = {result: result.row_operations(3, 5) for result in RESULTS}
    assert operations == dict.fromkeys(DEFAULT_RESULTS, 30) | {Matrix.DB: 10}


@pytest.mark.parametrize(
    ("results", "operands"),
    [
        ((), ()),
        ((Matrix.Y,), (Matrix.X, Matrix.W)),
        ((Matrix.DX,), (Matrix.W, Matrix.DY)),
        ((Matrix.DW,), (Matrix.X, Matrix.DY)),
        ((Matrix.DB,), (Matrix.DY,)),
        ((Matrix.DX, Matrix.DW), OPERANDS),
        (RESULTS, OPERANDS),
    ],
)
def test_each_result_needs_its_operands(results, operands):
    assert operands_for(results) == operands


def test_shapes_follow_from_m_n_and_k():
    shapes = {m.label: m.shape(2, 3, 5) for m in Matrix}
    assert shapes == {
        "x": (2, 3),
        "w": (3, 5),
        "dy": (2, 5),
        "y": (2, 5),
        "dx": (2, 3),
        "dw": (3, 5),
        "dw_sum": (3, 5),
        "db": (1, 5),
        "db_sum": (1, 5),
    }


def test_rows_have_n_columns_in_x_and_dx_and_k_in_the_others():
    assert {m: m.row_length(3, 5) for m in Matrix} == {
        Matrix.X: 3,
        Matrix.DX: 3,
        Matrix.W: 5,
        Matrix.DW: 5,
        Matrix.DW_SUM: 5,
        Matrix.DB: 5,
        Matrix.DB_SUM: 5,
        Matrix.Y: 5,
        Matrix.DY: 5,
    }


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_has_one_status_that_is_an_error(reason):
    assert isinstance(reason.status, StatusCode)
    assert reason.status is not StatusCode.OK
    assert reason.value == reason.name
    assert str(reason) == reason.name


def test_the_default_chunk_fits_the_largest_payload_and_that_fits_a_message():
    assert limits.DEFAULT_CHUNK_BYTES <= limits.MAX_PAYLOAD_BYTES
    assert limits.MAX_PAYLOAD_BYTES + 64 < limits.MAX_MESSAGE_BYTES
