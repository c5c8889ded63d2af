"""One client of many threads, of a process that forks, of one event loop."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import gradwire
from tests import oracle


def test_sixteen_threads_share_a_client(client: gradwire.Client) -> None:
    start = threading.Barrier(16)

    def work(number: int) -> None:
        x, w, dy = oracle.operands(100 + number, 20, 30, seed=number)
        start.wait()
        for _ in range(4):
            result = client.gradients(x, w, dy)
            oracle.assert_right(result, x, w, dy, "float32")
            assert client.last_receipt is result.receipt
            blocks = list(client.stream([(x, dy)], w))
            assert sum(len(block) for block in blocks) == 100 + number

    with ThreadPoolExecutor(16) as pool:
        for done in [pool.submit(work, number) for number in range(16)]:
            done.result(60)


async def test_many_coroutines_share_a_client(server_address: str) -> None:
    async with gradwire.AsyncClient(server_address) as client:
        jobs = [oracle.operands(50 + i, 20, 30, seed=i) for i in range(16)]
        results = await asyncio.gather(*(client.gradients(*job) for job in jobs))
    for job, result in zip(jobs, results, strict=True):
        oracle.assert_right(result, *job, "float32")


async def test_an_async_client_needs_no_context(server_address: str) -> None:
    client = gradwire.AsyncClient(server_address)
    x, w, dy = oracle.operands(5, 4, 3)
    oracle.assert_right(await client.gradients(x, w, dy), x, w, dy, "float32")
    await client.close()


def test_an_async_client_belongs_to_the_loop_of_its_first_use(
    server_address: str,
) -> None:
    operands = oracle.operands(5, 4, 3)
    client = gradwire.AsyncClient(server_address)
    with asyncio.Runner() as first, asyncio.Runner() as second:
        first.run(client.gradients(*operands))
        with pytest.raises(gradwire.ClientStateError) as refused:
            second.run(client.gradients(*operands))
        assert str(refused.value) == (
            "this AsyncClient belongs to another event loop, that of its first use:"
            " make one for each loop"
        )
        assert first.run(client.gradients(*operands)).receipt.m == 5
        first.run(client.close())


FORK = """
    import faulthandler, os, sys, threading
    import numpy as np
    import gradwire
    faulthandler.dump_traceback_later(60, exit=True)
    address, busy_threads = sys.argv[1], int(sys.argv[2])
    rng = np.random.default_rng(0)
    x, w, dy = rng.normal(size=(300, 40)), rng.normal(size=(40, 30)), None
    big = rng.normal(size=(3000, 40))
    client = gradwire.connect(address)
    expected = client.forward(x, w)

    stop = threading.Event()
    running = threading.Barrier(busy_threads + 1)

    def keep_busy():
        client.forward(big, w)
        running.wait()
        while not stop.is_set():
            client.forward(big, w)

    threads = [threading.Thread(target=keep_busy) for _ in range(busy_threads)]
    for thread in threads:
        thread.start()
    running.wait()

    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            # A child has no threads but this one, and a connection of its own.
            for _ in range(3):
                assert np.array_equal(client.forward(x, w), expected)
                blocks = list(client.stream([x], w, results="y"))
                assert sum(len(block) for block in blocks) == 300
            client.close()
            os._exit(0)
        children.append(child)
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
    for _ in range(3):
        assert np.array_equal(client.forward(x, w), expected)
    stop.set()
    for thread in threads:
        thread.join()
    client.close()
    print("all is well")
"""


@pytest.mark.parametrize("busy_threads", [0, 4], ids=["idle", "in the middle"])
def test_a_client_goes_on_in_the_children_of_a_fork(
    server_address: str, busy_threads: int
) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GRPC_")}
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            textwrap.dedent(FORK),
            server_address,
            str(busy_threads),
        ],
        capture_output=True,
        text=True,
        timeout=90,
        env=environment,
        check=False,
    )
    assert done.stdout == "all is well\n", done.stderr


def test_an_async_client_of_the_parent_is_refused_in_the_child(
    server_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = gradwire.AsyncClient(server_address)
    monkeypatch.setattr(os, "getpid", lambda: -1)

    async def use() -> Any:
        return await client.server_info()

    with pytest.raises(gradwire.ClientStateError, match="before the process forked"):
        asyncio.run(use())
