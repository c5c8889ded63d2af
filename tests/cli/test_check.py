"""`gradwire check` passes correct servers, and no others."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import gradwire as sdk
from gradwire_cli.checks.checks import CHECKS, CheckResult, run_checks
from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.matrices import Matrix
from gradwire_server.backends.base import RowBlock
from gradwire_server.backends.numpy.backend import NumpyBackend
from tests.cli.conftest import gradwire, sentence, serving_with
from tests.support.serving import ServerProcess, running_server


class WrongBackend(NumpyBackend):
    """NumPy, but for what a test does to a block before or after."""

    def __init__(
        self,
        before: Callable[[RowBlock, int], RowBlock] = lambda block, number: block,
        after: Callable[[RowBlock, Any, int], None] = lambda block, w, number: None,
        finished: Callable[[Any], Any] = lambda dw: dw,
    ) -> None:
        super().__init__()
        self._before, self._after, self._finished = before, after, finished

    def open_job(self, *args: Any, **kwargs: Any) -> Any:
        return _WrongJob(self, super().open_job(*args, **kwargs))


class _WrongJob:
    def __init__(self, backend: WrongBackend, job: Any) -> None:
        self._backend, self._job = backend, job
        self._w: Any = None
        self._blocks = 0

    def take_w(self, w: Any) -> None:
        self._w = w.copy()
        self._job.take_w(w)

    def compute_block(self, block: RowBlock) -> None:
        number, self._blocks = self._blocks, self._blocks + 1
        self._job.compute_block(self._backend._before(block, number))
        self._backend._after(block, self._w, number)

    def finish(self) -> Any:
        sums = self._job.finish()
        if Matrix.DW not in sums:
            return sums
        return sums | {Matrix.DW: self._backend._finished(sums[Matrix.DW])}

    def close(self) -> None:
        self._job.close()


def wrong_transpose_of_w(block: RowBlock, w: Any, number: int) -> None:
    """dX = dY times W read as if it were (k, n)."""
    if block.dx is not None:
        block.dx[...] = block.dy @ w.reshape(w.shape[::-1])


def third_block_missing_from_dw(block: RowBlock, number: int) -> RowBlock:
    if number != 2 or block.x is None or block.dy is None:
        return block
    return replace(block, x=np.zeros_like(block.x))


def second_block_missing_from_y(block: RowBlock, w: Any, number: int) -> None:
    if number == 1 and block.y is not None:
        block.y[...] = 0


def operands_as_tf32(block: RowBlock, number: int) -> RowBlock:
    def rough(a: Any) -> Any:
        if a is None or a.dtype != np.float32:
            return a
        bits = a.view(np.uint32)
        return ((bits + 0x1000) & 0xFFFFE000).view(np.float32)

    return replace(block, x=rough(block.x), dy=rough(block.dy))


def nan_as_zero(block: RowBlock, w: Any, number: int) -> None:
    if block.y is not None:
        block.y[np.isnan(block.y.astype(np.float64))] = 0


def last_bit_of_y(block: RowBlock, w: Any, number: int) -> None:
    """Off by one unit in the last place, in one element of blocks to come."""
    if number == 1 and block.y is not None and block.y.size:
        block.y.view(np.uint8).reshape(-1)[0] ^= 1


def failing(block: RowBlock, number: int) -> RowBlock:
    if block.x is not None and block.x.dtype == np.float16:
        raise RuntimeError("a defect")
    return block


def wrong(results: list[CheckResult]) -> set[tuple[str, str, str]]:
    return {(f.check, f.dtype, f.result) for f in results if not f.passed}


def checked(address: str, seed: int = 0) -> list[CheckResult]:
    with sdk.connect(address) as client:
        return list(run_checks(client, tuple(Dtype), seed))


def test_a_right_server_passes_every_check(server: ServerProcess) -> None:
    results = checked(server.address)
    assert wrong(results) == set()
    assert {result.check for result in results} == set(CHECKS)
    assert {result.dtype for result in results} == {d.label for d in Dtype}


@pytest.mark.thorough
@pytest.mark.parametrize("row_block_bytes", [1 << 10, 1 << 26])
def test_a_right_server_passes_whatever_its_row_blocks(row_block_bytes: int) -> None:
    with running_server(row_block_bytes=row_block_bytes) as server:
        assert wrong(checked(server.address, seed=row_block_bytes)) == set()


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("backend", "expected"),
    [
        (
            WrongBackend(after=wrong_transpose_of_w),
            {
                ("finite differences", "float64", "dx"),
                ("products", "bfloat16", "dx"),
                ("row blocks", "float32", "dx"),
            },
        ),
        (
            WrongBackend(before=third_block_missing_from_dw),
            {("row blocks", dtype.label, "dw") for dtype in Dtype},
        ),
        (
            WrongBackend(after=second_block_missing_from_y),
            {("row blocks", dtype.label, "y") for dtype in Dtype},
        ),
        (
            WrongBackend(before=operands_as_tf32),
            {("products", "float32", name) for name in ("y", "dx", "dw")},
        ),
        (WrongBackend(after=nan_as_zero), {("NaN and Inf", "float64", "all")}),
        (WrongBackend(after=last_bit_of_y), {("row blocks", "float64", "y")}),
        (
            WrongBackend(finished=lambda dw: dw.T.reshape(dw.shape)),
            {("finite differences", "float64", "dw"), ("products", "float16", "dw")},
        ),
    ],
    ids=[
        "wrong transpose",
        "one block missing from dW",
        "one block missing from Y",
        "TF32 in float32",
        "NaN swallowed",
        "one wrong bit",
        "dW transposed",
    ],
)
def test_a_wrong_server_is_found_out_by_the_check_that_is_made_for_it(
    backend: WrongBackend, expected: set[tuple[str, str, str]]
) -> None:
    with serving_with(backend) as address:
        assert expected <= wrong(checked(address))


@pytest.mark.thorough
def test_rounding_to_tf32_shows_in_float32_alone() -> None:
    with serving_with(WrongBackend(before=operands_as_tf32)) as address:
        assert {dtype for _, dtype, _ in wrong(checked(address))} == {"float32"}


def test_a_job_that_the_server_fails_is_a_finding_with_its_reason() -> None:
    with serving_with(WrongBackend(before=failing)) as address:
        results = checked(address)
    failed = [result for result in results if result.note]
    assert {result.dtype for result in failed} == {"float16"}
    assert "UNFORESEEN" in failed[0].note
    assert wrong(results) == {(f.check, "float16", "all") for f in failed}


def test_the_command_proves_a_server_right(server: ServerProcess) -> None:
    done = gradwire("check", "--address", server.address)
    assert done.returncode == 0
    assert done.stderr == ""
    assert re.search(
        rf"^{re.escape(server.address)}: \d+ checks passed in ",
        done.stdout,
        re.MULTILINE,
    )
    for name in CHECKS:
        assert name in done.stdout


def test_without_an_address_a_private_server_is_checked() -> None:
    done = gradwire("check", "--json", "--seed", "7")
    assert done.returncode == 0
    report = json.loads(done.stdout)
    assert report["passed"] is True
    assert report["checks"][0]["check"] == "finite differences"
    assert all(f["error"] <= f["bound"] for f in report["checks"])


@pytest.mark.parametrize(
    ("backend", "name", "row"),
    [
        (
            WrongBackend(after=wrong_transpose_of_w),
            "finite differences (float64)",
            "finite differences  float64",
        ),
        (
            WrongBackend(before=third_block_missing_from_dw),
            "row blocks (float16, bfloat16, float32, float64)",
            "row blocks          float32",
        ),
        (
            WrongBackend(before=operands_as_tf32),
            "products (float32)",
            "products            float32",
        ),
    ],
    ids=["wrong transpose", "one block missing", "TF32 in float32"],
)
def test_the_command_names_what_is_wrong_and_fails(
    backend: WrongBackend, name: str, row: str
) -> None:
    with serving_with(backend) as address:
        done = gradwire("check", "--address", address)
    assert done.returncode == 1
    _, failed, names = done.stdout.partition(" checks failed: ")
    assert failed
    assert name in names
    assert any(
        line.startswith(row) and line.rstrip().endswith("WRONG")
        for line in done.stdout.splitlines()
    )


def test_json_is_json_where_errors_are_infinite() -> None:
    with serving_with(WrongBackend(before=failing)) as address:
        done = gradwire("check", "--json", "--address", address)
    assert done.returncode == 1
    report = json.loads(done.stdout, parse_constant=pytest.fail)
    assert report["passed"] is False


def test_no_server_is_no_verdict(nobody: str) -> None:
    done = gradwire("check", "--address", nobody)
    assert done.returncode == 3
    assert nobody in sentence(done)
