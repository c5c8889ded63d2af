"""One job over several servers: the same bits, whoever computes which segment."""

from __future__ import annotations

import gc
import logging
import os
import signal
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradwire
from gradwire_protocol.dtypes import Dtype, rounded
from tests.scenarios.test_several_servers import (
    KINDS,
    SOON,
    Async,
    Sync,
    addresses,
    several,
    until,
)
from tests.support import in_process, oracle
from tests.support.proxy import Fault, Proxy
from tests.support.serving import BACKEND, ServerProcess, running_server
from tests.support.simulated_backend import SimulatedBackend

ROW_BLOCK_BYTES = 1 << 16
RESULTS = ("y", "dx", "dw", "db")
M, N, K = 5000, 32, 32
SEGMENT_ROWS = 512
"""Two row blocks of 256 rows: 64 KiB are less than 16 times the 8 KiB of dW's sum."""


@pytest.fixture(scope="module")
def three() -> Iterator[list[ServerProcess]]:
    """Servers that all tests share which leave them unharmed."""
    with several(3, row_block_bytes=ROW_BLOCK_BYTES) as servers:
        yield servers


@pytest.fixture(params=KINDS)
def joined(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Makes clients of each kind in turn."""
    with ExitStack() as stack:

        def make(servers: Any, **options: Any) -> Any:
            client = KINDS[request.param](servers, **options)
            stack.callback(client.close)
            return client

        yield make


def gradients(client: Any, *operands: Any, **options: Any) -> Any:
    options = {"results": RESULTS, "spread": True} | options
    return client.run(client.client.gradients(*operands, **options))


def same(one: Any, other: Any) -> bool:
    return all(
        oracle.same_bits(getattr(one, name), getattr(other, name))
        for name in RESULTS
        if getattr(other, name) is not None
    )


@pytest.fixture(scope="module")
def alone(three: list[ServerProcess]) -> Any:
    """The results of one server."""
    with gradwire.connect(three[0].address) as client:
        return client.gradients(*OPERANDS, spread=True, results=RESULTS)


OPERANDS = oracle.operands(M, N, K)

CASES = {
    "float32": ((3000, 32, 32, "float32"), {}),
    "ragged": ((2305, 48, 16, "float32"), {}),
    "float64": ((1300, 32, 32, "float64"), {}),
    "float16": ((5000, 64, 32, "float16"), {}),
    "bfloat16": ((5000, 32, 64, "bfloat16"), {"result_dtype": {"dw": "float32"}}),
    "summed in float32": ((3000, 32, 32, "float32"), {"dw_accumulator": "float32"}),
    "sent in bfloat16": ((5000, 32, 32, "float32"), {"wire_dtype": "bfloat16"}),
}


def in_segments(client: gradwire.Client, operands: Any, options: Any) -> dict[str, Any]:
    """DW and db by the definition: row by row block, segment by segment."""
    x, w, dy = operands
    sent = Dtype.named(options.get("wire_dtype") or oracle_dtype(x))
    accumulator = Dtype.named(
        options.get("dw_accumulator") or sent.default_accumulator.label
    )
    made = gradients_of(client, operands, options)
    block, segment = made.receipt.block_rows, made.receipt.fingerprint.segment_rows
    totals: dict[str, Any] = {}
    for first in range(0, len(x), segment):
        sums: dict[str, Any] = {}
        for at in range(first, min(first + segment, len(x)), block):
            rows = slice(at, min(at + block, first + segment))
            # A job of one row block: nothing is added in it.
            part = client.gradients(
                x[rows],
                w,
                dy[rows],
                results=("dw", "db"),
                wire_dtype=options.get("wire_dtype"),
                result_dtype=accumulator.label,
                dw_accumulator=accumulator.label,
            )
            for name, value in (("dw", part.dw), ("db", part.db)):
                sums[name] = sums[name] + value if name in sums else value
        for name, value in sums.items():
            totals[name] = totals[name] + value if name in totals else value
    dtypes = dict.fromkeys(totals, sent.label) | options.get("result_dtype", {})
    return {
        name: rounded(total, Dtype.named(dtypes[name])).astype(
            getattr(made, name).dtype
        )
        for name, total in totals.items()
    }


def gradients_of(client: gradwire.Client, operands: Any, options: Any) -> Any:
    return client.gradients(*operands, results=RESULTS, spread=True, **options)


def oracle_dtype(array: Any) -> str:
    return Dtype.of(array.dtype).label


@pytest.mark.parametrize("case", CASES)
def test_the_sums_of_segments_are_added_in_their_order(
    three: list[ServerProcess], case: str
) -> None:
    (m, n, k, dtype), options = CASES[case]
    operands = oracle.operands(m, n, k, dtype)
    with gradwire.connect(addresses(three)) as client:
        result = gradients_of(client, operands, options)
        expected = in_segments(client, operands, options)
        plain = client.gradients(*operands, results=RESULTS, **options)
    for name in ("dw", "db"):
        assert oracle.same_bits(getattr(result, name), expected[name]), name
    for name in ("y", "dx"):
        assert oracle.same_bits(getattr(result, name), getattr(plain, name)), name
    if not options:
        oracle.assert_right(result, *operands, dtype)
    assert len(result.receipt.segments) > 1


def test_the_bits_do_not_depend_on_the_servers(
    three: list[ServerProcess], joined: Any, alone: Any
) -> None:
    for some in (three[:1], three[:2], three[::-1], three):
        assert same(gradients(joined(addresses(some)), *OPERANDS), alone)


def test_segments_of_one_row_block_have_the_bits_of_a_plain_job(
    three: list[ServerProcess],
) -> None:
    operands = oracle.operands(5000, 16, 16)
    with gradwire.connect(addresses(three)) as client:
        spread = gradients_of(client, operands, {})
        plain = client.gradients(*operands, results=RESULTS)
    assert spread.receipt.block_rows == spread.receipt.fingerprint.segment_rows
    assert len(spread.receipt.segments) == 10
    assert same(spread, plain)


def test_the_receipt_says_who_has_computed_what(
    three: list[ServerProcess], joined: Any
) -> None:
    receipt = gradients(joined(addresses(three)), *OPERANDS).receipt
    segments = receipt.segments
    assert [each.first_row for each in segments] == list(range(0, M, SEGMENT_ROWS))
    assert sum(each.rows for each in segments) == receipt.m == M
    assert {each.server_address for each in segments} == set(addresses(three))
    assert receipt.fingerprint.segment_rows == SEGMENT_ROWS
    assert receipt.result_dtypes == dict.fromkeys(RESULTS, "float32")


def test_progress_says_who_computes_what(
    three: list[ServerProcess], joined: Any
) -> None:
    seen: list[gradwire.Progress] = []
    client = joined(addresses(three))
    receipt = gradients(client, *OPERANDS, on_progress=seen.append).receipt
    last = seen[-1]
    assert last.rows_sent == last.m == M
    assert last.bytes_received == last.bytes_to_receive
    assert last.bytes_sent == last.bytes_to_send
    by_server: dict[str, int] = {}
    for each in receipt.segments:
        rows = by_server.get(each.server_address, 0) + each.rows
        by_server[each.server_address] = rows
    assert last.rows_by_server == by_server


def test_forward_and_backward(
    three: list[ServerProcess], joined: Any, alone: Any
) -> None:
    client = joined(addresses(three))
    x, w, dy = OPERANDS
    y = client.run(client.client.forward(x, w, spread=True))
    assert oracle.same_bits(y, alone.y)
    dx, dw = client.run(client.client.backward(x, w, dy, spread=True))
    assert oracle.same_bits(dx, alone.dx)
    assert oracle.same_bits(dw, alone.dw)


def test_results_go_to_arrays_of_any_layout(
    three: list[ServerProcess], joined: Any, alone: Any
) -> None:
    x, w, dy = (np.asfortranarray(each) for each in OPERANDS)
    out = {
        "y": np.empty((K, M), np.float32).T,
        "dx": np.empty((M, 2 * N), np.float32)[:, ::2],
        "dw": np.empty((K, N), np.float32).T,
    }
    result = gradients(joined(addresses(three)), x, w, dy, out=out)
    assert result.y is out["y"]
    assert same(result, alone)


def test_leading_dimensions_count_as_rows(
    three: list[ServerProcess], joined: Any, alone: Any
) -> None:
    x, w, dy = OPERANDS
    x = x.reshape(10, 500, N).transpose(1, 0, 2)  # no view has its rows
    dy = dy.reshape(10, 500, K).transpose(1, 0, 2)
    client = joined(addresses(three))
    result = gradients(client, x, w, dy)
    flat = gradients(client, x.reshape(M, N), w, dy.reshape(M, K))
    assert result.y.shape == (500, 10, K)
    assert oracle.same_bits(result.dx.reshape(M, N), flat.dx)
    assert oracle.same_bits(result.dw, flat.dw)


@pytest.mark.parametrize(("n", "k"), [(0, 8), (8, 0)])
def test_products_without_elements_wait_for_nothing(
    three: list[ServerProcess], n: int, k: int
) -> None:
    operands = oracle.operands(3 * 2048, n, k)
    with gradwire.connect(three[0].address) as client:
        begun = time.monotonic()
        result = gradients_of(client, operands, {})
        assert time.monotonic() - begun < 4
    oracle.assert_right(result, *operands, "float32")
    assert len(result.receipt.segments) > 1


@pytest.mark.parametrize("m", [0, 1])
def test_jobs_of_one_segment(three: list[ServerProcess], joined: Any, m: int) -> None:
    operands = oracle.operands(m, 8, 4)
    result = gradients(joined(addresses(three)), *operands)
    oracle.assert_right(result, *operands, "float32")
    assert len(result.receipt.segments) == 1


def test_results_are_verified(three: list[ServerProcess], joined: Any) -> None:
    client = joined(addresses(three))
    receipt = gradients(client, *OPERANDS, verify=True, checksum=True).receipt
    assert receipt.verifying_s > 0


def test_batches_are_refused(three: list[ServerProcess], joined: Any) -> None:
    w = np.ones((2, N, K), np.float32)
    client = joined(addresses(three))
    with pytest.raises(gradwire.InputError, match="spread is on, but w has batch"):
        gradients(client, OPERANDS[0], w, OPERANDS[2])
    with pytest.raises(TypeError, match="spread"):
        client.client.session("1MiB", spread=True)


def test_an_exception_of_the_callback_reaches_the_caller(
    three: list[ServerProcess], joined: Any
) -> None:
    class MineError(Exception):
        pass

    def fail(progress: gradwire.Progress) -> None:
        raise MineError

    client = joined(addresses(three))
    with pytest.raises(MineError):
        gradients(client, *OPERANDS, on_progress=fail)
    assert threading.active_count() < 100


def test_a_killed_server_changes_nothing(joined: Any, alone: Any) -> None:
    with several(3, row_block_bytes=ROW_BLOCK_BYTES) as servers:
        by_address = {each.address: each for each in servers}
        killed: list[str] = []

        def kill(progress: gradwire.Progress) -> None:
            for address in progress.rows_by_server or {}:
                if len(killed) < 2 and address not in killed:
                    killed.append(address)
                    by_address[address].kill()

        client = joined(addresses(servers), retries=SOON)
        result = gradients(client, *OPERANDS, on_progress=kill)
        assert same(result, alone)
        assert len(killed) == 2
        (left,) = set(by_address) - set(killed)
        assert left in {each.server_address for each in result.receipt.segments}


def test_without_a_server_the_job_fails(joined: Any) -> None:
    few = gradwire.RetryPolicy(attempts=2, initial_backoff_s=0.01)
    with several(2, row_block_bytes=ROW_BLOCK_BYTES) as servers:
        client = joined(addresses(servers), retries=few)

        def kill(progress: gradwire.Progress) -> None:
            if progress.rows_by_server:
                for each in servers:
                    each.kill()

        with pytest.raises((gradwire.ConnectError, gradwire.UnavailableError)):
            gradients(client, *OPERANDS, on_progress=kill)


def test_stopped_servers_hold_up_nothing(joined: Any, alone: Any) -> None:
    """Their segments are computed once more, and they write nothing after the return.

    With two of them, the second job of a segment may be on a stopped server as well.
    """
    with several(3, row_block_bytes=ROW_BLOCK_BYTES) as servers:
        client = joined(addresses(servers))
        gradients(client, *OPERANDS)
        for stopped in (servers[1:2], servers[:2]):
            for each in stopped:
                os.kill(each.pid, signal.SIGSTOP)
            try:
                out = {
                    name: np.empty_like(getattr(alone, name))
                    for name in ("y", "dx", "dw")
                }
                begun = time.monotonic()
                result = gradients(client, *OPERANDS, out=out)
                seconds = time.monotonic() - begun
                assert same(result, alone)
                # They are asked whether they are there before their next jobs.
                late = addresses(stopped)
                members = client.client._engine._servers.members
                assert all(m.needs_probe for m in members if m.address in late)
                out["y"][:] = out["dx"][:] = out["dw"][:] = 0
            finally:
                for each in stopped:
                    os.kill(each.pid, signal.SIGCONT)
            assert seconds < 10
            until(lambda: client.run(client.client.server_info()) is not None)
            time.sleep(0.2)
            assert not any(out[name].any() for name in out)


def test_servers_join_and_leave(three: list[ServerProcess], joined: Any) -> None:
    operands = oracle.operands(200 * SEGMENT_ROWS, N, K)
    first, second, third = addresses(three)
    client = joined([first])
    alone = gradients(client, *operands)
    set_to: list[list[str]] = []

    def change(progress: gradwire.Progress) -> None:
        rows = sum((progress.rows_by_server or {}).values())
        wanted = [first] if not rows else [second, third]
        if not set_to or set_to[-1] != wanted:
            set_to.append(wanted)
            if isinstance(client.client, gradwire.Client):
                client.client.set_servers(wanted)
            else:
                changes.append(client.client.set_servers(wanted))

    changes: list[Any] = []
    result = gradients(client, *operands, on_progress=change)
    for each in changes:
        client.run(each)
    assert same(result, alone)
    used = Counter(each.server_address for each in result.receipt.segments)
    if isinstance(client.client, gradwire.Client):
        # The first completes what it has begun.
        assert set(used) == {first, second, third}
        assert used[first] < 20
    assert same(gradients(client, *operands), alone)


def test_only_clients_of_a_list_change_their_servers(
    three: list[ServerProcess], joined: Any
) -> None:
    client = joined(three[0].address)
    with pytest.raises(gradwire.InputError, match="create it with a list"):
        client.run(client.client.set_servers([three[1].address]))
    client = joined([three[0].address])
    with pytest.raises(gradwire.InputError, match="has no port"):
        client.run(client.client.set_servers(["nowhere"]))
    client.run(client.client.set_servers([three[1].address]))
    assert gradients(client, *OPERANDS).receipt.server_address == three[1].address


@pytest.mark.skipif(BACKEND != "numpy", reason="is about NumPy's threads")
def test_a_server_with_other_numerics_gets_no_segment(
    three: list[ServerProcess],
    joined: Any,
    alone: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with running_server(row_block_bytes=ROW_BLOCK_BYTES // 2) as other:
        client = joined([other.address, *addresses(three)])
        with caplog.at_level(logging.WARNING, "gradwire"):
            result = gradients(client, *OPERANDS)
    assert same(result, alone)
    used = {each.server_address for each in result.receipt.segments}
    assert used == set(addresses(three))
    (line,) = [each.getMessage() for each in caplog.records]
    assert other.address in line
    assert "row blocks of 0.03125 MiB: expected" in line


@pytest.mark.skipif(BACKEND != "numpy", reason="is about NumPy's threads")
def test_a_server_that_comes_back_with_other_numerics_gets_no_segment(
    three: list[ServerProcess],
    joined: Any,
    alone: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with running_server(row_block_bytes=ROW_BLOCK_BYTES) as before:
        client = joined([before.address, *addresses(three)[:2]])
        gradients(client, *OPERANDS)
        address = before.address
    with (
        running_server(row_block_bytes=ROW_BLOCK_BYTES // 2, listen=[address]),
        caplog.at_level(logging.WARNING, "gradwire"),
    ):
        result = gradients(client, *OPERANDS)
    assert same(result, alone)
    used = {each.server_address for each in result.receipt.segments}
    assert address not in used


def test_all_servers_come_back_with_other_numerics() -> None:
    """As after an update: the client has the answers of servers that are gone."""
    with ExitStack() as stack:
        with several(2, row_block_bytes=ROW_BLOCK_BYTES) as before:
            clients = [
                Sync(before[0].address),
                Async(addresses(before)),
            ]
            for client in clients:
                stack.callback(client.close)
                gradients(client, *OPERANDS)
        for address in addresses(before):
            smaller = running_server(
                row_block_bytes=ROW_BLOCK_BYTES // 2, listen=[address]
            )
            stack.enter_context(smaller)
        for client in clients:
            result = gradients(client, *OPERANDS)
            oracle.assert_right(result, *OPERANDS, "float32")
            assert result.receipt.block_rows == 128


@pytest.mark.big
def test_servers_that_stop_delay_a_job_by_its_timeout_at_most(alone: Any) -> None:
    with several(2, row_block_bytes=ROW_BLOCK_BYTES) as servers, ExitStack() as stack:
        stack.callback(lambda: [os.kill(each.pid, signal.SIGCONT) for each in servers])
        os.kill(servers[0].pid, signal.SIGSTOP)
        clients: list[Any] = []
        for kind in (Sync, Async):
            client = kind(addresses(servers))
            stack.callback(client.close)
            clients.append(client)
            begun = time.monotonic()
            for _ in range(3):  # the first server has never answered
                assert same(gradients(client, *OPERANDS), alone)
            assert time.monotonic() < begun + 5, "each waits for that server"
        os.kill(servers[1].pid, signal.SIGSTOP)
        for client in clients:
            begun = time.monotonic()
            with pytest.raises((gradwire.DeadlineError, gradwire.ConnectError)):
                gradients(client, *OPERANDS, timeout_s=0.3)
            assert time.monotonic() < begun + 3
        for each in servers:
            os.kill(each.pid, signal.SIGCONT)
        for client in clients:
            assert same(gradients(client, *OPERANDS), alone)


def test_threads_may_change_the_servers_of_jobs_that_run(
    three: list[ServerProcess], alone: Any
) -> None:
    everywhere = addresses(three)
    done = threading.Event()
    with gradwire.connect(everywhere, timeout_s=60) as client:

        def change(first: int) -> None:
            number = first
            while not done.is_set():
                number += 1
                some = everywhere[number % 3 :][: 1 + number % 2]
                client.set_servers(some)
                done.wait(0.003)

        def compute() -> bool:
            x, w, dy = OPERANDS
            right = True
            for _ in range(4):
                arrays = client.gradients(*OPERANDS, spread=True, results=RESULTS)
                stream = client.stream([(x, dy)], w, spread=True)
                right &= len(list(stream)) == 20 and same(arrays, alone)
                right &= oracle.same_bits(stream.dw, alone.dw)
            return right

        with ThreadPoolExecutor(4) as pool:
            changing = [pool.submit(change, first) for first in range(2)]
            computing = [pool.submit(compute) for _ in range(2)]
            try:
                assert all(each.result() for each in computing)
            finally:
                done.set()
            for each in changing:
                each.result()
        open_files = len(list(Path("/proc/self/fd").iterdir()))
        for number in range(100):
            client.set_servers(everywhere[: 1 + number % 3])
        client.set_servers(everywhere)
        assert same(gradients_of(client, OPERANDS, {}), alone)
        assert len(list(Path("/proc/self/fd").iterdir())) < open_files + 50
    with pytest.raises(gradwire.ClientStateError, match="is closed"):
        gradients_of(client, OPERANDS, {})


def test_all_devices_of_a_server_compute() -> None:
    memory = 1 << 26
    backend = SimulatedBackend(memory, memory, memory)
    operands = oracle.operands(1 << 15, 64, 64)

    def computed(backend: SimulatedBackend) -> Any:
        with (
            in_process.serving(backend) as server,
            gradwire.connect(server.addresses[0]) as client,
        ):
            return gradients_of(client, operands, {})

    spread, alone = computed(backend), computed(SimulatedBackend(memory))
    assert {each.device.index for each in spread.receipt.segments} == {0, 1, 2}
    assert same(spread, alone)


@pytest.mark.parametrize("transport", ["grpc", "direct"])
def test_a_job_carries_several_segments(
    three: list[ServerProcess], joined: Any, transport: str
) -> None:
    operands = oracle.operands(40 * SEGMENT_ROWS - 100, N, K)
    one = gradients(joined([three[0].address], transport=transport), *operands)
    assert len(one.receipt.segments) == 40
    assert one.receipt.jobs < 20
    assert one.receipt.transport == {"grpc": "tcp"}.get(transport, transport)
    each = gradients(joined(addresses(three), transport=transport), *operands)
    assert each.receipt.jobs > one.receipt.jobs
    assert same(one, each)
    client = joined([three[0].address], transport=transport)
    sums = gradients(client, *operands, results=("dw", "db"), checksum=True)
    assert sums.receipt.jobs < 20
    assert oracle.same_bits(sums.dw, one.dw)
    assert oracle.same_bits(sums.db, one.db)


@pytest.mark.parametrize("transport", ["grpc", "direct"])
def test_jobs_end_and_others_go_on(
    three: list[ServerProcess],
    joined: Any,
    alone: Any,
    transport: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gradwire._client.spread_job.JOB_S", 0.0)
    result = gradients(joined(addresses(three), transport=transport), *OPERANDS)
    assert same(result, alone)
    assert result.receipt.jobs == len(result.receipt.segments) == 10
    assert result.receipt.attempts == 1


@pytest.mark.parametrize("how", ["job", "stream"])
def test_the_operands_of_a_failed_job_are_released_with_it(
    three: list[ServerProcess], how: str
) -> None:
    x, w, dy = OPERANDS[0].copy(), *OPERANDS[1:]
    options: Any = {"spread": True, "timeout_s": 1e-6}
    gc.disable()  # it would release them, too, but only later
    try:
        held = weakref.ref(x)
        with gradwire.connect(addresses(three[:2])) as client:
            with suppress(gradwire.DeadlineError):
                if how == "job":
                    client.gradients(x, w, dy, **options)
                else:
                    list(client.stream([(x, dy)], w, **options))
                pytest.fail("it was done in a microsecond")
            del x
            until(lambda: held() is None, 5)
    finally:
        gc.enable()


@pytest.mark.parametrize("transport", ["grpc", "direct"])
def test_the_memory_of_a_job_is_free_with_its_results(
    three: list[ServerProcess], joined: Any, transport: str
) -> None:
    client = joined(addresses(three[:2]), transport=transport)
    gradients(client, *OPERANDS)
    x = OPERANDS[0].copy()
    gc.disable()  # it would release them, too, but only later
    try:
        result = gradients(client, x, *OPERANDS[1:])
        arrays = [weakref.ref(each) for each in (x, result.y, result.dw)]
        del x, result
        until(lambda: not any(each() is not None for each in arrays), 5)
    finally:
        gc.enable()


def test_complete_segments_are_not_sent_again(
    three: list[ServerProcess], joined: Any
) -> None:
    m = 40 * SEGMENT_ROWS
    operands = oracle.operands(m, N, K)
    alone = gradients(joined([three[0].address]), *operands)
    with Proxy(three[0].address) as proxy:
        client = joined([proxy.address], transport="grpc", retries=SOON)
        gradients(client, *operands)
        proxy.arm(Fault(of="responses", cut_after_bytes=m * (N + K) * 4 * 3 // 4))
        result = gradients(client, *operands)
        assert proxy.faults == 1
    assert same(result, alone)
    receipt = result.receipt
    assert len(receipt.segments) == 40
    assert receipt.m == m
    assert receipt.attempts > 1
    # All rows once, and W in each of both attempts.
    assert receipt.bytes_received == m * (N + K) * 4 + 2 * N * K * 4


@pytest.mark.parametrize("transport", ["grpc", "direct"])
def test_a_server_is_killed_within_a_run(joined: Any, transport: str) -> None:
    operands = oracle.operands(40 * SEGMENT_ROWS - 3, N, K)
    with several(2, row_block_bytes=ROW_BLOCK_BYTES) as servers:
        client = joined(addresses(servers), transport=transport, retries=SOON)
        alone = gradients(client, *operands)
        killed: list[bool] = []

        def kill(progress: gradwire.Progress) -> None:
            if not killed and progress.rows_sent > 10 * SEGMENT_ROWS:
                killed.append(True)
                servers[1].kill()

        result = gradients(client, *operands, on_progress=kill)
        assert killed
        assert same(result, alone)
        assert len(result.receipt.segments) == 40
