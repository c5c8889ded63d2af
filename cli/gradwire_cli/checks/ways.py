"""Checks that a job's results do not depend on how it is sent."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import numpy as np

from gradwire import Client
from gradwire_cli.checks.clients import (
    Clients,
    block_rows,
    called,
    called_in_place,
    streamed,
)
from gradwire_cli.checks.reference import (
    MOST_ROWS,
    Products,
    Results,
    integer_products,
    normal_products,
)
from gradwire_cli.checks.result import Check, CheckResult, exact, same
from gradwire_protocol import checksum
from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.limits import RESUME

_Way: TypeAlias = Callable[[Clients, Products], Sequence[Results] | None]
"""Runs a job; returns its results, of each attempt, or None if the server or the client
does not support the way."""


def same_bits(name: str, way: _Way) -> Check:
    """Return a check that jobs sent in a way have the bits of a single call.

    Two jobs of one shape and different operands are compared after both have ended.
    """

    def check(
        clients: Clients, dtype: Dtype, rng: np.random.Generator
    ) -> Iterator[CheckResult]:
        jobs = [normal_products(rng, (48, 40, 56), dtype) for _ in range(2)]
        alone = [called(clients.messages, job) for job in jobs]
        results = [way(clients, job) for job in jobs]
        for job, expected, got in zip(jobs, alone, results, strict=True):
            right = {label: a.astype(np.float64) for label, a in expected.items()}
            for each in got or ():
                yield from same(name, job, each, right)

    return check


def by_stream(clients: Clients, job: Products) -> Sequence[Results]:
    """Send a stream of unknown length, then one of known length."""
    return [
        streamed(clients.messages, job, rows_at_once=11, m=m)[0]
        for m in (None, job.shape[0])
    ]


def with_checksum(clients: Clients, job: Products) -> Sequence[Results] | None:
    """Send a job whose payloads have checksums."""
    if not checksum.AVAILABLE:
        return None
    return [called(clients.messages, job, checksum=True)]


def by_other_connection(clients: Clients, job: Products) -> Sequence[Results]:
    """Send a job and a stream over another connection."""
    return [
        called(clients.other, job),
        streamed(clients.other, job, rows_at_once=48)[0],
    ]


def in_shared_memory(clients: Clients, job: Products) -> Sequence[Results] | None:
    """Compute a job in shared memory: copied there, and in place."""
    if clients.shared is None:
        return None
    return [called(clients.shared, job), called_in_place(clients.shared, job)]


def on_direct_connections(clients: Clients, job: Products) -> Sequence[Results] | None:
    """Send a job on direct connections: new ones, and those of the job before."""
    if clients.direct is None:
        return None
    return [called(clients.direct, job), called(clients.direct, job)]


def result_by_result(clients: Clients, job: Products) -> Sequence[Results]:
    """Compute each result alone, without the operands that it does not need."""
    (x, w, dy), client = job.operands, clients.messages
    return [
        {"y": client.forward(x, w)},
        {"dx": client.gradients(None, w, dy, results="dx").dx},
        {"dw": client.gradients(x, None, dy, results="dw").dw},
        {"db": client.gradients(None, w, dy, results="db").db},
    ]


def blocks_in_shared_memory(
    clients: Clients, dtype: Dtype, rng: np.random.Generator
) -> Iterator[CheckResult]:
    """Check integer results over several row blocks in shared memory."""
    return _several_blocks("shared blocks", clients.shared, clients, dtype, rng)


def blocks_on_direct_connections(
    clients: Clients, dtype: Dtype, rng: np.random.Generator
) -> Iterator[CheckResult]:
    """Check integer results over several row blocks on direct connections."""
    return _several_blocks("direct blocks", clients.direct, clients, dtype, rng)


def _several_blocks(
    name: str,
    client: Client | None,
    clients: Clients,
    dtype: Dtype,
    rng: np.random.Generator,
) -> Iterator[CheckResult]:
    """Check integer results over several row blocks, if there is such a client."""
    if client is None:
        return
    rows = block_rows(clients.messages, integer_products(rng, (1, 3, 5), dtype))
    m = min(max(6 * rows + rows // 2, 99), MOST_ROWS)
    job = integer_products(rng, (m, 3, 5), dtype)
    yield from exact(name, job, called(client, job))


def concurrent_jobs(
    clients: Clients, dtype: Dtype, rng: np.random.Generator
) -> Iterator[CheckResult]:
    """Check jobs of one shape that run at the same time, over two connections.

    Each job waits until the first rows of all were sent, so that their row blocks
    alternate on the server.
    """
    rows = block_rows(clients.messages, integer_products(rng, (1, 2, 3), dtype))
    m = min(2 * rows + 1, MOST_ROWS)
    clients_of_jobs = (clients.messages, clients.messages, clients.other)
    jobs = [integer_products(rng, (m, 2, 3), dtype) for _ in clients_of_jobs]
    begun = threading.Barrier(len(jobs))

    def after_the_first(number: int) -> None:
        # A server may run fewer jobs at once: then they do not wait.
        if number == 2:
            with contextlib.suppress(threading.BrokenBarrierError):
                begun.wait(_WAIT_S)

    def run(client: Client, job: Products) -> Results:
        return streamed(client, job, rows_at_once=rows, on_item=after_the_first)[0]

    with ThreadPoolExecutor(len(jobs)) as pool:
        results = list(pool.map(run, clients_of_jobs, jobs))
    for job, got in zip(jobs, results, strict=True):
        yield from exact("concurrent jobs", job, got)


def resumed_jobs(
    clients: Clients, dtype: Dtype, rng: np.random.Generator
) -> Iterator[CheckResult]:
    """Check a stream that is cut off after two row blocks, and resumes."""
    client = clients.messages
    if RESUME not in client.server_info().features:
        return
    few = integer_products(rng, (1, 2, 3), dtype)
    rows = block_rows(client, few)
    job = integer_products(rng, (min(4 * rows + 1, MOST_ROWS), 2, 3), dtype)
    got, _ = streamed(
        client,
        job,
        rows_at_once=rows,
        interrupt_after=2,
        # After every row block, so that the job need not start over.
        checkpoint_rows=1,
    )
    yield from exact("resumed job", job, got)


_WAIT_S = 0.3
"""Seconds that jobs wait for each other. They begin within milliseconds."""

WAYS: dict[str, Check] = {
    name: same_bits(name, way)
    for name, way in {
        "call = stream": by_stream,
        "call = with checksum": with_checksum,
        "call = other connection": by_other_connection,
        "call = shared memory": in_shared_memory,
        "call = direct": on_direct_connections,
        "call = one result": result_by_result,
    }.items()
} | {
    "shared blocks": blocks_in_shared_memory,
    "direct blocks": blocks_on_direct_connections,
    "resumed job": resumed_jobs,
    "concurrent jobs": concurrent_jobs,
}
"""The checks of ways to send a job."""
