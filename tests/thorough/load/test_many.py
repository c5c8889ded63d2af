"""More calls than a server can do, more clients than it hears of, and an hour."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator

import numpy as np
import pytest

import gradwire
from bench.load.generator import OK, Kind, Load, endings, rate_of
from tests.contract.conftest import assert_untroubled
from tests.support import oracle
from tests.support.observing import (
    CUDA_BYTES,
    MIB,
    descriptors,
    forget_peak,
    misbehaving_clients,
    module,
    peak,
    resident,
    wait_until,
)
from tests.support.serving import ServerProcess, running_server

LIMIT = 256 * MIB
DEADLINE_S = 20.0
EARLY_S = 0.1
MAX_JOBS, MAX_QUEUE = 2, 6
CLIENTS = 1000
RESERVED_DESCRIPTORS = 64
"""More than a server of nobody has."""


@pytest.fixture
async def busy_server() -> AsyncIterator[ServerProcess]:
    with running_server(
        memory_limit=LIMIT, max_jobs=MAX_JOBS, max_queue=MAX_QUEUE
    ) as server:
        yield server
        assert_untroubled(server)


async def test_at_three_times_its_capacity_a_server_refuses_early_and_keeps_its_word(
    busy_server,
):
    async with gradwire.AsyncClient(
        busy_server.address, retries=False, timeout_s=DEADLINE_S
    ) as client:

        def call(*shape: int):
            given = oracle.operands(*shape)
            return lambda: client.gradients(*given)

        mix = [
            Kind("small", 3, call(32, 32, 32)),
            Kind("large", 1, call(600, 600, 600)),
        ]
        for kind in mix:
            await kind.call()
        forget_peak(busy_server)
        for _ in range(3):  # the machine has moods of its own
            capacity = rate_of(await Load(mix).closed(MAX_JOBS, 1.0))
            load = Load(mix)
            made = await load.open(3 * capacity, 2.0)
            refused = [one for one in made if one.status != OK]
            # A third of what comes can be done, and a little waits.
            if len(refused) > len(made) / 4:
                break
        assert len(refused) > len(made) / 4
        assert peak(busy_server) <= LIMIT + CUDA_BYTES
        began = time.monotonic()
        while not await _answers(mix[1]):
            assert time.monotonic() - began < 5
    assert not load.left_out
    ended = endings(made)
    assert set(ended) == {OK, "RESOURCE_EXHAUSTED/BUSY"}, ended
    assert all(one.retry_after_s for one in refused)
    took = [
        record["total_s"]
        for record in busy_server.records
        if record.get("reason") == "BUSY"
    ]
    assert len(took) >= len(refused)
    assert np.median(took) < EARLY_S
    assert max(one.latency_s for one in made) < DEADLINE_S


async def _answers(kind: Kind) -> bool:
    try:
        await kind.call()
    except gradwire.ServerBusyError:
        return False
    return True


def test_a_thousand_clients_may_be_connected():
    x, w, dy = oracle.operands(200, 64, 64)
    with (
        running_server(memory_limit=LIMIT) as server,
        gradwire.connect(server.address, retries=False) as client,
    ):
        expected = client.gradients(x, w, dy)
        before, was_resident = descriptors(server.pid), resident(server)
        with misbehaving_clients(server, "be_connected", CLIENTS):
            # One each, and nothing for what they might call.
            more = descriptors(server.pid) - before
            assert CLIENTS <= more <= CLIENTS + RESERVED_DESCRIPTORS
            assert resident(server) - was_resident < 100 * MIB
            for _ in range(20):
                with gradwire.connect(server.address, retries=False) as another:
                    result = another.gradients(x, w, dy)
                assert oracle.same_bits(result.dw, expected.dw)
        wait_until(
            lambda: descriptors(server.pid) <= before + RESERVED_DESCRIPTORS,
            "the descriptors are given back",
        )
        assert oracle.same_bits(client.gradients(x, w, dy).y, expected.y)
        assert_untroubled(server)


@pytest.mark.parametrize(
    "rounds",
    [2, pytest.param(1200, marks=[pytest.mark.big, pytest.mark.timeout(3600)])],
)
def test_an_hour_of_calls_leaves_memory_and_descriptors_as_they_were(rounds, tmp_path):
    """A round is what a training loop does in five minutes: see `hour`."""
    with (
        running_server(
            listen=["127.0.0.1:0", f"unix:{tmp_path / 'socket'}"],
            memory_limit=LIMIT,
            allow_shared_memory=True,
            idle_timeout=5.0,
        ) as server,
        module("hour", *server.addresses) as client,
    ):
        seen = []
        for _ in range(rounds):
            client.stdin.write("go\n")
            client.stdin.flush()
            calls = json.loads(client.stdout.readline())
            seen.append(
                {
                    "server_descriptors": descriptors(server.pid),
                    "client_descriptors": descriptors(client.pid),
                    "server_bytes": resident(server),
                    "client_bytes": calls["resident_bytes"],
                }
            )
        assert_untroubled(server)
    warm, last = seen[rounds // 3], seen[-1]
    for side in ("server", "client"):
        assert last[f"{side}_descriptors"] <= warm[f"{side}_descriptors"] + 4, seen
        assert last[f"{side}_bytes"] <= warm[f"{side}_bytes"] + 16 * MIB, seen
