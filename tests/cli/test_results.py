"""Result files appear whole and together, or not at all."""

from __future__ import annotations

import importlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from gradwire_cli.errors import CommandError
from gradwire_cli.files import results
from gradwire_cli.files.results import ResultFiles, ResultSpec
from gradwire_protocol.dtypes import Dtype

Y = np.arange(12, dtype=np.float32).reshape(4, 3)
DW = np.arange(6, dtype=np.float64).reshape(2, 3)
SPECS = {
    "y": ResultSpec((4, 3), Dtype.FLOAT32),
    "dw": ResultSpec((2, 3), Dtype.FLOAT64),
}


@pytest.fixture(params=["nameless files", "hidden files"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With and without a file system that has O_TMPFILE."""
    if request.param == "hidden files":
        monkeypatch.setattr(results.os, "O_TMPFILE", os.O_DIRECTORY | os.O_WRONLY)
    return str(request.param)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def write_all(files: ResultFiles) -> None:
    for row in range(4):
        files.append("y", Y[row : row + 1])
    files.append("dw", DW)


@pytest.mark.usefixtures("kind")
def test_files_appear_when_all_are_complete(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with ResultFiles(out, SPECS, replace=False) as files:
        write_all(files)
        assert [name for name in names(out) if not name.startswith(".")] == []
        written = files.commit()
    assert written == (out / "y.npy", out / "dw.npy")
    assert names(out) == ["dw.npy", "y.npy"]
    np.testing.assert_array_equal(np.load(out / "y.npy"), Y)
    np.testing.assert_array_equal(np.load(out / "dw.npy"), DW)


@pytest.mark.usefixtures("kind")
def test_what_is_not_completed_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    files = ResultFiles(out, SPECS, replace=False)
    write_all(files)
    files.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert names(tmp_path) == []


@pytest.mark.usefixtures("kind")
def test_existing_files_stay_as_they_are_until_new_ones_are_complete(
    tmp_path: Path,
) -> None:
    np.save(tmp_path / "y.npy", Y + 1)
    with ResultFiles(tmp_path, SPECS, replace=True) as files:
        write_all(files)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), Y + 1)
    assert names(tmp_path) == ["y.npy"]
    with ResultFiles(tmp_path, SPECS, replace=True) as files:
        write_all(files)
        files.commit()
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), Y)
    assert names(tmp_path) == ["dw.npy", "y.npy"]


def test_existing_files_are_named_and_not_replaced_unasked(tmp_path: Path) -> None:
    (tmp_path / "dw.npy").symlink_to("nowhere")
    with pytest.raises(CommandError, match=r"dw\.npy exists already; --force"):
        ResultFiles(tmp_path, SPECS, replace=False)
    np.save(tmp_path / "y.npy", Y)
    with pytest.raises(CommandError, match=r"y\.npy, .*dw\.npy exist already"):
        ResultFiles(tmp_path, SPECS, replace=False)
    assert names(tmp_path) == ["dw.npy", "y.npy"]


@pytest.mark.usefixtures("kind")
def test_a_file_that_comes_in_the_way_is_not_replaced_unasked(tmp_path: Path) -> None:
    with ResultFiles(tmp_path, SPECS, replace=False) as files:
        write_all(files)
        np.save(tmp_path / "dw.npy", Y)
        with pytest.raises(CommandError, match="was created meanwhile") as caught:
            files.commit()
    np.testing.assert_array_equal(np.load(tmp_path / "dw.npy"), Y)
    assert_kept(tmp_path, str(caught.value))
    assert not (tmp_path / "y.npy").exists()


def assert_kept(directory: Path, sentence: str) -> None:
    """The results are where the sentence says."""
    found = re.fullmatch(r".*; the complete results are in (.*), (.*)", sentence)
    assert found is not None
    y, dw = map(Path, found.groups())
    assert (y.parent, dw.parent) == (directory, directory)
    np.testing.assert_array_equal(np.load(y), Y)
    np.testing.assert_array_equal(np.load(dw), DW)
    assert not [name for name in names(directory) if name.startswith(".")]


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("replace", [False, True])
def test_a_name_that_cannot_be_given_loses_no_result(
    tmp_path: Path, replace: bool
) -> None:
    with ResultFiles(tmp_path, SPECS, replace=replace) as files:
        write_all(files)
        (tmp_path / "dw.npy").mkdir()
        with pytest.raises(CommandError) as caught:
            files.commit()
    assert_kept(tmp_path, str(caught.value))


@contextmanager
def poor_file_system(source: Path, point: Path) -> Iterator[None]:
    """A file system as exFAT, SMB and sshfs are: no links, no fsync, no free space."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.support.poor_file_system", source, point],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        try:
            while not point.is_mount():
                if process.poll() is not None:
                    pytest.skip(f"no FUSE here: {process.stderr.read()[-200:]}")
                time.sleep(0.01)
            yield
        finally:
            process.terminate()


@pytest.mark.parametrize("replace", [False, True])
def test_a_file_system_without_links_fsync_or_free_space_will_do(
    tmp_path: Path, replace: bool
) -> None:
    try:
        importlib.import_module("mfusepy")
    except (ImportError, OSError) as error:
        pytest.skip(f"FUSE is not here: {error}")
    source, point = tmp_path / "source", tmp_path / "mounted"
    source.mkdir()
    point.mkdir()
    with poor_file_system(source, point):
        with pytest.raises(OSError, match="Operation not permitted"):
            (point / "link").hardlink_to(point)
        assert shutil.disk_usage(point).free == 0
        with ResultFiles(point, SPECS, replace=replace) as files:
            write_all(files)
            files.commit()
        assert names(point) == ["dw.npy", "y.npy"]
        np.testing.assert_array_equal(np.load(point / "y.npy"), Y)
        np.testing.assert_array_equal(np.load(point / "dw.npy"), DW)
        with pytest.raises(CommandError, match="exist already; --force"):
            ResultFiles(point, SPECS, replace=False)
        (point / "y.npy").unlink()
        (point / "dw.npy").unlink()
        with ResultFiles(point, SPECS, replace=False) as files:
            write_all(files)
            np.save(point / "dw.npy", Y)
            with pytest.raises(CommandError, match="was created meanwhile") as caught:
                files.commit()
        assert_kept(point, str(caught.value))


def test_directories_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CommandError, match="file exists and is not a directory"):
        ResultFiles(tmp_path / "file", SPECS, replace=False)
    with pytest.raises(CommandError, match="cannot be written: Not a directory"):
        ResultFiles(tmp_path / "file" / "out", SPECS, replace=False)
    (tmp_path / "y.npy").mkdir()
    with pytest.raises(CommandError, match=r"y\.npy is a directory"):
        ResultFiles(tmp_path, SPECS, replace=True)
    with pytest.raises(CommandError, match="/proc/out cannot be written"):
        ResultFiles(Path("/proc/out"), SPECS, replace=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CommandError, match="cannot be written: Permission denied"):
        ResultFiles(tmp_path, SPECS, replace=False)


def test_results_larger_than_the_free_space_are_refused_at_once(tmp_path: Path) -> None:
    huge = {"y": ResultSpec((2**40, 2**20), Dtype.FLOAT64)}
    with pytest.raises(CommandError, match=r"of free space; the results need 8192 PiB"):
        ResultFiles(tmp_path / "out", huge, replace=False)
    assert names(tmp_path) == []


@contextmanager
def small_files_only() -> Iterator[None]:
    """Writes beyond 4 KiB of a file fail, as on a disk that is full.

    That holds for the whole process, so nothing else may be written meanwhile:
    pytest's own output may go to a file.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.usefixtures("kind")
def test_a_disk_that_fills_up_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    specs = {"y": ResultSpec((64, 100), Dtype.FLOAT32)}
    with ResultFiles(out, specs, replace=False) as files:
        for _ in range(9):
            files.append("y", np.zeros((1, 100), np.float32))
        with (
            pytest.raises(CommandError, match=r"y\.npy cannot be written: File too"),
            small_files_only(),
        ):
            files.append("y", np.zeros((55, 100), np.float32))
    assert names(tmp_path) == []


def test_bfloat16_is_written_as_numpy_writes_it(tmp_path: Path) -> None:
    values: Any = Y.astype(ml_dtypes.bfloat16)
    np.save(tmp_path / "numpy.npy", values)
    specs = {"y": ResultSpec((4, 3), Dtype.BFLOAT16)}
    with ResultFiles(tmp_path, specs, replace=False) as files:
        files.append("y", values)
        files.commit()
    assert (tmp_path / "y.npy").read_bytes() == (tmp_path / "numpy.npy").read_bytes()


def test_files_have_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("")
    with ResultFiles(tmp_path, SPECS, replace=False) as files:
        write_all(files)
        files.commit()
    expected = (tmp_path / "other").stat().st_mode
    assert (tmp_path / "y.npy").stat().st_mode == expected
