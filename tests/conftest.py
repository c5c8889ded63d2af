"""What every test may use."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest

from tests.serving import ServerProcess, running_server


@pytest.fixture(scope="session")
def server() -> Iterator[ServerProcess]:
    """One server with default settings for all tests that leave it unharmed."""
    with running_server() as process:
        yield process


@pytest.fixture(scope="session")
def server_address(server: ServerProcess) -> str:
    """Address of that server."""
    return server.address


# How long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")
