"""Files that change while the server runs."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import pytest

from gradwire_server.transports.file_watch import (
    FileError,
    file_signature,
    watch_file,
)
from tests.support.credentials import replace_file


def parse(content: bytes) -> int:
    try:
        return int(content)
    except ValueError:
        raise ValueError("it is no number") from None


def test_what_changes_in_the_file_holds_at_once(tmp_path):
    path = tmp_path / "file"
    path.write_text("1")
    watched = watch_file(path, "the file", parse)
    assert watched.value == 1
    replace_file(path, "2")
    assert watched.value == 2
    path.write_text("33")
    assert watched.value == 33


def test_a_file_that_became_wrong_changes_nothing_but_the_log(tmp_path, caplog):
    path = tmp_path / "file"
    path.write_text("1")
    watched = watch_file(path, "the file", parse)
    for spoil in (lambda: replace_file(path, "x"), path.unlink):
        caplog.clear()
        spoil()
        assert [watched.value for _ in range(3)] == [1, 1, 1]
        (record,) = caplog.records
        assert record.levelno == logging.ERROR
        assert str(path) in record.error
    path.write_text("2")
    assert watched.value == 2


def test_a_file_that_could_not_be_read_is_read_when_it_can(tmp_path, caplog):
    """Though nothing of it has changed since: a revoked token must not hold on."""
    path = tmp_path / "file"
    path.write_text("1")
    watched = watch_file(path, "the file", parse)
    replace_file(path, "2")
    with pytest.MonkeyPatch.context() as context:
        context.setattr(Path, "read_bytes", too_many_open_files)
        assert [watched.value for _ in range(3)] == [1, 1, 1]
    (record,) = caplog.records
    assert "cannot be read: Too many open files" in record.error
    assert watched.value == 2


def test_who_may_read_a_file_is_part_of_it(tmp_path):
    path = tmp_path / "file"
    path.touch()
    before = file_signature(path)
    path.chmod(0o640)
    assert file_signature(path) != before


def too_many_open_files(path: Path) -> bytes:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))


def test_a_file_that_is_wrong_from_the_start_is_an_error(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(FileError, match=r"the file .* cannot be read: No such"):
        watch_file(path, "the file", parse)
    path.write_text("x")
    with pytest.raises(FileError, match="cannot be used: it is no number"):
        watch_file(path, "the file", parse)
