"""A server whose row blocks are so small that every job has several."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest

from tests.serving import ServerProcess, running_server

BLOCK_BYTES = 1024


def assert_untroubled(server: ServerProcess) -> None:
    """Nothing went wrong in a server beside what its callers did wrong."""
    troubles = [
        record
        for record in server.records
        if "traceback" in record or record["name"] == "asyncio"
    ]
    assert not troubles


@pytest.fixture(scope="session")
def small_blocks() -> Iterator[ServerProcess]:
    """A server that all tests share which leave it unharmed."""
    with running_server(block_bytes=BLOCK_BYTES) as process:
        yield process
        assert_untroubled(process)


@pytest.fixture(scope="session")
def channel(small_blocks: ServerProcess) -> Iterator[grpc.Channel]:
    """A channel to that server, with no options."""
    with grpc.insecure_channel(small_blocks.address) as opened:
        yield opened
