"""Real Ray clusters, each node with processes of its own and an address of loopback.

Ray listens on all interfaces. So these tests run where there is loopback alone:
`make test-ray` runs them in a network namespace.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

MIB = 1024 * 1024


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of this folder need Ray, and loopback alone."""
    here = Path(__file__).parent
    lacks = None
    if importlib.util.find_spec("ray") is None:
        lacks = "needs Ray"
    elif [name for _, name in socket.if_nameindex()] != ["lo"]:
        lacks = "needs a network namespace, as make test-ray makes"
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.ray)
            if lacks:
                item.add_marker(pytest.mark.skip(reason=lacks))


class RayCluster:
    """A head, which takes no work, and nodes."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(
            initialize_head=True, head_node_args=self._node(1, cpus=0)
        )
        self._last = 1
        self.nodes: dict[str, Any] = {}

    @staticmethod
    def _node(number: int, cpus: int) -> dict[str, Any]:
        return {
            "node_ip_address": f"127.0.0.{number}",
            "num_cpus": cpus,
            "object_store_memory": 100 * MIB,
            "include_dashboard": False,
        }

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add(self, gpus: int = 0) -> str:
        """Start a node, with GPUs as far as Ray knows; return its IP address."""
        self._last += 1
        host = f"127.0.0.{self._last}"
        node = self._node(self._last, cpus=2)
        self.nodes[host] = self._cluster.add_node(num_gpus=gpus, **node)
        return host

    def kill(self, host: str) -> None:
        """End a node as a loss of power does."""
        self._cluster.remove_node(self.nodes.pop(host), allow_graceful=False)

    def kill_gcs(self) -> None:
        (gcs,) = self._cluster.head_node.all_processes["gcs_server"]
        gcs.process.kill()

    def pids(self, actor: str = "ServerHost") -> dict[str, int]:
        """The processes of actors of a class, by the IP address of the node."""
        found = {}
        for host, node in self.nodes.items():
            (raylet,) = node.all_processes["raylet"]
            for process in psutil.Process(raylet.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):  # or a zombie
                    if f"ray::{actor}" in " ".join(process.cmdline()):
                        found[host] = process.pid
        return found

    def stop(self) -> None:
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """A cluster of two nodes beside the head, and this process is in it."""
    import ray

    made = RayCluster()
    try:
        made.add()
        made.add()
        ray.init(made.address, log_to_driver=False, logging_level="ERROR")
        yield made
    finally:
        ray.shutdown()
        made.stop()


def gradwire_ray(cluster: RayCluster, *arguments: str, status: int = 0) -> str:
    """What `gradwire ray` prints, if it ends with this status."""
    command = [sys.executable, "-m", "gradwire_cli", "ray", *arguments]
    done = subprocess.run(
        command,
        env=os.environ | {"RAY_ADDRESS": cluster.address},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == status, done.stderr
    return done.stdout or done.stderr


def wait_for(condition: Callable[[], Any], timeout_s: float = 40.0) -> Any:
    """What a condition returns, once that is true."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.1)
    return found
