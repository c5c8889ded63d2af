"""Jobs through shared memory: the same bits, in place, and safe when it breaks."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import gradwire
from gradwire._api.options import parse_options
from gradwire._client.job_factory import Tuning
from gradwire._transport.shm.segments import Segment
from gradwire_protocol.matrices import OPERANDS, RESULTS
from tests.support import oracle
from tests.support.serving import ServerProcess, running_server
from tests.support.shared_memory import descriptors

M, N, K = 211, 30, 20
NAMES = ("y", "dx", "dw")


@pytest.fixture(scope="module")
def sharing() -> Iterator[ServerProcess]:
    """A server whose regions are those of this module's clients."""
    with running_server(allow_shared_memory=True, row_block_bytes=4096) as server:
        yield server


@pytest.fixture(scope="module")
def shm(sharing: ServerProcess) -> Iterator[gradwire.Client]:
    with gradwire.connect(sharing.address, transport="shm", timeout_s=60) as client:
        yield client


@pytest.fixture(scope="module")
def tcp(sharing: ServerProcess) -> Iterator[gradwire.Client]:
    with gradwire.connect(sharing.address, transport="grpc", timeout_s=60) as client:
        yield client


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def assert_same(actual: Any, expected: Any) -> None:
    for name, one, other in zip(NAMES, actual, expected, strict=True):
        assert oracle.same_bits(one, other), name


def inside(client: gradwire.Client, array: Any) -> Any:
    """The same elements in an array that the client hands out."""
    copy = client.empty(array.shape, array.dtype)
    copy[...] = array
    return copy


def test_async_clients_share_memory_too(sharing: Any, tcp: Any) -> None:
    operands = oracle.operands(M, N, K, "float32")
    expected = tcp.gradients(*operands)

    async def run() -> None:
        async with gradwire.AsyncClient(sharing.address, transport="shm") as client:
            arrays = [await client.empty(a.shape, a.dtype) for a in operands]
            for array, operand in zip(arrays, operands, strict=True):
                array[...] = operand
            out = [await client.empty(a.shape) for a in expected]
            results = await asyncio.gather(
                client.gradients(*arrays, out=out),
                client.gradients(*operands),
                client.gradients(arrays[0], *operands[1:]),
            )
        for result in results:
            assert_same(result, expected)
            assert result.receipt.transport == "shm"
        assert all(one is other for one, other in zip(results[0], out, strict=True))

    asyncio.run(run())


def test_arrays_of_the_client_are_used_where_they_are(shm: Any, tcp: Any) -> None:
    operands = oracle.operands(M, 32, 48, "float32")
    expected = tcp.gradients(*operands)
    arrays = [inside(shm, operand) for operand in operands]
    out = tuple(shm.empty(result.shape) for result in expected)
    given = dict(zip(OPERANDS, arrays, strict=True))
    job = shm._engine.jobs.array_job(given, out, RESULTS, parse_options(results=NAMES))
    place = shm._engine.shm.place
    assert place(job.plan, job.operands, job.outputs).sizes == []
    actual = shm.gradients(*arrays, out=out)
    assert all(one is other for one, other in zip(actual, out, strict=True))
    assert_same(actual, expected)


def test_results_are_views_of_shared_memory(shm: Any) -> None:
    y, _, _ = shm.gradients(*oracle.operands(M, N, K, "float32"))
    assert shm._engine.shm.pool.find(y) is not None
    again = shm.forward(y, np.ones((K, 4), "f4"))
    assert oracle.same_bits(again, shm.forward(y.copy(), np.ones((K, 4), "f4")))


def test_slices_of_the_clients_arrays_are_used_in_place(shm: Any, tcp: Any) -> None:
    x, w, dy = oracle.operands(M, 32, 48, "float32")
    big = inside(shm, x)
    part, dy_part = big[16:96], dy[16:96]
    assert shm._engine.shm.pool.find(part) is not None
    assert_same(shm.gradients(part, w, dy_part), tcp.gradients(x[16:96], w, dy_part))
    out = shm.empty((M, 48))
    out[...] = 7
    shm.forward(part, w, out=out[16:96])
    assert oracle.same_bits(out[16:96], tcp.forward(x[16:96], w))
    assert (out[:16] == 7).all()
    assert (out[96:] == 7).all()


def test_whatever_cannot_be_used_in_place_is_copied(shm: Any, tcp: Any) -> None:
    x, w, dy = oracle.operands(M, N, K, "float32")
    expected = tcp.gradients(x, w, dy)
    odd = inside(shm, np.concatenate([x[:1], x]))[1:]  # not at 64 bytes
    assert shm._engine.shm.pool.find(odd) is None
    turned = inside(shm, w.T).T
    swapped = dy.astype(dy.dtype.newbyteorder())
    dw = np.empty((2 * N, K), "f4")[::2]
    y = inside(shm, np.zeros((K, M), "f4")).T
    actual = shm.gradients(odd, turned, swapped, out={"dw": dw, "y": y})
    assert actual.y is y
    assert actual.dw is dw
    assert_same(actual, expected)


def test_overlapping_outputs_are_refused_as_ever(shm: Any) -> None:
    x, w, dy = oracle.operands(20, 16, 16, "float32")
    x = inside(shm, x)
    with pytest.raises(gradwire.InputError, match="shares memory with x"):
        shm.gradients(x, w, dy, out={"dx": x})


def test_the_memory_of_dead_arrays_serves_the_next_job(sharing: Any) -> None:
    with gradwire.connect(sharing.address, transport="shm") as client:
        operands = oracle.operands(40, 512, 512, "float32")
        for _ in range(12):  # 29 MB of results and operands, in a region of 16 MiB
            client.gradients(*operands)
            gc.collect()
        assert len(client._engine.shm.pool._regions) == 1


def test_arrays_outlive_their_client(sharing: Any, tcp: Any) -> None:
    operands = oracle.operands(M, N, K, "float32")
    with gradwire.connect(sharing.address, transport="shm") as client:
        results = client.gradients(*operands)
        kept = client.empty(1000)
        kept[:] = 3
    assert_same(results, tcp.gradients(*operands))
    assert (kept == 3).all()
    with pytest.raises(gradwire.ClientStateError):
        client.empty(3)


def test_a_closed_client_gives_all_memory_back(sharing: Any) -> None:
    before = descriptors(sharing.pid)
    client = gradwire.connect(sharing.address, transport="shm")
    arrays = [client.empty(10_000_000) for _ in range(3)]
    assert descriptors(sharing.pid) > before
    client.close()
    wait_until(lambda: descriptors(sharing.pid) <= before)
    del arrays


def test_a_client_that_is_dropped_gives_all_memory_back(sharing: Any) -> None:
    before = descriptors(sharing.pid)
    held = [gradwire.connect(sharing.address, transport="shm")]
    held[0].forward(np.ones((50, 40), "f4"), np.ones((40, 30), "f4"))
    with pytest.warns(ResourceWarning, match="dropped and not closed"):
        held.clear()  # whatever is in circles is collected after it
    gc.collect()
    wait_until(lambda: descriptors(sharing.pid) <= before)


def test_auto_shares_where_it_pays_and_is_allowed(sharing: Any, server: Any) -> None:
    small = [np.ones((5, 4), "f4"), np.ones((4, 3), "f4"), np.ones((5, 3), "f4")]
    large = oracle.operands(60, 900, 800, "float32")
    with gradwire.connect(sharing.address) as client:
        assert client.gradients(*large).receipt.transport == "shm"
        assert client.gradients(*small).receipt.transport == "tcp"
        placed = [inside(client, array) for array in small]
        assert client.gradients(*placed).receipt.transport == "shm"
        checked = client.gradients(*large, checksum=True)
        assert checked.receipt.transport == "tcp"
    with gradwire.connect(server.address) as client:
        array = client.empty((3, 4), "float64")
        assert (array.shape, array.dtype) == ((3, 4), np.float64)
        assert client.gradients(*large).receipt.transport == "tcp"


def test_streams_of_rows_go_in_messages(shm: Any, tcp: Any) -> None:
    x, w, dy = oracle.operands(M, N, K, "float32")
    with shm.stream([(inside(shm, x), inside(shm, dy))], w) as stream:
        list(stream)
    assert stream.receipt.transport == "tcp"
    assert oracle.same_bits(stream.dw, tcp.gradients(x, w, dy).dw)


def test_shm_says_clearly_that_the_server_does_not_allow_it(server: Any) -> None:
    with pytest.raises(gradwire.ConnectError, match="allow-shared-memory"):
        gradwire.connect(server.address, transport="shm")

    async def run() -> None:
        async with gradwire.AsyncClient(server.address, transport="shm"):
            pass

    with pytest.raises(gradwire.ConnectError, match="allow-shared-memory"):
        asyncio.run(run())


@pytest.mark.parametrize("transport", ["tcp", None, np.ones(2)], ids=str)
def test_a_transport_is_one_of_four(transport: Any) -> None:
    expected = "expected one of auto, grpc, direct, shm"
    with pytest.raises(gradwire.InputError, match=expected):
        gradwire.Client("localhost:1", transport=transport)


def test_a_server_elsewhere_is_noticed(sharing: Any, monkeypatch: Any) -> None:
    # As if the same path led to another host's or process namespace's file.
    monkeypatch.setattr(os, "pread", lambda *_: b"another file")
    with pytest.raises(gradwire.ConnectError, match="cannot be opened here"):
        gradwire.connect(sharing.address, transport="shm")
    operands = oracle.operands(9000, 40, 30, "float32")
    with gradwire.connect(sharing.address, transport="auto") as client:
        for _ in range(2):
            assert client.gradients(*operands).receipt.transport == "tcp"
        assert client.empty(3).shape == (3,)


@pytest.mark.parametrize("client", ["sync_call", "async_call"])
def test_a_client_that_cannot_prove_that_it_is_local_sends_messages(
    sharing: Any, tcp: Any, monkeypatch: Any, client: str
) -> None:
    """As one that a proxy on the server's host brings from another."""
    monkeypatch.setattr(
        f"gradwire._transport.grpc.{client}.proof_of", lambda challenge: bytes(32)
    )
    x, w, dy = oracle.operands(4096, 60, 50)
    expected = tcp.gradients(x, w, dy)

    async def compute(transport: str) -> Any:
        async with gradwire.AsyncClient(sharing.address, transport=transport) as one:
            return await one.gradients(x, w, dy)

    def run(transport: str) -> Any:
        if client == "async_call":
            return asyncio.run(compute(transport))
        with gradwire.connect(sharing.address, transport=transport) as one:
            return one.gradients(x, w, dy)

    result = run("auto")
    assert result.receipt.transport == "tcp"
    assert_same(result, expected)
    with pytest.raises(gradwire.NotAllowedError, match="behind a proxy"):
        run("shm")


@pytest.mark.parametrize("kind", ["auto", "shm"])
def test_a_job_that_never_finds_its_region_travels_in_messages(
    sharing: Any, tcp: Any, monkeypatch: Any, kind: str
) -> None:
    """As behind a proxy that sends each call to another server."""
    made = Segment.__init__

    def of_another_server(self: Any, *arguments: Any) -> None:
        made(self, *arguments)
        self.token = "token-of-another-server"

    monkeypatch.setattr(Segment, "__init__", of_another_server)
    x, w, dy = oracle.operands(4096, 60, 50)
    expected = tcp.gradients(x, w, dy)
    with gradwire.connect(sharing.address, transport=kind) as client:
        if kind == "shm":
            with pytest.raises(gradwire.RequestError, match="REGION_UNKNOWN"):
                client.gradients(x, w, dy)
            return
        inside = client.empty(x.shape)
        inside[...] = x
        for operand in (inside, x):
            result = client.gradients(operand, w, dy)
            assert result.receipt.transport == "tcp"
            assert_same(result, expected)


def test_where_memory_runs_out_auto_goes_on_without_sharing() -> None:
    operands = oracle.operands(300_000, 16, 16, "float32")
    with running_server(allow_shared_memory=True, memory_limit=64 << 20) as server:
        with gradwire.connect(server.address) as client:
            assert client.gradients(*operands).receipt.transport == "direct"
            assert client.empty(100_000_000 // 4).nbytes == 100_000_000
            small = oracle.operands(20_000, 16, 16, "float32")
            assert client.gradients(*small).receipt.transport == "shm"
        with gradwire.connect(server.address, transport="shm") as client:
            with pytest.raises(gradwire.JobTooLargeError):
                client.empty(100_000_000)
            with pytest.raises(gradwire.ExhaustedError):
                client.gradients(*operands)


def test_a_job_whose_region_was_lost_is_tried_again(shm: Any, tcp: Any) -> None:
    operands = oracle.operands(M, N, K, "float32")
    arrays = [inside(shm, operand) for operand in operands]
    place = shm._engine.shm.place

    def lose(*job: Any) -> Any:
        shared = place(*job)
        for region in list(shm._engine.shm.pool._regions):
            region._end()
        shm._engine.shm.place = place
        time.sleep(0.2)  # the server has closed them; only this client may not know
        for region in shm._engine.shm.pool._regions:
            region.alive = True
        return shared

    shm._engine.shm.place = lose
    actual = shm.gradients(*arrays)
    assert_same(actual, tcp.gradients(*operands))
    assert actual.receipt.transport == "shm"


@pytest.mark.thorough
def test_after_a_deadline_results_memory_is_not_used_again(sharing: Any) -> None:
    with gradwire.connect(sharing.address, transport="shm") as client:
        x = client.empty((20_000, 64))
        x[...] = 1
        w = inside(client, np.ones((64, 64), "f4"))
        out = client.empty((20_000, 64))
        with pytest.raises(gradwire.DeadlineError):
            client.forward(x, w, out=out, timeout_s=0.03)
        assert client._engine.shm.pool.find(out) is None
        fresh = client.empty((20_000, 64))
        assert not np.may_share_memory(fresh, out)
        y = client.forward(x, w, out=out)
        assert y is out
        assert (y == 64).all()


def test_what_the_server_refuses_leaves_regions_in_use(shm: Any) -> None:
    x = inside(shm, np.ones((50, 16), "f4"))
    with pytest.raises(gradwire.RequestError, match="k is"):
        shm.forward(np.empty((0, 0), "f4"), np.empty((0, 2**31), "f4"))
    assert shm._engine.shm.pool.find(x) is not None


FORK = """
    import os, sys
    import numpy as np
    import gradwire

    x, w = np.ones((300, 40), "f4"), np.ones((40, 30), "f4")
    with gradwire.connect(sys.argv[1], transport="shm", timeout_s=30) as client:
        shared = client.empty(x.shape)
        shared[...] = x
        tokens = {region.token for region in client._engine.shm.pool._regions}
        pid = os.fork()
        if pid == 0:
            assert (client.forward(shared, w) == 40).all()
            own = {region.token for region in client._engine.shm.pool._regions}
            assert own
            assert not own & tokens
            client.close()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert (client.forward(shared, w) == 40).all()
        assert {r.token for r in client._engine.shm.pool._regions} == tokens
    print("all is well")
"""


def test_a_forked_child_opens_regions_of_its_own(sharing: Any) -> None:
    # In a process of its own: what else uses gRPC in this one is not meant.
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FORK), sharing.address],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "all is well\n", done.stderr


def test_small_jobs_may_be_forced_into_messages(sharing: Any) -> None:
    with gradwire.connect(sharing.address, transport="shm") as client:
        client._engine.jobs.tuning = Tuning(unary=True)
        result = client.gradients(*oracle.operands(M, N, K, "float32"))
        assert result.receipt.transport == "tcp"
