"""A pool in a real Ray cluster: the tests of this module share it, in their order."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil
import pytest

import gradwire
from gradwire_protocol.ray_pool import PoolServer
from tests.ray.conftest import RayCluster, gradwire_ray, wait_for
from tests.support.oracle import assert_right, bounds, exact, operands, same_bits

FLAGS = (
    "--",
    "--max-jobs",
    "4",
    "--grace",
    "1",
    "--cpu-threads",
    "1",
    "--row-block-bytes",
    "64KiB",
)


@pytest.fixture(scope="module", autouse=True)
def started(cluster: RayCluster) -> Iterator[str]:
    """What `gradwire ray up` prints."""
    yield gradwire_ray(cluster, "up", "--port", "0", *FLAGS)
    gradwire_ray(cluster, "down")


@pytest.fixture(scope="module")
def client(started: str) -> Iterator[gradwire.Client]:
    import gradwire.ray

    with gradwire.ray.connect(timeout_s=30) as client:
        yield client


def servers() -> dict[str, PoolServer]:
    """The pool's servers, by the IP address of the node."""
    from gradwire_ray import control

    def answered() -> Any:
        # While its node is lost, and it comes back on another one.
        with contextlib.suppress(control.PoolError):
            return control.status()

    return {each.host: each for each in wait_for(answered).servers}


def serving() -> set[str]:
    return {host for host, each in servers().items() if each.state == "serving"}


def hosts_of_jobs(client: gradwire.Client) -> set[str]:
    """Where some small jobs are computed."""
    found = set()
    for _ in range(6):
        client.gradients(*operands(4, 3, 2))
        assert client.last_receipt is not None
        found.add(client.last_receipt.server_address.rpartition(":")[0])
    return found


class Steady:
    """Jobs without a pause, in a thread, until the context is left."""

    def __init__(self, client: gradwire.Client) -> None:
        self._client = client
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.jobs = 0
        self.errors: list[Exception] = []

    def _run(self) -> None:
        x, w, dy = operands(64, 32, 16)
        expected = exact(x, w, dy)["dw"]
        while not self._end.is_set():
            try:
                dw = self._client.gradients(x, w, dy).dw
                np.testing.assert_allclose(dw, expected, rtol=1e-3, atol=1e-3)
                self.jobs += 1
            except Exception as error:  # noqa: BLE001 - the test shows it
                self.errors.append(error)

    def __enter__(self) -> Steady:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        assert not self.errors
        assert self.jobs > 0


def test_up_starts_a_server_on_every_node_that_takes_work(
    cluster: RayCluster, started: str
) -> None:
    found = json.loads(gradwire_ray(cluster, "status", "--json"))
    assert {each["host"] for each in found["servers"]} == set(cluster.nodes)
    table = gradwire_ray(cluster, "status")
    for each in found["servers"]:
        assert each["state"] == "serving"
        assert each["address"].startswith(f"{each['host']}:")
        assert f"{each['address']} serves (numpy: " in started
        assert each["address"] in table


def test_servers_have_the_flags_after_the_dashes(
    client: gradwire.Client,
) -> None:
    for each in servers().values():
        assert client.server_info(address=each.address).limits.max_jobs == 4


def test_servers_are_as_important_as_other_processes(cluster: RayCluster) -> None:
    pids = cluster.pids()
    assert set(pids) == set(cluster.nodes)
    assert [psutil.Process(pid).nice() for pid in pids.values()] == [0, 0]


def test_a_second_up_with_other_flags_is_refused(cluster: RayCluster) -> None:
    other = ("up", "--port", "0", "--", "--max-jobs", "5")
    assert "stop it first" in gradwire_ray(cluster, *other, status=1)


def test_jobs_go_to_all_servers(cluster: RayCluster, client: gradwire.Client) -> None:
    assert hosts_of_jobs(client) == set(cluster.nodes)


def test_one_job_is_spread_over_all_servers(
    cluster: RayCluster, client: gradwire.Client
) -> None:
    x, w, dy = operands(8192, 64, 32)
    found = client.gradients(x, w, dy, spread=True)
    assert_right(found, x, w, dy, "float32")
    addresses = {each.server_address for each in found.receipt.segments}
    assert {each.rpartition(":")[0] for each in addresses} == set(cluster.nodes)


def made_on(host: str, rows: int, seed: int) -> Any:
    """A reference to a matrix of 64 columns that lies on a node alone."""
    import ray

    @ray.remote(num_cpus=0, resources={f"node:{host}": 0.01})
    def made() -> Any:
        rng = np.random.default_rng(seed)
        return rng.standard_normal((rows, 64), dtype=np.float32)

    return made.remote()


def places_of(ref: Any) -> set[str]:
    """The IP addresses of the nodes that hold an object."""
    import ray
    from ray.experimental import get_object_locations

    hosts = {each["NodeID"]: each["NodeManagerAddress"] for each in ray.nodes()}
    ray.wait([ref], fetch_local=False)
    return {hosts[node] for node in get_object_locations([ref])[ref]["node_ids"]}


def test_gradients_of_references_are_computed_where_most_of_them_lie(
    cluster: RayCluster, client: gradwire.Client
) -> None:
    import ray

    import gradwire.ray

    one, other = cluster.nodes
    x, w, dy = made_on(one, 4096, 1), made_on(other, 64, 2), made_on(one, 4096, 3)
    found = gradwire.ray.gradients(x, w, dy, results=("y", "dx", "dw", "db"))
    places = [places_of(each) for each in (x, dy, found.y, found.dx)]
    assert places == [{one}] * 4  # and so did not come to this program's node
    receipt = ray.get(found.receipt)
    assert receipt.server_instance == servers()[one].server_instance
    assert receipt.transport == "shm"
    given = ray.get([x, w, dy])
    here = client.gradients(*given, results=("y", "dx", "dw", "db"))
    expected, allowed = exact(*given), bounds(*given, "float32")
    for name in ("y", "dx", "dw", "db"):
        result = ray.get(getattr(found, name))
        assert (abs(result - expected[name]) <= allowed[name]).all()
        assert same_bits(result, getattr(here, name))


def test_operands_meet_on_one_node_and_unwanted_results_are_none(
    cluster: RayCluster,
) -> None:
    import ray

    import gradwire.ray

    one, other = cluster.nodes
    x, dy = made_on(one, 4096, 1), made_on(other, 4096, 2)
    found = gradwire.ray.gradients(x, None, dy, results="dw")
    assert (found.y, found.dx, found.db) == (None, None, None)
    given = [ray.get(each).astype(float) for each in (x, dy)]
    np.testing.assert_allclose(
        ray.get(found.dw), given[0].T @ given[1], rtol=1e-3, atol=1e-3
    )


def test_an_error_of_a_job_is_that_of_the_client() -> None:
    import ray

    import gradwire.ray

    refs = gradwire.ray.gradients(np.ones((3, 4)), np.ones((5, 2)), np.ones((3, 2)))
    with pytest.raises(gradwire.InputError, match="5"):
        ray.get(refs.y)


def test_a_killed_server_is_started_again_and_its_client_goes_on(
    cluster: RayCluster, client: gradwire.Client
) -> None:
    host, pid = next(iter(cluster.pids().items()))
    with Steady(client):
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: cluster.pids().get(host, pid) != pid)
        wait_for(lambda: serving() == set(cluster.nodes))
        wait_for(lambda: host in hosts_of_jobs(client))


def test_a_node_that_joins_gets_a_server_with_all_its_gpus_and_jobs(
    cluster: RayCluster, client: gradwire.Client
) -> None:
    import ray

    host = cluster.add(gpus=2)
    wait_for(lambda: host in hosts_of_jobs(client))
    assert ray.cluster_resources()["GPU"] == 2
    assert ray.available_resources().get("GPU", 0) == 0


def test_the_servers_of_a_lost_node_are_forgotten_and_their_client_goes_on(
    cluster: RayCluster, client: gradwire.Client
) -> None:
    with Steady(client):
        # That of the pool itself, unless that is the head.
        host = next(iter(cluster.pids("PoolActor") or cluster.nodes))
        cluster.kill(host)
        wait_for(lambda: host not in servers())
    wait_for(lambda: host not in hosts_of_jobs(client))


def test_the_number_of_servers_can_be_changed(
    cluster: RayCluster, client: gradwire.Client
) -> None:
    with Steady(client):
        gradwire_ray(cluster, "up", "--nodes", "1", "--port", "0", *FLAGS)
        (host,) = wait_for(lambda: len(found := serving()) == 1 and found)
        wait_for(lambda: set(cluster.pids()) == {host})
        wait_for(lambda: hosts_of_jobs(client) == {host})


def test_down_leaves_nothing_behind(cluster: RayCluster) -> None:
    import gradwire.ray

    client = gradwire.ray.connect()
    assert gradwire_ray(cluster, "down") == "stopped 1 server\n"
    assert not cluster.pids()
    assert "start one" in gradwire_ray(cluster, "status", status=1)
    with pytest.raises(gradwire.ConnectError, match="gradwire ray up"):
        gradwire.ray.connect()
    threads = [each for each in threading.enumerate() if each.name == "gradwire-ray"]
    client.close()
    wait_for(lambda: sum(each.is_alive() for each in threads) < len(threads))
