"""How many servers a pool wants, from the lengths of their queues."""

from __future__ import annotations

import pytest

from gradwire_ray.scaling import COME_S, DOWN_AFTER_S, UP_AFTER_S, Scaler, bundles
from gradwire_ray.settings import PoolSettings


def observe(
    scaler: Scaler, begin: float, s: float, servers: int, running: int, queued: int
) -> int:
    """What is wanted after seconds of one load, with an observation in each."""
    for now in range(int(begin), int(begin + s) + 1):
        scaler.observe(now, servers, running, queued)
    return scaler.wanted


def test_jobs_that_wait_for_a_while_bring_half_as_many_servers_more() -> None:
    scaler = Scaler(least=4, most=100)
    assert observe(scaler, 0, UP_AFTER_S - 1, servers=4, running=8, queued=4) == 4
    assert observe(scaler, UP_AFTER_S, 0, servers=4, running=8, queued=4) == 6


def test_no_more_are_wanted_while_those_are_on_their_way() -> None:
    scaler = Scaler(least=4, most=100)
    assert observe(scaler, 0, UP_AFTER_S, servers=4, running=8, queued=9) == 6
    assert observe(scaler, 20, COME_S - 20, servers=5, running=8, queued=9) == 6
    # They came, and jobs still wait.
    assert observe(scaler, 400, UP_AFTER_S, servers=6, running=8, queued=9) == 9
    # They do not come.
    assert observe(scaler, 500, COME_S + UP_AFTER_S, 6, running=8, queued=9) == 14


def test_a_short_queue_and_a_passing_one_change_nothing() -> None:
    scaler = Scaler(least=4, most=100)
    assert observe(scaler, 0, 1000, servers=4, running=8, queued=3) == 4
    for begin in range(1000, 2000, 20):
        observe(scaler, begin, UP_AFTER_S - 1, servers=4, running=8, queued=4)
        observe(scaler, begin + 10, 0, servers=4, running=8, queued=0)
    assert scaler.wanted == 4


def test_idle_servers_leave_one_by_one() -> None:
    scaler = Scaler(least=2, most=8)
    scaler.wanted = 5
    assert observe(scaler, 0, DOWN_AFTER_S - 1, servers=5, running=4, queued=0) == 5
    assert observe(scaler, DOWN_AFTER_S, 0, servers=5, running=4, queued=0) == 4
    # Four jobs keep four servers.
    assert observe(scaler, 400, 3 * DOWN_AFTER_S, servers=4, running=4, queued=0) == 4
    assert observe(scaler, 2000, 9 * DOWN_AFTER_S, servers=4, running=0, queued=0) == 2


def test_the_bounds_hold() -> None:
    scaler = Scaler(least=2, most=4)
    assert observe(scaler, 0, 5000, servers=4, running=99, queued=99) == 4
    assert observe(scaler, 9000, 9 * DOWN_AFTER_S, servers=4, running=0, queued=0) == 2


def test_without_a_server_nothing_can_be_said_of_the_queue() -> None:
    assert observe(Scaler(2, 8), 0, 5000, servers=0, running=0, queued=0) == 2


def test_a_node_is_asked_for_by_all_of_its_cpus_or_gpus() -> None:
    """Two bundles must not fit on one node."""
    cpu, gpu = {"CPU": 8.0, "GPU": 0.0}, {"CPU": 32.0, "GPU": 4.0}
    assert bundles(2, [cpu]) == [{"CPU": 8.0}] * 2
    assert bundles(3, [gpu, {"CPU": 16.0, "GPU": 2.0}]) == [{"GPU": 2.0}] * 3
    assert bundles(2, [cpu, gpu]) == [{"CPU": 8.0}] * 2
    assert bundles(2, []) == [{"CPU": 1.0}] * 2
    assert bundles(0, [cpu]) == []


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"nodes": 0}, "nodes is 0: expected at least 1"),
        ({"nodes": 4, "max_nodes": 3}, "max_nodes is 3: expected at least nodes, 4"),
        ({"max_nodes": 3}, "max_nodes is set without nodes"),
        ({"port": 65536}, "port is 65536"),
    ],
)
def test_settings_out_of_range_are_refused(given: dict[str, int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        PoolSettings(**given)  # type: ignore[arg-type]
