"""What `make` says to whoever runs it for the first time."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def make(*arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    # Without what an outer `make test` passes on to the makes it starts.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    environment.pop("MFLAGS", None)
    environment["PATH"] = path or environment["PATH"]
    return subprocess.run(
        ["make", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def no_environment(tmp_path: Path) -> str:
    """An environment that does not exist yet."""
    return f"VENV={tmp_path / 'environment'}"


def interpreter(path: Path, body: str) -> str:
    """A stand-in for Python, as an argument of make."""
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return f"PYTHON={path}"


def test_make_alone_lists_every_target_with_what_it_does() -> None:
    done = make()
    assert done.returncode == 0
    for target in (
        "demo",
        "test",
        "test-all",
        "test-thorough",
        "lint",
        "protos",
        "bench",
        "test-big",
        "fuzz",
        "test-faults",
        "test-ray",
    ):
        assert f"make {target} " in done.stdout


def test_a_missing_python_is_named_in_a_sentence(no_environment: str) -> None:
    done = make("demo", no_environment, "PYTHON=python-of-nobody")
    assert done.returncode != 0
    assert "there is no python-of-nobody here" in done.stderr


def test_a_python_that_is_too_old_is_named_with_its_version(
    tmp_path: Path, no_environment: str
) -> None:
    old = interpreter(
        tmp_path / "python",
        'case "$2" in *version_info*) exit 1 ;; *) echo 3.9.2 ;; esac',
    )
    done = make("test", no_environment, old)
    assert done.returncode != 0
    assert "needs Python 3.11 or newer" in done.stderr
    assert "is 3.9.2" in done.stderr


def test_a_python_without_venv_says_which_package_brings_it(
    tmp_path: Path, no_environment: str
) -> None:
    bare = interpreter(
        tmp_path / "python", 'case "$2" in *ensurepip*) exit 1 ;; *) exit 0 ;; esac'
    )
    done = make("test", no_environment, bare)
    assert done.returncode != 0
    assert "apt-get install python3-venv" in done.stderr
    assert not (tmp_path / "environment").exists()
