"""db, the column sums of dY: right, with the same bits in every way, and checked."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gradwire
from tests.scenarios import ways
from tests.scenarios.callers import CALLERS, Caller
from tests.scenarios.ways import Way
from tests.support import oracle
from tests.support.serving import running_server

ALL = ("y", "dx", "dw", "db")


def streamed(caller: Caller, rows: Any, w: Any = None, **options: Any) -> Any:
    """The stream, exhausted."""
    stream = caller.client.stream(rows, w, **options)

    async def collect() -> None:
        async for _ in stream:
            pass

    if isinstance(caller.client, gradwire.AsyncClient):
        caller.run(collect())
    else:
        list(stream)
    return stream


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_every_dtype_is_as_right_as_its_arithmetic_allows(
    caller: Caller, dtype: str
) -> None:
    x, w, dy = oracle.operands(150, 40, 30, dtype)
    result = caller.gradients(x, w, dy, results=ALL, verify=True)
    assert result.receipt.blocks > 1
    assert result.db.shape == (30,)
    oracle.assert_right(result, x, w, dy, dtype)
    y, dx, dw = result
    for one, other in zip((y, dx, dw), caller.gradients(x, w, dy), strict=True):
        assert oracle.same_bits(one, other)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_it_is_the_gradient_of_torchs_bias(client: gradwire.Client, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    x, w, dy = (
        torch.from_numpy(a.astype(np.float64)).to(getattr(torch, dtype))
        for a in oracle.operands(150, 40, 30)
    )
    operands = [a.double().clone().requires_grad_() for a in (x, w, torch.zeros(30))]
    y = torch.nn.functional.linear(operands[0], operands[1].T, operands[2])
    expected = torch.autograd.grad(y, operands, grad_outputs=dy.double())
    result = client.gradients(x, w, dy, results=("dx", "dw", "db"))
    limits = oracle.bounds(*(a.double().numpy() for a in (x, w, dy)), dtype)
    for name, right in zip(("dx", "dw", "db"), expected, strict=True):
        error = (getattr(result, name).double() - right).abs().numpy()
        assert (error <= limits[name]).all()


# The session's clients and server have no state that an example could leave.
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    way=st.sampled_from(ways.WAYS),
    kind=st.sampled_from(list(CALLERS)),
    m=st.one_of(st.integers(0, 5), st.integers(0, 1000)),
    n=st.integers(0, 60),
    k=st.integers(0, 60),
    dtype=st.sampled_from(oracle.DTYPES),
    chunk_bytes=st.integers(100, 5000),
    others=st.sets(st.sampled_from(("y", "dx", "dw"))),
)
def test_any_shape_has_the_same_bits_in_any_way(
    client: gradwire.Client,
    caller_of: Any,
    way: Way,
    kind: str,
    m: int,
    n: int,
    k: int,
    dtype: str,
    chunk_bytes: int,
    others: set[str],
) -> None:
    x, w, dy = oracle.operands(m, n, k, dtype)
    expected = client.gradients(x, w, dy, results=ALL).db
    caller = caller_of(kind, way)
    caller.tune(chunk_bytes=chunk_bytes)
    try:
        result = caller.gradients(x, w, dy, results=(*others, "db"))
        assert oracle.same_bits(result.db, expected)
        if way in ways.IN_MESSAGES:
            cuts = [(x[a : a + 13], dy[a : a + 13]) for a in range(0, max(m, 1), 13)]
            stream = streamed(caller, cuts, w, results=(*others, "db"))
            assert oracle.same_bits(stream.db, expected)
            assert (stream.dw is None) == ("dw" not in others)
    finally:
        caller.tune()


@pytest.mark.parametrize("row_block_bytes", [256, 1000, 4096, 1 << 20])
def test_row_blocks_of_any_size_are_within_the_bound(row_block_bytes: int) -> None:
    x, w, dy = oracle.operands(700, 7, 9, "bfloat16")
    with (
        running_server(row_block_bytes=row_block_bytes) as server,
        gradwire.connect(server.address, verify=True) as client,
    ):
        result = client.gradients(x, w, dy, results=ALL)
        stream = client.stream([(x, dy)], w, results=ALL)
        list(stream)
        assert stream.db is not None
        assert oracle.same_bits(stream.db, result.db)
    oracle.assert_right(result, x, w, dy, "bfloat16")


def test_dy_alone_suffices(caller: Caller, client: gradwire.Client) -> None:
    _, _, dy = oracle.operands(333, 1, 21)
    expected = client.gradients(None, None, dy, results="db").db
    assert np.allclose(expected, dy.sum(axis=0), atol=1e-4)
    result = caller.run(caller.client.gradients(None, None, dy, results="db"))
    assert oracle.same_bits(result.db, expected)
    if caller.way in ways.IN_MESSAGES:
        for rows in ([dy[:100], dy[100:]], [(None, dy)]):
            stream = streamed(caller, rows, results="db")
            assert oracle.same_bits(stream.db, expected)


def test_without_rows_it_is_zeros(caller: Caller) -> None:
    x, w, dy = oracle.operands(0, 3, 4)
    result = caller.gradients(x, w, dy, results=("db",), verify=True)
    assert oracle.same_bits(result.db, np.zeros(4, np.float32))


def test_nan_and_inf_stay_in_their_columns(caller: Caller) -> None:
    x, w, dy = oracle.operands(150, 40, 30)
    dy[17, 3], dy[140, 5], dy[2, 7], dy[90, 7] = np.nan, -np.inf, np.inf, -np.inf
    db = caller.gradients(x, w, dy, results="db", verify=True).db
    assert np.isnan(db[[3, 7]]).all()
    assert db[5] == -np.inf
    assert np.isfinite(np.delete(db, [3, 5, 7])).all()


def test_leading_dimensions_are_rows(caller: Caller) -> None:
    x, w, dy = oracle.operands(60, 4, 5)
    expected = caller.gradients(x, w, dy, results=ALL).db
    x, dy = x.reshape(3, 20, 4), dy.reshape(3, 20, 5)
    assert oracle.same_bits(caller.gradients(x, w, dy, results=ALL).db, expected)


def test_it_may_be_wider_and_go_where_the_caller_says(caller: Caller) -> None:
    x, w, dy = oracle.operands(300, 40, 30)
    options = {"results": ("dx", "db"), "dw_accumulator": "float64", "verify": True}
    options["result_dtype"] = {"db": "float64"}
    expected = caller.gradients(x, w, dy, **options).db
    assert expected.dtype == np.float64
    for room in (np.empty(30), np.empty(60)[::2], np.empty(30)[::-1]):
        result = caller.gradients(x, w, dy, out={"db": room}, **options)
        assert result.db is room
        assert oracle.same_bits(np.ascontiguousarray(room), expected)
    with pytest.raises(gradwire.InputError, match=r"shape \(1, 30\): expected \(30,\)"):
        caller.gradients(x, w, dy, out={"db": np.empty((1, 30))}, **options)
    with pytest.raises(
        gradwire.InputError, match=r"4 entries: expected 3 \(y, dx, dw\)"
    ):
        caller.gradients(x, w, dy, out=(None,) * 4, **options)


def test_in_half_the_bytes(caller: Caller) -> None:
    x, w, dy = oracle.operands(300, 40, 30)
    result = caller.gradients(x, w, dy, results=ALL, wire_dtype="bfloat16", verify=True)
    assert result.db.dtype == np.float32
    assert result.receipt.result_dtypes["db"] == "bfloat16"


def test_what_cannot_be_is_refused(client: gradwire.Client) -> None:
    x, w, _ = oracle.operands(3, 4, 5)
    with pytest.raises(gradwire.InputError, match="db needs dy, but dy is None"):
        client.gradients(x, w, None, results=("y", "db"))
    with pytest.raises(gradwire.InputError, match="dy's rows are None"):
        list(client.stream([(x, None)], w, results=("y", "db")))
    with pytest.raises(gradwire.ClientStateError):
        _ = client.stream([(x, None)], w, results="y").db


def test_gradients_travel_between_processes(client: gradwire.Client) -> None:
    result = client.gradients(*oracle.operands(3, 4, 5), results=ALL)
    copy = pickle.loads(pickle.dumps(result))
    assert len(copy) == 3
    assert oracle.same_bits(copy.db, result.db)
    assert copy.receipt == result.receipt


@pytest.fixture(scope="module")
def several() -> Iterator[list[str]]:
    with (
        running_server(row_block_bytes=4096) as a,
        running_server(row_block_bytes=4096) as b,
    ):
        yield [a.address, b.address]


def test_several_servers_give_the_same_bits(
    several: list[str], client: gradwire.Client
) -> None:
    operands = oracle.operands(150, 40, 30)
    expected = client.gradients(*operands, results=ALL).db
    seen = set()
    with gradwire.connect(several) as both:
        for _ in range(4):
            result = both.gradients(*operands, results=ALL)
            seen.add(result.receipt.server_address)
            assert oracle.same_bits(result.db, expected)
    assert seen == set(several)
