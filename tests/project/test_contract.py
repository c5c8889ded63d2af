"""The script that holds the contract to the last released version."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# buf is installed beside Python, whether or not that environment is active.
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

pytestmark = pytest.mark.skipif(
    shutil.which("buf", path=PATH) is None or shutil.which("git") is None,
    reason="needs buf and git",
)


def run(directory: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PATH": PATH,
        "GIT_AUTHOR_NAME": "a",
        "GIT_AUTHOR_EMAIL": "a@example.com",
        "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": "a@example.com",
        "GIT_CONFIG_GLOBAL": os.devnull,
    }
    return subprocess.run(
        command,
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with the contract and one commit, not yet released."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "check-contract", tmp_path / "scripts")
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    shutil.copytree(ROOT / "protos", tmp_path / "protos")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "First"]):
        run(tmp_path, "git", *command).check_returncode()
    return tmp_path


def edit(checkout: Path, old: str, new: str) -> None:
    path = checkout / "protos" / "gradwire" / "v1" / "matrix.proto"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def check(checkout: Path) -> subprocess.CompletedProcess[str]:
    return run(checkout, "scripts/check-contract")


def test_a_released_field_cannot_change_its_type(checkout: Path) -> None:
    run(checkout, "git", "tag", "v0.1.0").check_returncode()
    edit(checkout, "int64 index = 2;", "int32 index = 2;")
    done = check(checkout)
    assert done.returncode != 0
    assert "index" in done.stdout


def test_a_field_may_be_added_to_a_released_message(checkout: Path) -> None:
    run(checkout, "git", "tag", "v0.1.0").check_returncode()
    edit(checkout, "int64 index = 2;", "int64 index = 2;\n\n  // More.\n  bool a = 4;")
    done = check(checkout)
    assert done.returncode == 0, done.stdout
    assert "compatible with v0.1.0" in done.stdout


def test_what_was_never_released_may_change(checkout: Path) -> None:
    edit(checkout, "int64 index = 2;", "int32 index = 2;")
    assert check(checkout).returncode == 0


def test_every_field_has_a_comment(checkout: Path) -> None:
    edit(checkout, "int64 index = 2;", "int64 index = 2;\n\n  bool bare = 4;")
    done = check(checkout)
    assert done.returncode != 0
    assert "bare" in done.stdout
