"""A session on a real server; without PyTorch, these tests are skipped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import gradwire
from tests.support.serving import ServerProcess, running_server

collect_ignore_glob: list[str] = []
try:
    import torch  # noqa: F401
except ImportError:
    collect_ignore_glob.append("test_*.py")


@pytest.fixture(scope="session")
def training_server() -> Iterator[ServerProcess]:
    """A server with row blocks of a few rows, so that jobs have several."""
    with running_server(row_block_bytes=65536) as process:
        yield process


@pytest.fixture(scope="session")
def client(training_server: ServerProcess) -> Iterator[gradwire.Client]:
    """A client of that server over TCP."""
    with gradwire.connect(
        training_server.address, timeout_s=60, transport="grpc"
    ) as connected:
        yield connected


@pytest.fixture
def session(client: gradwire.Client) -> Iterator[gradwire.Session]:
    """A session of its own for each test."""
    with client.session(keep="64MiB") as opened:
        yield opened


@pytest.fixture(autouse=True)
def _seeded() -> Any:
    import torch

    torch.manual_seed(0)
    # Small models: more threads only wait for each other.
    torch.set_num_threads(1)
