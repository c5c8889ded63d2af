from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import gradwire
from gradwire._api.options import parse_dtype, parse_options
from gradwire._core import unary
from gradwire._core.job_plan import Plan, plan_arrays, read_operands
from gradwire_protocol import checksum
from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.matrices import OPERANDS, Matrix

ALL = ("y", "dx", "dw")


def ones(*shape: int, dtype: Any = np.float32) -> Any:
    return np.ones(shape, dtype)


def plan(x: Any, w: Any, dy: Any, results: Any = ALL, **options: Any) -> Plan:
    given = dict(zip(OPERANDS, (x, w, dy), strict=True))
    parsed = parse_options(results=results, **options)
    return plan_arrays(read_operands(given, parsed), parsed)[0]


@pytest.mark.parametrize(
    ("x", "w", "dy", "results", "sentence"),
    [
        (
            ones(3, 4),
            ones(5, 6),
            ones(3, 6),
            ALL,
            "x has shape (3, 4) and w (5, 6): x's columns (4) must equal w's rows (5)",
        ),
        (
            ones(3, 4),
            ones(4, 6),
            ones(3, 5),
            ALL,
            "dy has shape (3, 5) and w (4, 6): dy's columns (5) must equal w's columns"
            " (6)",
        ),
        (
            ones(3, 4),
            ones(4, 6),
            ones(2, 6),
            ALL,
            "x has shape (3, 4) and dy (2, 6): x's rows (3) must equal dy's rows (2)",
        ),
        (
            ones(2, 3, 4),
            ones(4, 6),
            ones(6, 6),
            ALL,
            "x has shape (2, 3, 4) and dy (6, 6): all dimensions but the last must be"
            " equal",
        ),
        (
            ones(3, 4),
            ones(1, 4, 6),
            ones(3, 6),
            ALL,
            "w has shape (1, 4, 6): expected a matrix with two dimensions",
        ),
        (
            ones(3, 4),
            ones(4, 6, dtype=np.float64),
            ones(3, 6),
            ALL,
            "x is float32 and w is float64: expected one dtype for all operands;"
            " convert one, for example w.astype(x.dtype)",
        ),
        (
            ones(3, 4),
            ones(4, 6),
            ones(3, 6, dtype=np.float16),
            ALL,
            "x is float32 and dy is float16: expected one dtype for all operands;"
            " convert one, for example dy.astype(x.dtype)",
        ),
        (None, ones(4, 6), ones(3, 6), "y", "y needs x and w, but x is None"),
        (ones(3, 4), None, ones(3, 6), ALL, "y needs x and w, but w is None"),
        (ones(3, 4), ones(4, 6), None, "dw", "dw needs x and dy, but dy is None"),
        # What is not needed has to fit all the same.
        (
            ones(3, 4),
            ones(5, 6),
            ones(3, 6),
            "dw",
            "x has shape (3, 4) and w (5, 6): x's columns (4) must equal w's rows (5)",
        ),
    ],
)
def test_operands_that_do_not_fit_are_refused_with_both_shapes(
    x: Any, w: Any, dy: Any, results: Any, sentence: str
) -> None:
    with pytest.raises(gradwire.InputError) as refused:
        plan(x, w, dy, results)
    assert str(refused.value) == sentence


@pytest.mark.parametrize(
    ("results", "sent"),
    [
        ("y", "x w"),
        ("dx", "w dy"),
        ("dw", "x dy"),
        (("y", "dx"), "x w dy"),
        (("y", "dw"), "x w dy"),
        (ALL, "x w dy"),
    ],
)
def test_only_what_the_results_need_is_sent(results: Any, sent: str) -> None:
    job = plan(ones(3, 4), ones(4, 6), ones(3, 6), results).header()
    assert " ".join(n for n in ("x", "w", "dy") if job.HasField(n)) == sent
    assert (job.m, job.n, job.k) == (3, 4, 6)


@pytest.mark.parametrize(
    ("results", "missing"), [("y", "dy"), ("dx", "x"), ("dw", "w")]
)
def test_sizes_follow_from_what_is_there(results: str, missing: str) -> None:
    given = {"x": ones(2, 3, 4), "w": ones(4, 6), "dy": ones(2, 3, 6)}
    given[missing] = None
    made = plan(*given.values(), results)
    assert (made.m, made.n, made.k) == (6, 4, 6)


def test_every_option_is_in_the_header() -> None:
    job = plan(
        ones(3, 4),
        ones(4, 6),
        ones(3, 6),
        results=("dw", "y"),
        result_dtype={"dw": "float64"},
        dw_accumulator="float64",
        allow_tf32=True,
        checksum=True,
        request_id="my job",
        block_rows=256,
    ).header()
    assert job.job_id == "my job"
    assert job.dtype == job.y.dtype == Dtype.FLOAT32
    assert job.dw.dtype == Dtype.FLOAT64
    assert not job.HasField("dx")
    assert job.numerics.dw_accumulator == Dtype.FLOAT64
    assert job.numerics.allow_tf32
    assert job.block_rows == 256
    assert job.checksum == 1
    assert job.y.HasField("inline")
    assert job.x.HasField("inline")


def test_a_job_without_an_id_gets_one_that_differs() -> None:
    ids = {parse_options(results="y").job_id for _ in range(100)}
    assert len(ids) == 100


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"results": ()}, "results is empty: name at least one of y, dx, dw, db"),
        ({"results": "z"}, "results has 'z'; it can have y, dx, dw, db"),
        ({"results": ("y", "x")}, "results has 'x'"),
        (
            {"metadata": {"trace": "x" * 4000, "bytes-bin": b"x" * 3000}},
            "metadata has 8078 bytes, with its keys and the token: expected at most",
        ),
        ({"results": 5}, "results is 5: expected names, such as"),
        ({"results": None}, "results is None: expected names, such as"),
        ({"results": [["y"]]}, "results has ['y']; it can have y, dx, dw, db"),
        ({"result_dtype": "int8"}, "result_dtype is 'int8': expected one of float16"),
        ({"result_dtype": np.int64}, "result_dtype is"),
        ({"result_dtype": [("a", "f4", -1)]}, "result_dtype is"),
        (
            {"result_dtype": {"dw": "f99"}},
            "result_dtype['dw'] is 'f99': expected one of",
        ),
        (
            {"results": "y", "result_dtype": {"dw": "float32"}},
            "result_dtype has 'dw': expected one of the wanted results, y",
        ),
        ({"dw_accumulator": "float16"}, "expected one of float32, float64"),
        ({"dw_accumulator": "int8"}, "is 'int8': expected one of float32, float64"),
        ({"block_rows": 100}, 'block_rows is 100: expected a power of two, "auto"'),
        ({"block_rows": -8}, "block_rows is -8: expected a power of two"),
        ({"block_rows": 1 << 63}, "expected a power of two"),
        ({"block_rows": 8.0}, "block_rows is 8.0: expected a power of two"),
        ({"block_rows": True}, "block_rows is True: expected a power of two"),
        ({"block_rows": "all"}, "block_rows is 'all': expected a power of two"),
        ({"wire_dtype": "float64"}, "is float64: expected one of float16, bfloat16"),
        ({"wire_dtype": "int8"}, "is 'int8': expected one of float16, bfloat16"),
        (
            {"timeout_s": 0},
            "timeout_s is 0: expected a number of seconds above 0, or None",
        ),
        ({"timeout_s": -1.5}, "timeout_s is -1.5"),
        ({"timeout_s": float("nan")}, "timeout_s is nan"),
        ({"timeout_s": "soon"}, "timeout_s is 'soon'"),
        ({"timeout_s": -(10**400)}, "expected a number of seconds above 0, or None"),
        ({"request_id": ""}, "expected 1 to 128 printable ASCII characters"),
        ({"request_id": "x" * 129}, "expected 1 to 128 printable ASCII characters"),
        ({"request_id": "é"}, "expected 1 to 128 printable ASCII characters"),
        ({"request_id": "a\nb"}, "expected 1 to 128 printable ASCII characters"),
        ({"request_id": 7}, "request_id is 7: expected a string"),
        ({"on_progress": 7}, "on_progress is 7: expected a callable"),
        ({"metadata": 5}, "metadata is 5: expected a mapping or pairs (key, value)"),
        (
            {"metadata": None},
            "metadata is None: expected a mapping or pairs (key, value)",
        ),
        ({"metadata": ["abc"]}, "metadata has 'abc': expected pairs (key, value)"),
        ({"metadata": ["ab"]}, "metadata has 'ab': expected pairs (key, value)"),
        ({"metadata": [7]}, "metadata has 7: expected pairs (key, value)"),
        ({"metadata": {"Key": "v"}}, "the metadata key 'Key' is invalid"),
        (
            {"metadata": {"grpc-x": "v"}},
            "the metadata key 'grpc-x' is reserved for gRPC",
        ),
        ({"metadata": {"key": b"v"}}, "expected a string, or bytes for keys"),
        ({"metadata": {"key-bin": "v"}}, "expected a string, or bytes for"),
        ({"metadata": {"key": "é"}}, "not printable ASCII"),
    ],
)
def test_an_option_that_cannot_be_is_refused_by_name(
    options: dict[str, Any], says: str
) -> None:
    with pytest.raises(gradwire.InputError) as refused:
        parse_options(**{"results": ALL} | options)
    assert says in str(refused.value)


def test_a_float32_accumulator_of_float64_operands_is_refused() -> None:
    wide = (ones(*shape, dtype=np.float64) for shape in ((3, 4), (4, 6), (3, 6)))
    with pytest.raises(gradwire.InputError, match="dw_accumulator is float32, but the"):
        plan(*wide, dw_accumulator="float32")


def test_checksums_without_their_library_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checksum, "AVAILABLE", False)
    with pytest.raises(gradwire.InputError, match="pip install google-crc32c"):
        parse_options(results="y", checksum=True)


@pytest.mark.parametrize(
    "dtype", ["float32", np.float32, np.dtype("float32"), np.dtype(">f4")]
)
def test_a_dtype_may_be_named_as_numpy_users_do(dtype: Any) -> None:
    options = parse_options(results=ALL, result_dtype=dtype)
    assert set(options.result_dtypes.values()) == {Dtype.FLOAT32}


def test_a_result_whose_dtype_is_none_has_the_operands_own() -> None:
    spec = {"y": None, "dw": "float64"}
    made = plan(ones(3, 4), ones(4, 6), ones(3, 6), result_dtype=spec)
    dtypes = {result.label: made.result_dtype(result) for result in made.results}
    assert dtypes == {"y": Dtype.FLOAT32, "dx": Dtype.FLOAT32, "dw": Dtype.FLOAT64}


@pytest.mark.parametrize("endless", [math.inf, 1e18, 1e300, 10**400])
def test_a_timeout_longer_than_grpc_counts_is_a_year(endless: Any) -> None:
    # Not None, for which the client's own would stand.
    assert parse_options(results="y", timeout_s=endless).timeout_s == 31_536_000
    assert parse_options(results="y", timeout_s=86400).timeout_s == 86400


@pytest.mark.parametrize("names", ["dw", ["dw"], {"dw"}, iter(("dw", "dw"))])
def test_results_may_be_any_collection_of_names(names: Any) -> None:
    assert parse_options(results=names).results == (Matrix.DW,)


def test_jobs_go_in_one_message_up_to_what_the_contract_allows() -> None:
    def suits(*job: Any, **options: Any) -> bool:
        return unary.suits_one_message(plan(*job, **options))

    assert suits(ones(10, 10), ones(10, 10), ones(10, 10))
    # 4,128,768 bytes of elements each way, docs/contract.md.
    most = 4_128_768 // 4
    assert suits(ones(1, 1), ones(1, most - 1), None, "y")
    assert not suits(ones(1, 1), ones(1, most), None, "y")
    # An outer product has a small request and a large response.
    column, row = ones(2000, 1), ones(1, 2000)
    assert not suits(column, row, None, "y")
    assert not suits(ones(10, 10), ones(10, 10), None, "y", checksum=True)


@pytest.mark.parametrize(
    "options",
    [
        {"block_rows": 512},
        {"on_progress": print},
        {"checkpoint_rows": 0},
    ],
    ids=str,
)
def test_a_job_that_gains_by_a_stream_is_streamed_unless_it_is_small(
    options: dict[str, Any],
) -> None:
    large, small = ones(600, 600), ones(300, 300)
    assert unary.suits_one_message(plan(large, large, None, "y"))
    assert not unary.suits_one_message(plan(large, large, None, "y", **options))
    assert unary.suits_one_message(plan(small, small, None, "y", **options))
    # One block has no first results that could leave early.
    assert unary.suits_one_message(plan(large, large, None, "y", block_rows=1024))


@pytest.mark.parametrize(
    ("given", "label"),
    [
        ("f4", "float32"),
        ("<f4", "float32"),
        ("double", "float64"),
        ("half", "float16"),
        ("bf16", "bfloat16"),
        ("fp16", "float16"),
        ("torch.bfloat16", "bfloat16"),
        (np.float32, "float32"),
        (ml_dtypes.bfloat16, "bfloat16"),
        (np.dtype(">f8"), "float64"),
    ],
)
def test_a_dtype_has_many_names(given: Any, label: str) -> None:
    assert parse_dtype(given, "result_dtype") is Dtype.named(label)


def test_a_dtype_of_pytorch_is_taken() -> None:
    torch = pytest.importorskip("torch")
    for label in ("float16", "bfloat16", "float32", "float64"):
        dtype = getattr(torch, label)
        assert parse_dtype(dtype, "result_dtype") is Dtype.named(label)
    with pytest.raises(gradwire.InputError, match="int8: expected one of"):
        parse_dtype(torch.int8, "result_dtype")


@pytest.mark.parametrize("given", ["float", "torch.float", "float8_e4m3fn", "f3"])
def test_a_name_that_may_be_two_dtypes_is_refused(given: str) -> None:
    with pytest.raises(gradwire.InputError, match="expected one of float16, bfloat16"):
        parse_dtype(given, "result_dtype")
