"""Two servers behind each proxy; see `running`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import gradwire
from tests.proxies.running import KINDS, Kind, running_proxy
from tests.scenarios.callers import CALLERS, Caller
from tests.scenarios.ways import STREAM, Way
from tests.support.serving import ServerProcess, running_server

ROW_BLOCK_BYTES = 65536


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of this folder need the proxies."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.proxies)


@pytest.fixture(scope="session")
def servers() -> Iterator[tuple[ServerProcess, ServerProcess]]:
    """Two servers that tests share which leave them unharmed."""
    settings: dict[str, Any] = {"row_block_bytes": ROW_BLOCK_BYTES, "max_jobs": 16}
    with running_server(**settings) as one, running_server(**settings) as other:
        yield one, other


@pytest.fixture(scope="session", params=KINDS, ids=str)
def kind(request: pytest.FixtureRequest) -> Kind:
    """Each proxy in turn."""
    chosen: Kind = request.param
    return chosen


@pytest.fixture(scope="session")
def proxy(kind: Kind, servers: tuple[ServerProcess, ServerProcess]) -> Iterator[str]:
    """The address of each proxy in turn, before those servers."""
    with running_proxy(kind, [each.address for each in servers]) as address:
        ready(address)
        yield address


@pytest.fixture(scope="session")
def direct(servers: tuple[ServerProcess, ServerProcess]) -> Iterator[gradwire.Client]:
    """A client of one of the servers, without a proxy."""
    address = servers[0].address
    with gradwire.connect(address, transport="grpc", timeout_s=60) as client:
        yield client


def ready(address: str) -> None:
    """Wait until a proxy has found its servers."""
    gradwire.connect(address, transport="grpc", wait_for_ready_s=30).close()


class Behind:
    """What clients connect to in place of a server."""

    def __init__(self, address: str) -> None:
        self.addresses = (address, "")


def caller(kind: str, address: str, way: Way = STREAM) -> Caller:
    """A client of a kind, behind a proxy."""
    server: Any = Behind(address)
    return CALLERS[kind](way, server)
