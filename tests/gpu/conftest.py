"""Tests that need a CUDA device.

Where there is none they are skipped; with GRADWIRE_TEST_REQUIRE_GPU=1 they
fail, so that a machine that is there to run them cannot pass without.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterator

import pytest

import gradwire
from tests.scenarios import ways
from tests.support.serving import ServerProcess

BACKEND = "cupy"


@functools.cache
def devices() -> tuple[int, str]:
    """How many CUDA devices there are, and what is missing if there is none."""
    try:
        with warnings.catch_warnings(action="ignore"):
            import ml_dtypes  # noqa: F401 - CuPy has bfloat16 if it comes first
            from cupy.cuda import runtime
    except ImportError as error:
        return 0, f"CuPy, which cannot be imported: {error}"
    try:
        count = int(runtime.getDeviceCount())
    except runtime.CUDARuntimeError as error:
        return 0, f"a CUDA device: {error}"
    return count, "" if count else "a CUDA device"


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker("gpu")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    _, missing = devices()
    if not missing:
        return
    if os.environ.get("GRADWIRE_TEST_REQUIRE_GPU") == "1":
        pytest.fail(f"needs {missing}", pytrace=False)
    pytest.skip(f"needs {missing}")


@pytest.fixture(scope="session")
def server() -> Iterator[ServerProcess]:
    """A server on the GPU that all tests share which leave it unharmed.

    Its row blocks are so small that jobs have several.
    """
    with ways.serving_all(backend=BACKEND, row_block_bytes=64 << 10) as process:
        yield process


@pytest.fixture(scope="session")
def client(server: ServerProcess) -> Iterator[gradwire.Client]:
    """A client of that server over TCP."""
    with ways.STREAM.connect(server) as connected:
        yield connected


@pytest.fixture(scope="session")
def large_blocks() -> Iterator[gradwire.Client]:
    """A client of a server with row blocks of the usual size."""
    with (
        ways.serving_all(backend=BACKEND) as process,
        ways.STREAM.connect(process) as c,
    ):
        yield c
