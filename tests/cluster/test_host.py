"""A server in the process of an actor, without Ray."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import numpy as np
import pytest

import gradwire
from gradwire_ray.host import LostError, ServerHost, server_settings
from gradwire_ray.settings import PoolSettings
from gradwire_server import ListenError, Settings
from tests.support.observing import wait_until

SMALL = PoolSettings(port=0, server=Settings(backend="numpy", keep_memory=False))


def test_a_host_serves_shares_memory_and_drains() -> None:
    prepared: list[int] = []
    settings = replace(SMALL, prepare=lambda: prepared.append(1))
    host = ServerHost("127.0.0.1", settings)
    with pytest.raises(LostError, match="not started"):
        host.load()
    started = host.start()
    assert host.start() == started  # by a pool that takes it over
    assert prepared == [1]
    with gradwire.connect(started.local_address, transport="shm") as client:
        assert client.server_info().server_instance == started.server_instance
        assert client.forward(np.ones((2, 3)), np.ones((3, 1))).sum() == 6

        def rows() -> object:
            yield np.ones((2, 3))
            wait_until(lambda: host.load().running == 1, "the job runs")
            loads.append(host.load())

        loads: list[object] = []
        with client.stream(rows(), np.ones((3, 1)), results="y") as stream:
            list(stream)
    (load,) = loads
    assert (load.running, load.queued) == (1, 0)  # type: ignore[attr-defined]
    host.drain()
    with pytest.raises(gradwire.ConnectError):
        gradwire.connect(started.address)


def test_a_port_that_is_taken_is_named() -> None:
    first = ServerHost("127.0.0.1", SMALL)
    port = int(first.start().address.rpartition(":")[2])
    with pytest.raises(ListenError, match=str(port)):
        ServerHost("127.0.0.1", replace(SMALL, port=port)).start()
    first.drain()


@pytest.mark.parametrize(
    ("host", "listen"),
    [
        ("10.0.0.3", ("10.0.0.3:50051", "127.0.0.1:50051")),
        ("fd00::3", ("[fd00::3]:50051", "127.0.0.1:50051")),
        ("127.0.0.2", ("127.0.0.2:50051",)),
    ],
)
def test_a_server_listens_for_its_network_and_for_its_node(
    host: str, listen: tuple[str, ...]
) -> None:
    settings = server_settings(host, PoolSettings())
    assert settings.listen == listen
    assert settings.allow_shared_memory


def test_a_server_whose_parent_has_gone_ends_once_it_has_no_jobs() -> None:
    child = textwrap.dedent("""
        import sys, time
        from gradwire_ray import host
        from gradwire_ray.settings import PoolSettings
        from gradwire_server import Settings

        host.ORPHAN_S, host.LOOK_S = 0.2, 0.05
        settings = Settings(backend="numpy", keep_memory=False)
        server = host.ServerHost("127.0.0.1", PoolSettings(port=0, server=settings))
        print(server.start().address, flush=True)
        time.sleep(60)
    """)
    parent = (
        "import subprocess, sys;"
        "subprocess.Popen([sys.executable, '-c', sys.argv[1]]);"
        "input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", parent, child],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        address = process.stdout.readline().strip()
        with gradwire.connect(address) as client:

            def rows() -> object:
                yield np.ones((2, 3))
                process.stdin.close()  # and so the parent ends
                process.wait(10)
                time.sleep(0.5)
                yield np.ones((2, 3))

            with client.stream(rows(), np.ones((3, 1)), results="y") as stream:
                assert sum(block.y.sum() for block in stream) == 12
        # The end of what the server writes to is the end of its process.
        assert process.stdout.read() == ""
