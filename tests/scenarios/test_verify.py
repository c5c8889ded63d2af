"""`verify=` lets no wrong result through, and calls no right one wrong."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradwire
from tests.cli.conftest import environment, sentence
from tests.cli.conftest import gradwire as gradwire_command
from tests.scenarios.callers import Caller
from tests.support import oracle
from tests.support.metrics import scrape
from tests.support.serving import STOP_TIMEOUT_S
from tests.support.wrong_server import Fault

M, N, K = 700, 48, 40
ROW_BLOCK_BYTES = 30_000


@dataclasses.dataclass
class WrongServer:
    """A server that computes wrongly when it is told."""

    address: str
    metrics_url: str
    faults: Path

    def does(self, fault: Fault) -> None:
        self.faults.write_text(json.dumps(dataclasses.asdict(fault)))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WrongServer]:
    faults = tmp_path_factory.mktemp("wrong") / "fault.json"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "tests.support.wrong_server", faults),
            *("serve", "--listen=127.0.0.1:0", f"--row-block-bytes={ROW_BLOCK_BYTES}"),
            "--grace=1",
            "--metrics-listen=0",
        ],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        assert process.stdout is not None
        ready = process.stdout.readline()
        address = ready.split(" serves on ")[1].split(" (")[0]
        yield WrongServer(address, ready.split(" metrics on ")[1].strip(), faults)
    finally:
        process.terminate()
        process.communicate(timeout=STOP_TIMEOUT_S)


def portions(x: Any, dy: Any, size: int = 37) -> Iterator[tuple[Any, Any]]:
    """Rows in memory that is used again for the next."""
    room = np.empty((size, N), x.dtype), np.empty((size, K), dy.dtype)
    for first in range(0, len(x), size):
        pair = []
        for here, rows in zip(room, (x, dy), strict=True):
            part = rows[first : first + size]
            here[: len(part)] = part
            pair.append(here[: len(part)])
        yield pair[0], pair[1]
    for here in room:
        here[...] = np.nan


def arrays(address: Any, x: Any, w: Any, dy: Any, **options: Any) -> Any:
    with gradwire.Client(address, timeout_s=60) as client:
        return client.gradients(x, w, dy, **options)


def arrays_async(address: Any, x: Any, w: Any, dy: Any, **options: Any) -> Any:
    async def call() -> Any:
        async with gradwire.AsyncClient(address, timeout_s=60) as client:
            return await client.gradients(x, w, dy, **options)

    return asyncio.run(call())


def stream(address: str, x: Any, w: Any, dy: Any, **options: Any) -> Any:
    with (
        gradwire.Client(address, timeout_s=60) as client,
        client.stream(portions(x, dy), w, **options) as results,
    ):
        blocks = list(results)
    return blocks, results.dw


def stream_async(address: str, x: Any, w: Any, dy: Any, **options: Any) -> Any:
    async def call() -> Any:
        async with (
            gradwire.AsyncClient(address, timeout_s=60) as client,
            client.stream(portions(x, dy), w, **options) as results,
        ):
            blocks = [block async for block in results]
        return blocks, results.dw

    return asyncio.run(call())


Form = Callable[..., Any]
FORMS = (arrays, arrays_async, stream, stream_async)

WRONG = [
    Fault("element", "y", row=3, column=39, by=4.0),
    Fault("element", "dx", row=0, column=7, by=4.0),
    Fault("element", "dw", row=47, column=0, by=90.0),
    Fault("block", "y"),
    Fault("block", "dx"),
    Fault("block", "dw"),
    Fault("swapped", "y"),
    Fault("swapped", "dx"),
    Fault("swapped", "dw"),
    Fault("twice"),
    Fault("left-out"),
]


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize(
    "fault", WRONG, ids=lambda fault: f"{fault.kind}-{fault.result}"
)
def test_a_wrong_result_raises_and_says_which_and_whose(
    server: WrongServer, fault: Fault, dtype: str
) -> None:
    """Each form takes its turn; the signs are other ones every time."""
    form = FORMS[(WRONG.index(fault) + oracle.DTYPES.index(dtype)) % len(FORMS)]
    server.does(fault)
    x, w, dy = oracle.operands(M, N, K, dtype)
    with pytest.raises(gradwire.VerificationError) as caught:
        form(server.address, x, w, dy, verify=True)
    error = caught.value
    assert error.result == fault.result
    assert error.job_id is not None
    for named in (server.address, error.server_instance, "numpy", error.job_id):
        assert named in str(error)
    if fault.kind == "element":
        assert error.row % 32 == (fault.row if fault.result != "dw" else 15)
        assert error.column in {None, fault.column}
    if error.column is not None:
        assert error.error is not None
        assert error.bound is not None
        assert error.error > error.bound


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["element", "block"])
def test_a_wrong_sum_of_columns_is_always_found(
    server: WrongServer, form: Form, kind: str, dtype: str
) -> None:
    server.does(Fault(kind, "db", column=39, by=2.0))
    x, w, dy = oracle.operands(M, N, K, dtype)
    dy[:, 39] = 1 / 64  # sums to 11, in steps of 1/16 in bfloat16
    with pytest.raises(gradwire.VerificationError, match="db is wrong in row 0") as e:
        form(server.address, x, w, dy, results=("dw", "db"), verify=True)
    assert e.value.result == "db"
    assert e.value.column == 39 or kind == "block"


@pytest.mark.parametrize("form", FORMS)
def test_without_verify_a_wrong_result_is_not_noticed(
    server: WrongServer, form: Form
) -> None:
    """Which shows that the faults of these tests reach the caller."""
    server.does(Fault("block", "y"))
    form(server.address, *oracle.operands(M, N, K))


@pytest.mark.parametrize("form", FORMS)
def test_the_operator_is_told_of_wrong_results(server: WrongServer, form: Form) -> None:
    def told() -> float:
        return scrape(server.metrics_url).sum("reported_failures_total")

    before = told()
    operands = oracle.operands(M, N, K)
    server.does(Fault())
    form(server.address, *operands, verify=True)
    assert told() == before
    server.does(Fault("block", "dx"))
    with pytest.raises(gradwire.VerificationError):
        form(server.address, *operands, verify=True)
    assert told() == before + 1
    wrong = scrape(server.metrics_url).sum("reported_failures_total", failure="wrong")
    assert wrong == told()


def test_a_stream_has_handed_out_nothing_wrong(server: WrongServer) -> None:
    server.does(Fault("element", "y", by=1.0, block=3))
    x, w, dy = oracle.operands(M, N, K)
    came = []
    with (
        gradwire.Client(server.address, timeout_s=60, verify=True) as client,
        client.stream(portions(x, dy), w) as results,
        pytest.raises(gradwire.VerificationError) as caught,
    ):
        came.extend(results)
    assert len(came) == 3
    assert caught.value.row == sum(len(block.y) for block in came)


def test_a_client_checks_all_its_calls_but_those_that_say_otherwise(
    server: WrongServer,
) -> None:
    server.does(Fault("swapped", "y", block=0))
    x, w, _ = oracle.operands(5, N, K)
    with gradwire.connect(server.address, timeout_s=60, verify=3) as client:
        with pytest.raises(gradwire.VerificationError):
            client.forward(x, w)
        with pytest.raises(gradwire.VerificationError):
            list(client.stream([x], w, results="y"))
        client.forward(x, w, verify=False)
    with gradwire.connect(server.address, timeout_s=60) as client:
        client.forward(x, w)
        with pytest.raises(gradwire.VerificationError):
            client.forward(x, w, verify=gradwire.Verify(groups=1))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_of_several_servers_another_is_asked(
    server: WrongServer, client: gradwire.Client, asynchronous: bool
) -> None:
    """A wrong result is no reason to fail where somebody computes right."""
    server.does(Fault("swapped", "y", block=0))
    x, w, dy = oracle.operands(5, N, K)
    expected = client.gradients(x, w, dy)
    both = [server.address, client.address]
    call: Any = arrays_async if asynchronous else arrays
    result = call(both, x, w, dy, verify=True)
    assert all(map(oracle.same_bits, result, expected))
    assert result.receipt.server_address == client.address
    assert result.receipt.retried == ("VerificationError",)


@pytest.mark.parametrize("call", [arrays, stream])
def test_of_a_spread_job_the_row_is_that_of_the_whole_job(
    server: WrongServer, call: Any
) -> None:
    block, segment = 64, 1024
    x, w, dy = oracle.operands(2 * segment, N, K)
    x[block + 3] = np.nan  # a wrong element of NaN is none: the first segment is right
    server.does(Fault("element", "y", row=3, column=4, by=1000.0))
    with pytest.raises(gradwire.VerificationError) as raised:
        call(server.address, x, w, dy, spread=True, verify=True)
    assert raised.value.row == segment + block + 3
    assert f"in row {raised.value.row}," in str(raised.value)


def test_compute_leaves_nothing_behind_of_a_wrong_result(
    server: WrongServer, tmp_path: Path
) -> None:
    server.does(Fault("left-out"))
    paths = [tmp_path / f"{name}.npy" for name in ("x", "w", "dy")]
    for path, operand in zip(paths, oracle.operands(M, N, K), strict=True):
        np.save(path, operand)
    out = tmp_path / "out"
    to = ("--out", out, "--address", server.address)
    done = gradwire_command("compute", *paths, *to, "--verify")
    assert done.returncode != 0
    assert sentence(done).startswith("dw is wrong in row")
    assert not out.exists()


def special(dtype: str) -> tuple[Any, Any, Any]:
    x, w, dy = oracle.operands(M, N, K, dtype)
    x[5, 3], x[600, 0] = np.nan, np.inf
    w[2, 7], dy[20, 1] = -np.inf, np.nan
    return x, w, dy


def huge(dtype: str) -> tuple[Any, Any, Any]:
    largest = {"float16": 3e3, "bfloat16": 1e19, "float32": 1e19, "float64": 1e154}
    scale = oracle.numpy_dtype(dtype).type(largest[dtype])
    x, w, dy = oracle.operands(300, N, K, dtype)
    return x * scale, w * scale, dy * scale


def constant(dtype: str) -> tuple[Any, Any, Any]:
    a, b = oracle.numpy_dtype(dtype).type(0.1), oracle.numpy_dtype(dtype).type(0.3)
    return np.full((300, N), a), np.full((N, K), b), np.full((300, K), a)


def scaled(dtype: str) -> tuple[Any, Any, Any]:
    x, w, dy = (a.astype(np.float64) for a in oracle.operands(300, N, K, dtype))
    x *= np.logspace(-3, 3, N)
    w *= np.logspace(2, -2, K)
    dy *= 1e-4
    kind = oracle.numpy_dtype(dtype)
    return x.astype(kind), w.astype(kind), dy.astype(kind)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("data", [special, huge, constant, scaled])
def test_right_results_are_never_called_wrong(
    small_blocks: Any, client: gradwire.Client, data: Any, dtype: str
) -> None:
    with np.errstate(all="ignore"):
        x, w, dy = data(dtype)
    wide = {"result_dtype": {"dw": "float32"}} if dtype != "float64" else {}
    client.gradients(x, w, dy, verify=True)
    client.gradients(x, w, dy, verify=gradwire.Verify(1, 64), **wide)
    list(client.stream(portions(x, dy), w, verify=True, **wide))


def test_checked_results_are_the_same_on_every_way(caller: Caller) -> None:
    x, w, dy = oracle.operands(300, N, K)
    plain = caller.gradients(x, w, dy)
    checked = caller.gradients(x, w, dy, verify=True)
    assert all(map(oracle.same_bits, plain, checked))
    assert plain.receipt.verifying_s == 0
    assert checked.receipt.verifying_s > 0
    narrow = caller.gradients(x, w, dy, verify=True, wire_dtype="bfloat16")
    assert narrow.y.dtype == np.float32


def test_checked_streams_are_the_same_on_every_way(streamer: Caller) -> None:
    x, w, dy = oracle.operands(60, N, K)
    for results in ("dx", "dw", ("y", "dx", "dw")):
        plain = streamer.stream([(x, dy)], w, results=results)
        for rows in (portions(x, dy), [(x[:0], dy[:0]), (x, dy)]):
            checked = streamer.stream(rows, w, results=results, verify=True)
            for one, other in zip(checked[0], plain[0], strict=True):
                for name in ("y", "dx"):
                    if getattr(one, name) is not None:
                        assert oracle.same_bits(
                            getattr(one, name), getattr(other, name)
                        )
            if "dw" in results:
                assert oracle.same_bits(checked[1], plain[1])
            assert checked[2].verifying_s > 0


@pytest.fixture
def flushing() -> Iterator[None]:
    """Subnormal numbers are 0 in this thread, as some libraries have it."""
    torch = pytest.importorskip("torch")
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor flushes nothing")
    yield
    torch.set_flush_denormal(False)


@pytest.mark.usefixtures("flushing")
@pytest.mark.parametrize("size", [1e-19, 1e-20])
def test_right_results_are_right_where_subnormal_numbers_are_flushed(
    client: gradwire.Client, size: float
) -> None:
    """Products of this size are on both sides of the smallest normal number."""
    operands = [
        (each * size).astype(np.float32) for each in oracle.operands(700, 64, 48)
    ]
    client.gradients(*operands, verify=True)
    client.gradients(*operands, verify=True, wire_dtype="bfloat16")


@pytest.mark.parametrize("shape", [(0, 3, 4), (5, 0, 4), (5, 3, 0), (1, 1, 1)])
def test_matrices_without_elements_are_right(
    client: gradwire.Client, shape: tuple[int, int, int]
) -> None:
    x, w, dy = oracle.operands(*shape)
    client.gradients(x, w, dy, verify=True)
    list(client.stream([(x, dy)], w, verify=True))
    list(client.stream([], w, verify=True))


@pytest.mark.parametrize("value", ["yes", 0, -1, 2.5, 1025])
def test_verify_has_to_be_something(client: gradwire.Client, value: Any) -> None:
    with pytest.raises(gradwire.InputError, match=r"verify|rounds"):
        client.gradients(*oracle.operands(2, 2, 2), verify=value)
    with pytest.raises(gradwire.InputError, match="groups"):
        gradwire.Verify(groups=value)
