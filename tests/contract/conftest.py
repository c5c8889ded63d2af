"""A server whose row blocks are so small that every job has several."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import pytest

from tests.support.serving import ServerProcess, running_server

ROW_BLOCK_BYTES = 1024


def assert_untroubled(server: ServerProcess) -> None:
    """Nothing went wrong in a server beside what its callers did wrong."""
    troubles = [
        record
        for record in server.records
        if "traceback" in record or record["name"] == "asyncio"
    ]
    assert not troubles


@contextmanager
def serving_both(**settings: Any) -> Iterator[ServerProcess]:
    """A server that listens on a port and on a unix socket, in this order."""
    with TemporaryDirectory(prefix="gradwire-test-") as directory:
        listen = ["127.0.0.1:0", f"unix:{Path(directory) / 'socket'}"]
        with running_server(listen=listen, **settings) as process:
            yield process
            assert_untroubled(process)


@pytest.fixture(scope="session")
def small_blocks() -> Iterator[ServerProcess]:
    """A server that all tests share which leave it unharmed."""
    with serving_both(row_block_bytes=ROW_BLOCK_BYTES) as process:
        yield process


@pytest.fixture(scope="session", params=["tcp", "unix"])
def transport(request: pytest.FixtureRequest) -> str:
    """What a receipt calls the way to the server."""
    return str(request.param)


@pytest.fixture(scope="session")
def channel(small_blocks: ServerProcess, transport: str) -> Iterator[grpc.Channel]:
    """A channel to that server, with no options."""
    address = small_blocks.addresses[transport == "unix"]
    with grpc.insecure_channel(address) as opened:
        yield opened
