from __future__ import annotations

import subprocess
import sys

import pytest

from gradwire._host import require_little_endian


def test_a_big_endian_host_is_refused() -> None:
    with pytest.raises(ImportError, match="this one is big-endian"):
        require_little_endian("big")


def test_this_host_is_fine() -> None:
    require_little_endian(sys.byteorder)


@pytest.mark.parametrize(
    ("before", "found"),
    [
        ("", "None"),
        ("os.environ['GRPC_ENABLE_FORK_SUPPORT'] = '0'", "0"),
    ],
)
def test_importing_gradwire_leaves_the_environment_as_it_was(
    before: str, found: str
) -> None:
    code = (
        f"import os; {before}\nimport gradwire\n"
        "print(os.environ.get('GRPC_ENABLE_FORK_SUPPORT'))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip() == found


def test_importing_gradwire_imports_no_other_array_library() -> None:
    code = (
        "import sys, gradwire\n"
        "print([m for m in ('torch', 'jax', 'cupy', 'gradwire_server')"
        " if m in sys.modules])"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip() == "[]"
