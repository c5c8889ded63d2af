"""What a pool starts and stops, over a cluster that does as it is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from gradwire_protocol.ray_pool import PoolServer
from gradwire_ray.host import Load, LostError, Started
from gradwire_ray.pool import (
    GIVEN_UP_S,
    MOST_PAUSE_S,
    SILENT_S,
    SLACK_S,
    STABLE_S,
    START_S,
    GoneError,
    Node,
    Pool,
)
from gradwire_ray.scaling import UP_AFTER_S
from gradwire_ray.settings import PoolSettings
from gradwire_server import Settings

IDLE = Load(0, 0)


class Call:
    """A call that is answered when the test says so."""

    def __init__(self, node: str, method: str) -> None:
        self.node, self.method = node, method
        self.answer: Any = None

    def poll(self) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class FakeCluster:
    """Servers that answer at once, unless the test has another answer for them."""

    def __init__(self, *names: str) -> None:
        self.there = [Node(name, f"ip-{name}", cpus=2, gpus=0) for name in names]
        self.reachable = True
        self.earlier: list[str] = []
        self.killed: list[str] = []
        self.requested: list[Any] = []
        self.calls: list[Call] = []
        self.answers: dict[tuple[str, str], Any] = {}

    def nodes(self) -> list[Node]:
        if not self.reachable:
            raise ConnectionError("no GCS")
        return self.there

    def existing(self) -> list[str]:
        return self.earlier

    def call(self, node: Node, method: str) -> Call:
        call = Call(node.id, method)
        usual = {
            "start": Started(f"{node.host}:1", "127.0.0.1:1", "x", "numpy"),
            "load": IDLE,
            "drain": True,
        }
        call.answer = self.answers.get((node.id, method), usual[method])
        self.calls.append(call)
        return call

    def kill(self, node: Node) -> None:
        self.killed.append(node.id)

    def request(self, bundles: list[Any]) -> None:
        self.requested.append(bundles)

    def never(self, node: str, method: str) -> None:
        """Have the calls of a server's method unanswered from now on."""
        self.answers[node, method] = None

    def count(self, node: str, method: str) -> int:
        return sum((each.node, each.method) == (node, method) for each in self.calls)


class Clock:
    """Steps of a pool, a second apart."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.now = 1000.0

    def run(self, seconds: float) -> dict[str, PoolServer]:
        """The servers after so many seconds, by the id of the node."""
        for _ in range(int(seconds)):
            self.now += 1
            self.pool.step(self.now)
        return {each.node_id: each for each in self.pool.status().servers}

    def states(self, seconds: float) -> dict[str, str]:
        return {name: each.state.value for name, each in self.run(seconds).items()}


@pytest.fixture
def cluster() -> FakeCluster:
    return FakeCluster("a", "b")


Make = Callable[..., Clock]


@pytest.fixture
def make(cluster: FakeCluster) -> Make:
    return lambda **given: Clock(Pool(PoolSettings(**given), cluster))


def test_there_is_a_server_on_every_node_that_takes_work(
    cluster: FakeCluster, make: Make
) -> None:
    cluster.there.append(Node("head", "ip-head", cpus=0, gpus=0))
    pool = make()
    assert pool.states(1) == {"a": "starting", "b": "starting"}
    found = pool.run(1)
    assert {each.state for each in found.values()} == {"serving"}
    assert found["a"].address == "ip-a:1"
    assert pool.pool.status().wanted == 2


def test_a_node_that_joins_gets_one_and_that_of_a_dead_node_goes(
    cluster: FakeCluster, make: Make
) -> None:
    pool = make()
    pool.run(2)
    cluster.there = [cluster.there[1], Node("c", "ip-c", cpus=2, gpus=0)]
    assert pool.states(2) == {"b": "serving", "c": "serving"}


def test_a_spare_node_takes_the_place_of_a_dead_one(
    cluster: FakeCluster, make: Make
) -> None:
    pool = make(nodes=1)
    (first,) = pool.states(2)
    cluster.there = [node for node in cluster.there if node.id != first]
    assert set(pool.states(2)) == {"a", "b"} - {first}


def test_nodes_with_gpus_come_first(cluster: FakeCluster, make: Make) -> None:
    cluster.there.append(Node("g", "ip-g", cpus=1, gpus=2))
    assert make(nodes=1).states(2) == {"g": "serving"}


def test_a_server_whose_process_ended_is_started_again_ever_later(
    cluster: FakeCluster, make: Make
) -> None:
    pool = make()
    pool.run(2)
    cluster.answers["a", "load"] = GoneError("killed")
    pool.run(100)
    often = cluster.count("a", "start")
    assert 6 <= often <= 9  # after 1, 2, 4, ... seconds
    assert ("ip-a", "killed") in pool.pool.status().failures
    pool.run(5 * MOST_PAUSE_S)
    assert cluster.count("a", "start") >= often + 4
    del cluster.answers["a", "load"]
    assert pool.states(MOST_PAUSE_S + 2)["a"] == "serving"
    pool.run(STABLE_S + 1)
    assert pool.pool.status().failures == ()


def test_a_server_that_lost_its_device_is_replaced(
    cluster: FakeCluster, make: Make
) -> None:
    pool = make()
    pool.run(2)
    cluster.answers["a", "load"] = LostError("cupy's device 0 failed for good")
    pool.run(2)
    assert cluster.killed == ["a"]
    assert pool.pool.status().failures == (("ip-a", "cupy's device 0 failed for good"),)


def test_a_server_that_cannot_start_says_why(cluster: FakeCluster, make: Make) -> None:
    cluster.answers["a", "start"] = OSError("port 50051 is taken")
    pool = make()
    assert pool.states(2) == {"b": "serving"}
    assert pool.pool.status().failures == (("ip-a", "port 50051 is taken"),)


def test_one_that_starts_for_too_long_is_given_up(
    cluster: FakeCluster, make: Make
) -> None:
    cluster.never("a", "start")
    pool = make()
    pool.run(START_S - 1)
    assert cluster.killed == []
    pool.run(3)
    assert cluster.killed == ["a"]


def test_a_silent_server_is_none_for_new_jobs_and_given_up_at_last(
    cluster: FakeCluster, make: Make
) -> None:
    pool = make()
    pool.run(2)
    cluster.never("a", "load")
    pool.run(1)
    assert pool.states(SILENT_S + 2)["a"] == "silent"
    (late,) = (each for each in cluster.calls if each.answer is None)
    late.answer = IDLE
    assert pool.states(1)["a"] == "serving"
    pool.run(GIVEN_UP_S + 3)
    assert cluster.killed == ["a"]


def test_all_stays_as_it_is_while_ray_does_not_answer(
    cluster: FakeCluster, make: Make
) -> None:
    pool = make()
    pool.run(2)
    cluster.reachable = False
    cluster.answers["b", "load"] = Load(3, 4)
    pool.run(2)
    found = pool.run(1000)
    assert {each.state for each in found.values()} == {"serving"}
    assert (found["b"].running_jobs, found["b"].queued_jobs) == (3, 4)


def test_a_new_pool_takes_over_the_servers_of_an_earlier_one(
    cluster: FakeCluster, make: Make
) -> None:
    cluster.earlier = ["b", "long-gone"]
    assert make(nodes=1).states(2) == {"b": "serving"}


def test_more_servers_are_asked_for_while_jobs_wait(
    cluster: FakeCluster, make: Make
) -> None:
    pool = make(nodes=2, max_nodes=4)
    pool.run(2)
    for name in ("a", "b"):
        cluster.answers[name, "load"] = Load(5, 1)
    pool.run(UP_AFTER_S + 3)
    assert cluster.requested[1:] == [[{"CPU": 2}] * 2, [{"CPU": 2}] * 3]
    cluster.there.append(Node("c", "ip-c", cpus=2, gpus=0))
    assert set(pool.states(2)) == {"a", "b", "c"}


def test_nodes_that_are_missing_are_asked_for_until_the_pool_stops(
    cluster: FakeCluster, make: Make
) -> None:
    nodes, cluster.there = cluster.there, []
    pool = make(nodes=3)
    pool.run(2)
    cluster.there = nodes
    pool.run(2)
    cluster.there = []
    pool.run(2)
    pool.pool.stop()
    pool.run(2)
    assert cluster.requested == [[{"CPU": 1}] * 3, [{"CPU": 2}] * 3, []]


def test_too_many_servers_drain_those_with_the_fewest_jobs_first(
    cluster: FakeCluster, make: Make
) -> None:
    cluster.earlier = ["a", "b"]
    cluster.answers["a", "load"] = Load(1, 0)
    cluster.never("b", "drain")
    pool = make(nodes=1)
    pool.run(3)
    assert pool.states(3) == {"a": "serving", "b": "draining"}
    assert cluster.killed == []
    (drain,) = (each for each in cluster.calls if each.method == "drain")
    drain.answer = True
    assert pool.states(1) == {"a": "serving"}
    assert cluster.killed == ["b"]


def test_a_server_that_drains_for_too_long_is_killed(
    cluster: FakeCluster, make: Make
) -> None:
    cluster.never("a", "drain")
    pool = make(server=Settings(grace=20))
    pool.run(3)
    pool.pool.stop()
    assert pool.states(20 + SLACK_S) == {"a": "draining"}
    assert pool.states(2) == {}
    assert sorted(cluster.killed) == ["a", "b"]


def test_a_pool_that_stops_drains_all_and_starts_none(
    cluster: FakeCluster, make: Make
) -> None:
    pool = make()
    pool.run(2)
    pool.pool.stop()
    assert pool.states(3) == {}
    status = pool.pool.status()
    assert (status.stopping, status.wanted, status.failures) == (True, 0, ())
    assert cluster.count("a", "start") == 1
