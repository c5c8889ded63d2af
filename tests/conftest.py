"""What every test may use."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import hypothesis
import pytest

import gradwire
from tests.support.behind_proxies import ALL, DY, Behind, W, X, behind_proxies
from tests.support.serving import ServerProcess, running_server


@pytest.fixture(scope="session")
def server() -> Iterator[ServerProcess]:
    """One server with default settings for all tests that leave it unharmed."""
    with running_server() as process:
        yield process


@pytest.fixture(scope="session")
def server_address(server: ServerProcess) -> str:
    """Address of that server."""
    return server.address


@pytest.fixture(scope="module")
def shared_behind() -> Iterator[Behind]:
    """A server behind two proxies, which a module's tests share."""
    with behind_proxies(idle_timeout=2.0) as one:
        yield one


@pytest.fixture
def behind(shared_behind: Behind) -> Iterator[Behind]:
    """The same; the proxies forward everything again behind each test."""
    yield shared_behind
    shared_behind.heal()


@pytest.fixture(scope="module")
def expected(shared_behind: Behind) -> gradwire.Gradients:
    """The job of `tests.support.behind_proxies` with its elements in messages."""
    with shared_behind.connect(transport="grpc") as client:
        return client.gradients(X, W, DY, results=ALL)


def pytest_collection_finish() -> None:
    """Leave out the thousands of tests, and the libraries, of what is collected.

    Otherwise each full collection of garbage walks through all of them, and some tests
    make many.
    """
    gc.collect()
    gc.freeze()


# Where there is a GPU, JAX takes three quarters of its memory otherwise, and the
# tests' servers are there too.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

# How long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")
