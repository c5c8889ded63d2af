"""The processor time of gradients of arrays in Ray's object store.

    make test-ray                       # makes the environment
    scripts/in-namespace .venv-ray/bin/python -m bench.ray_refs

Two nodes on this host, with processes of their own. It prints seconds, and CPU seconds
of all processes (Ray's, the server's, the task's and this one's) per GB of operands and
results: for operands on the server's node, and for the same job of this program, whose
operands are on no node with a server.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import ray
from ray.cluster_utils import Cluster

import gradwire.ray
from gradwire_ray import control
from gradwire_ray.settings import PoolSettings

M, N, K = 131072, 1008, 16
GB = 4 * (2 * M * N + 2 * M * K + 2 * N * K) / 1e9
RUNS = 7
MIB = 1 << 20


def cpu_s() -> float:
    """CPU seconds so far of this process and of all that it started."""
    me = psutil.Process()
    total = 0.0
    for process in [me, *me.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def measured(name: str, run: Callable[[], str]) -> None:
    """Print what a call takes: the first one, and the median of the others."""
    seen = []
    for _ in range(RUNS):
        before, begun = cpu_s(), time.perf_counter()
        transport = run()
        seconds = time.perf_counter() - begun
        time.sleep(0.5)  # for what others still do, which counts
        seen.append(((cpu_s() - before) / GB, seconds))
    first, *others = seen
    middle = [statistics.median(each) for each in zip(*others, strict=True)]
    print(
        f"{name:32} {transport:7} first {first[0]:.2f} CPU s/GB, {first[1]:.2f} s;"
        f" then {middle[0]:.2f} CPU s/GB, {middle[1]:.2f} s"
    )


@ray.remote(num_cpus=0)
def made(rows: int, columns: int, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, columns), dtype=np.float32)


def main() -> int:
    head = {"node_ip_address": "127.0.0.1", "num_cpus": 0, "include_dashboard": False}
    head["object_store_memory"] = 100 * MIB
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        cluster.add_node(
            node_ip_address="127.0.0.2", num_cpus=2, object_store_memory=4000 * MIB
        )
        with control.joined(cluster.address):
            control.up(PoolSettings(port=0), 120)
            there = made.options(resources={"node:127.0.0.2": 0.01})
            x, w, dy = (
                there.remote(*shape, seed)
                for seed, shape in enumerate([(M, N), (N, K), (M, K)])
            )

            ray.wait([x, w, dy], num_returns=3, fetch_local=False)

            def on_node(connection: Any) -> str:
                refs = gradwire.ray.gradients(x, w, dy, connection=connection)
                return str(ray.get(refs.receipt).transport)

            measured("references", lambda: on_node({}))
            measured("references, auto", lambda: on_node({"transport": "auto"}))
            rng = np.random.default_rng(0)
            arrays = [
                rng.standard_normal(shape, dtype=np.float32)
                for shape in [(M, N), (N, K), (M, K)]
            ]
            with gradwire.ray.connect() as client:
                measured(
                    "arrays of this program",
                    lambda: client.gradients(*arrays).receipt.transport,
                )
            control.down()
    finally:
        cluster.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
