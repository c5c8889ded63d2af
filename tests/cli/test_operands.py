"""Operands in files: which are needed, and whether they fit together."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradwire_cli.errors import CommandError, ExitStatus
from gradwire_cli.files.operands import (
    Operands,
    open_operands,
    result_dtypes,
    wanted_results,
)
from gradwire_cli.files.results import ResultSpec
from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.matrices import RESULTS, Matrix

X, W, DY, Y, DX, DW, _, DB, _ = Matrix


def paths(*operands: Matrix) -> dict[Matrix, Path]:
    return {operand: Path(f"{operand.label}.npy") for operand in operands}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((X, W, DY), (Y, DX, DW)),
        ((X, W), (Y,)),
        ((W, DY), (DX,)),
        ((X, DY), (DW,)),
    ],
)
def test_by_default_every_result_is_wanted_that_the_files_suffice_for(
    given: tuple[Matrix, ...], expected: tuple[Matrix, ...]
) -> None:
    assert wanted_results(None, paths(*given)) == expected


@pytest.mark.parametrize("given", [(), (X,), (W,), (DY,)])
def test_one_file_suffices_for_nothing(given: tuple[Matrix, ...]) -> None:
    with pytest.raises(CommandError, match="at least two operands") as caught:
        wanted_results(None, paths(*given))
    assert caught.value.status is ExitStatus.USAGE


def test_named_results_are_wanted_and_their_operands_required() -> None:
    assert wanted_results(("dw", "y"), paths(X, W, DY)) == (Y, DW)
    assert wanted_results(("db",), paths(DY)) == (DB,)
    with pytest.raises(CommandError, match="names 'b': expected some of y,dx,dw,db"):
        wanted_results(("y", "b"), paths(X, W, DY))
    with pytest.raises(CommandError, match="names nothing"):
        wanted_results((), paths(X, W, DY))
    with pytest.raises(CommandError, match="y, dw cannot be computed without dy"):
        wanted_results(("y", "dw"), paths(X, W))


def test_dtypes_of_results_are_named_for_all_or_for_one() -> None:
    assert result_dtypes((), RESULTS) == {}
    assert result_dtypes(("float64",), (Y, DW)) == {
        "y": Dtype.FLOAT64,
        "dw": Dtype.FLOAT64,
    }
    assert result_dtypes(("dw=float32", "y=float16"), RESULTS) == {
        "dw": Dtype.FLOAT32,
        "y": Dtype.FLOAT16,
    }
    with pytest.raises(CommandError, match="names 'int8': expected float16"):
        result_dtypes(("int8",), RESULTS)
    with pytest.raises(CommandError, match="names 'dx', but the wanted results are y"):
        result_dtypes(("dx=float32",), (Y,))


def opened(
    directory: Path, wanted: tuple[Matrix, ...], stack: ExitStack, **arrays: Any
) -> Operands:
    files = {}
    for name, array in arrays.items():
        np.save(directory / name, array)
        files[Matrix[name.upper()]] = directory / f"{name}.npy"
    return open_operands(files, wanted, stack, raw_as=None)


def test_only_the_files_that_are_needed_are_opened(tmp_path: Path) -> None:
    with ExitStack() as stack:
        job = opened(
            tmp_path, (Y,), stack, x=np.ones((4, 3)), w=np.ones((3, 2)), dy=[1]
        )
        assert set(job.files) == {X, W}
        assert (job.m, job.n, job.k, job.dtype) == (4, 3, 2, Dtype.FLOAT64)
        assert job.size_bytes == 8 * (12 + 6)
        assert job.results((Y,), {}) == {"y": ResultSpec((4, 2), Dtype.FLOAT64)}


def test_sizes_are_known_from_any_two_operands(tmp_path: Path) -> None:
    arrays = {"x": np.ones((4, 3)), "w": np.ones((3, 2)), "dy": np.ones((4, 2))}
    for wanted in (Y, DX, DW):
        with ExitStack() as stack:
            job = opened(tmp_path, (wanted,), stack, **arrays)
            assert (job.m, job.n, job.k) == (4, 3, 2)


def test_sizes_that_do_not_fit_are_named_with_files_and_shapes(tmp_path: Path) -> None:
    fitting = {"x": np.ones((4, 3)), "w": np.ones((3, 2)), "dy": np.ones((4, 2))}
    for name, shape, text in (
        ("x", (4, 5), r"columns of .*x\.npy \(4, 5\) .* rows of .*w\.npy \(3, 2\)"),
        ("x", (5, 3), r"rows of .*x\.npy \(5, 3\) and the rows of .*dy\.npy \(4, 2\)"),
        ("dy", (4, 1), r"columns of .*w\.npy \(3, 2\) and the columns of .*dy\.npy"),
    ):
        with ExitStack() as stack, pytest.raises(CommandError, match=text):
            opened(tmp_path, RESULTS, stack, **fitting | {name: np.ones(shape)})


def test_operands_of_two_dtypes_are_refused_by_name(tmp_path: Path) -> None:
    text = r"one dtype: .*x\.npy holds float32, .*w\.npy holds float64"
    with ExitStack() as stack, pytest.raises(CommandError, match=text):
        opened(tmp_path, (Y,), stack, x=np.ones((4, 3), np.float32), w=np.ones((3, 2)))


def test_rows_come_in_order_whatever_their_number(tmp_path: Path) -> None:
    x = np.arange(3_000_000, dtype=np.float64).reshape(-1, 3)
    dy = -x[:, :2]
    with ExitStack() as stack:
        job = opened(tmp_path, (DW,), stack, x=x, dy=dy)
        parts = list(job.rows())
        assert job.w() is None
    assert len(parts) > 3
    np.testing.assert_array_equal(np.concatenate([p for p, _ in parts]), x)
    np.testing.assert_array_equal(np.concatenate([p for _, p in parts]), dy)


def test_no_rows_still_have_their_columns(tmp_path: Path) -> None:
    with ExitStack() as stack:
        job = opened(tmp_path, (DW,), stack, x=np.ones((0, 3)), dy=np.ones((0, 2)))
        ((x, dy),) = job.rows()
    assert x is not None
    assert dy is not None
    assert (x.shape, dy.shape) == ((0, 3), (0, 2))
