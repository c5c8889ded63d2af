"""One client of many threads, of a process that forks, of one event loop."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest

import gradwire
from tests.scenarios import ways
from tests.scenarios.ways import Way
from tests.support import oracle
from tests.support.observing import wait_until
from tests.support.serving import ServerProcess, running_server

X, W, DY = oracle.operands(30, 20, 10)


@pytest.mark.big
def test_sixteen_threads_share_a_client(
    small_blocks: ServerProcess, client: gradwire.Client, way: Way
) -> None:
    shared = way.connect(small_blocks)
    start = threading.Barrier(16)

    def work(number: int) -> None:
        x, w, dy = oracle.operands(100 + number, 20, 30, seed=number)
        expected = client.gradients(x, w, dy)
        start.wait()
        for turn in range(4):
            if way.inside and turn % 2:
                placed = shared.empty(x.shape)
                placed[...] = x
                x = placed
            result = shared.gradients(x, w, dy)
            for one, other in zip(result, expected, strict=True):
                assert oracle.same_bits(one, other)
            assert shared.last_receipt is result.receipt
            way.arrived(result.receipt)
            blocks = list(shared.stream([(x, dy)], w))
            assert sum(len(block) for block in blocks) == 100 + number

    with shared, ThreadPoolExecutor(16) as pool:
        for done in [pool.submit(work, number) for number in range(16)]:
            done.result(60)


async def test_many_coroutines_share_a_client(
    small_blocks: ServerProcess, way: Way
) -> None:
    async with way.async_client(small_blocks) as client:
        jobs = [oracle.operands(50 + i, 20, 30, seed=i) for i in range(16)]
        results = await asyncio.gather(*(client.gradients(*job) for job in jobs))
    for job, result in zip(jobs, results, strict=True):
        way.arrived(result.receipt)
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
            " create one for each loop"
        )
        assert first.run(client.gradients(*operands)).receipt.m == 5
        first.run(client.close())


@pytest.fixture(scope="module")
def large_blocks() -> Iterator[ServerProcess]:
    with ways.serving_all() as server:
        yield server


CLOSED = (
    gradwire.ClientStateError,
    gradwire.JobCancelledError,
    gradwire.SessionLostError,
)
"""What a call raises whose client is closed meanwhile, with its sessions."""


@pytest.mark.parametrize("transport", ["grpc", "direct", "shm"])
def test_a_client_is_closed_beside_calls(
    large_blocks: ServerProcess, transport: str
) -> None:
    x, w, dy = oracle.operands(3000, 40, 30)

    def work(client: gradwire.Client, number: int) -> None:
        with client.session("1MiB") as session:
            kept = session.put(w)
            while True:
                client.gradients(X, W, DY)
                client.gradients(x, w, dy)
                client.server_info()
                session.get(kept) if number else session.put(w, replace=kept)

    with ThreadPoolExecutor(2) as pool:
        for turn in range(10):
            client = gradwire.Client(large_blocks.address, transport=transport)
            running = [pool.submit(work, client, number) for number in range(2)]
            time.sleep(0.02 + turn * 0.006)
            client.close()
            for each in running:
                with pytest.raises(CLOSED):
                    each.result(20)


@pytest.mark.parametrize("transport", ["grpc", "direct", "shm"])
async def test_an_async_client_is_closed_beside_calls(
    large_blocks: ServerProcess, transport: str
) -> None:
    x, w, dy = oracle.operands(3000, 40, 30)

    async def work(client: gradwire.AsyncClient, number: int) -> None:
        async with client.session("1MiB") as session:
            kept = await session.put(w)
            while True:
                await client.gradients(X, W, DY)
                await client.gradients(x, w, dy)
                await client.server_info()
                if number:
                    await session.get(kept)
                else:
                    await session.put(w, replace=kept)

    for turn in range(10):
        client = gradwire.AsyncClient(large_blocks.address, transport=transport)
        running = [asyncio.create_task(work(client, number)) for number in range(2)]
        await asyncio.sleep(0.02 + turn * 0.006)
        await client.close()
        for each in running:
            with pytest.raises(CLOSED):
                await asyncio.wait_for(each, 20)


FORK = """
    import json, os, sys, threading
    import numpy as np
    import gradwire
    address, options, busy_threads = sys.argv[1:]
    busy_threads = int(busy_threads)
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(300, 40)), rng.normal(size=(40, 30))
    small, large = rng.normal(size=(3000, 40)), rng.normal(size=(9000, 40))
    client = gradwire.connect(address, **json.loads(options))
    expected = client.forward(x, w)

    stop = threading.Event()
    running = threading.Barrier(busy_threads + 1)

    def keep_busy(number):
        client.forward(small, w)
        running.wait()
        while not stop.is_set():
            # One half in one message each way, the other streamed.
            client.forward(small if number % 2 else large, w)

    threads = [
        threading.Thread(target=keep_busy, args=(number,), daemon=True)
        for number in range(busy_threads)
    ]
    for thread in threads:
        thread.start()
    running.wait()

    def in_the_child():
        # It has no threads but this one, and a connection of its own.
        for _ in range(3):
            assert np.array_equal(client.forward(x, w), expected)
            blocks = list(client.stream([x], w, results="y"))
            assert sum(len(block) for block in blocks) == 300
        client.close()

    children = []
    # A stream of this thread's own is open while it forks.
    with client.stream([x] * 50, w, results="y") as stream:
        next(stream)
        for _ in range(5):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    in_the_child()
                    status = 0
                finally:
                    os._exit(status)
            children.append(child)
        rest = list(stream)
    assert stream.receipt.m == 50 * 300
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)
    for _ in range(3):
        assert np.array_equal(client.forward(x, w), expected)
    stop.set()
    for thread in threads:
        thread.join()
    client.close()
    print("all is well")
"""

FORK_BESIDE_A_CALL_THAT_WAITS = """
    import os, sys, threading
    import numpy as np
    import gradwire
    x = np.ones((3, 3))
    client = gradwire.connect(sys.argv[1])
    sent = threading.Event()

    def wait_in_the_queue():
        try:
            client.forward(x, x, on_progress=lambda _: sent.set(), timeout_s=1.5)
        except gradwire.DeadlineError:
            pass

    thread = threading.Thread(target=wait_in_the_queue)
    thread.start()
    sent.wait()
    child = os.fork()
    if child == 0:
        print(client.server_info().contract, flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    thread.join()
"""

FORK_BESIDE_A_CALL_INSIDE_GRPC = """
    import os, sys, threading
    import numpy as np
    import gradwire
    from gradwire._transport.grpc import fork_support as _fork
    x = np.ones((3, 3))
    client = gradwire.connect(sys.argv[1])
    inside, leave = threading.Event(), threading.Event()

    def stay_inside():
        with _fork.calling():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=stay_inside)
    thread.start()
    inside.wait()
    child = os.fork()
    if child == 0:
        try:
            client.forward(x, x)
        except gradwire.ClientStateError as error:
            print(error, flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    leave.set()
    thread.join()
    client.forward(x, x)
"""

FORK_BESIDE_A_BLOCKED_THREAD_OF_GRPC = """
    import os, sys, threading
    import gradwire, grpc
    client = gradwire.connect(sys.argv[1])
    inside, leave = threading.Event(), threading.Event()

    def block(_):
        inside.set()
        leave.wait()

    channel = grpc.insecure_channel(sys.argv[1])
    call = channel.unary_unary("/gradwire.v1.GradientService/GetServerInfo").future(b"")
    call.add_done_callback(block)
    inside.wait()
    child = os.fork()
    if child == 0:
        try:
            client.server_info(timeout_s=20)
        except gradwire.ClientStateError as error:
            print(error, flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    leave.set()
    client.server_info()
"""

FORK_AFTER_ASYNCIO = """
    import asyncio, os, sys
    import numpy as np
    import gradwire
    x = np.ones((3, 3))

    async def once():
        async with gradwire.AsyncClient(sys.argv[1]) as client:
            await client.forward(x, x)

    asyncio.run(once())
    child = os.fork()
    if child == 0:
        with gradwire.connect(sys.argv[1]) as client:
            client.forward(x, x)
        try:
            asyncio.run(once())
        except gradwire.ClientStateError as error:
            print(error, flush=True)
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    asyncio.run(once())
"""


def run_script(script: str, *arguments: str, **variables: str) -> str:
    """What a script prints that ends well, in an environment of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GRPC_")}
    environment |= variables
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        capture_output=True,
        text=True,
        timeout=90,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("busy_threads", "way"),
    [
        pytest.param(0, ways.STREAM, id="idle-tcp"),
        pytest.param(1, ways.DIRECT, id="one-direct", marks=pytest.mark.thorough),
        # Its threads and its server's keep every core busy for seconds.
        *(
            pytest.param(4, way, id=f"in the middle-{name}", marks=pytest.mark.big)
            for name, way in [
                ("tcp", ways.STREAM),
                ("unix", ways.UNIX),
                ("shm", ways.COPIED),
                ("direct", ways.DIRECT),
            ]
        ),
    ],
)
def test_a_client_goes_on_in_the_children_of_a_fork(
    large_blocks: ServerProcess, busy_threads: int, way: Way
) -> None:
    arguments = (json.dumps(dict(way.options)), str(busy_threads))
    printed = run_script(FORK, way.address(large_blocks), *arguments)
    assert printed == "all is well\n"


def test_a_fork_beside_a_call_that_waits_is_no_harm(occupied: ServerProcess) -> None:
    printed = run_script(FORK_BESIDE_A_CALL_THAT_WAITS, occupied.address)
    assert printed == "gradwire.v1\n"


def test_a_fork_beside_a_call_that_stays_inside_grpc_is_told_to_the_child(
    server_address: str,
) -> None:
    printed = run_script(FORK_BESIDE_A_CALL_INSIDE_GRPC, server_address)
    assert "ran in another thread or on an event loop" in printed


@pytest.mark.big  # gRPC waits 5 s for the thread
def test_a_fork_for_which_a_thread_of_grpc_does_not_stop_is_told_to_the_child(
    server_address: str,
) -> None:
    printed = run_script(FORK_BESIDE_A_BLOCKED_THREAD_OF_GRPC, server_address)
    assert "while a thread of gRPC did not stop for it" in printed


def connections_of(pid: int) -> int:
    """Established TCP connections of a process."""
    found = psutil.Process(pid).net_connections("tcp")
    return sum(each.status == psutil.CONN_ESTABLISHED for each in found)


def drop(held: list[Any]) -> None:
    held.clear()
    gc.collect()


def test_a_client_that_is_dropped_closes_its_connection_and_warns() -> None:
    with running_server() as server:
        held = [gradwire.connect(server.address)]
        held[0].forward(X, W)
        wait_until(lambda: connections_of(server.pid) == 1, "it is connected")
        with pytest.warns(ResourceWarning, match="dropped and not closed: use it as"):
            drop(held)
        wait_until(lambda: connections_of(server.pid) == 0, "the connection is closed")


def test_a_stream_keeps_its_client(server_address: str) -> None:
    held = [gradwire.connect(server_address).stream([(X, DY)] * 3, W)]
    gc.collect()
    assert sum(len(block.y) for block in held[0]) == 3 * len(X)
    with pytest.warns(ResourceWarning, match="dropped and not closed"):
        drop(held)


async def test_an_async_client_that_is_dropped_warns() -> None:
    with running_server() as server:
        held = [gradwire.AsyncClient(server.address)]
        await held[0].forward(X, W)
        with pytest.warns(ResourceWarning, match="dropped and not closed"):
            drop(held)
        await asyncio.sleep(0)
        wait_until(lambda: connections_of(server.pid) == 0, "the connection is closed")


GREEN = """
from gevent import monkey
monkey.patch_all()
import sys
import gradwire
try:
    gradwire.connect(sys.argv[1])
except gradwire.ClientStateError as error:
    print(error)
"""


def test_green_threads_are_refused_before_they_hang(server_address: str) -> None:
    pytest.importorskip("gevent")
    assert "gevent has replaced threads by green" in run_script(GREEN, server_address)


FORK_WITHOUT_SUPPORT = """
import os, sys
import numpy as np
import gradwire, grpc

if len(sys.argv) > 2:
    grpc.__version__ = sys.argv[2]
client = gradwire.connect(sys.argv[1])
client.forward(np.ones((2, 3)), np.ones((3, 1)))
child = os.fork()
if not child:
    for attempt in (client.server_info, lambda: gradwire.connect(sys.argv[1])):
        try:
            attempt()
        except gradwire.ClientStateError as error:
            print(error, flush=True)
    os._exit(0)
os.waitpid(child, 0)
client.forward(np.ones((2, 3)), np.ones((3, 1)))
"""


def test_a_child_that_grpc_does_not_support_is_told_so(server_address: str) -> None:
    printed = run_script(
        FORK_WITHOUT_SUPPORT, server_address, GRPC_ENABLE_FORK_SUPPORT="0"
    )
    assert printed.count("set GRPC_ENABLE_FORK_SUPPORT=1 before grpc is imported") == 2
    printed = run_script(FORK_WITHOUT_SUPPORT, server_address, "1.81.2")
    assert printed.count("grpcio 1.81.2, which does not survive forks") == 2


def test_a_fork_after_asyncio_is_told_to_the_child(server_address: str) -> None:
    printed = run_script(FORK_AFTER_ASYNCIO, server_address)
    assert "forked from one that used an AsyncClient" in printed


def test_an_async_client_of_the_parent_is_refused_in_the_child(
    server_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = gradwire.AsyncClient(server_address)
    monkeypatch.setattr(os, "getpid", lambda: -1)

    async def use() -> Any:
        return await client.server_info()

    with pytest.raises(gradwire.ClientStateError, match="before the process forked"):
        asyncio.run(use())
