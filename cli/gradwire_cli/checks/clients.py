"""The clients of a server that is checked, and the ways in which they send jobs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from gradwire import Client, ConnectionLostError, GradwireError, Receipt
from gradwire_cli.checks.reference import RESULTS, Products, Results

Connect: TypeAlias = Callable[..., AbstractContextManager[Client]]
"""Connects with the given options of `gradwire.connect`."""


@dataclass(frozen=True, slots=True)
class Clients:
    """Clients of one server."""

    messages: Client
    """Sends elements in messages."""

    other: Client
    """Sends elements in messages, over a connection of its own."""

    shared: Client | None
    """Sends elements in shared memory; None if the server does not share memory with
    this client."""

    direct: Client | None
    """Sends elements on direct connections; None if the server has none, or if they do
    not reach it."""


@contextmanager
def open_clients(connect: Connect) -> Iterator[Clients]:
    """Connect to a server in every way.

    Args:
        connect: Makes the clients.

    Raises:
        GradwireError: The server is unreachable.
    """
    with ExitStack() as stack:
        messages = stack.enter_context(connect(transport="grpc"))
        other = stack.enter_context(connect(transport="grpc"))
        yield Clients(
            messages, other, _sharing(connect, stack), _direct(connect, stack)
        )


def _sharing(connect: Connect, stack: ExitStack) -> Client | None:
    with ExitStack() as attempt:
        try:
            client = attempt.enter_context(connect(transport="shm"))
            client.empty(1)
        # With several servers, on another host, or if the server refuses.
        except GradwireError:
            return None
        stack.push(attempt.pop_all())
        return client


def _direct(connect: Connect, stack: ExitStack) -> Client | None:
    with ExitStack() as attempt:
        try:
            client = attempt.enter_context(connect(transport="direct"))
            client.forward(np.ones((1, 1)), np.ones((1, 1)))
        except GradwireError:
            return None
        stack.push(attempt.pop_all())
        return client


def called(client: Client, job: Products, **options: Any) -> Results:
    """Run a job of arrays."""
    results = client.gradients(*job.operands, results=RESULTS, **options)
    return {name: getattr(results, name) for name in RESULTS}


def called_in_place(client: Client, job: Products) -> Results:
    """Run a job with all operands and results in arrays of the client."""
    operands = []
    for given in job.operands:
        operand = client.empty(given.shape, given.dtype)
        operand[...] = given
        operands.append(operand)
    (m, n, k), dtype = job.shape, job.dtype.label
    shapes = {"y": (m, k), "dx": (m, n), "dw": (n, k), "db": (k,)}
    out = {name: client.empty(shape, dtype) for name, shape in shapes.items()}
    for result in out.values():
        # Missing elements stay NaN, so the comparison fails.
        result[...] = np.nan
    client.gradients(*operands, out=out, results=RESULTS)
    return out


def streamed(
    client: Client,
    job: Products,
    *,
    rows_at_once: int,
    m: int | None = None,
    checkpoint_rows: int | None = None,
    on_item: Callable[[int], None] | None = None,
    interrupt_after: int | None = None,
) -> tuple[Results, Receipt]:
    """Run a job as a stream.

    Args:
        client: The client.
        job: The job.
        rows_at_once: Rows of an item of the stream.
        m: The job's rows, to make their number known beforehand.
        checkpoint_rows: As for `Client.stream`.
        on_item: Called with the number of each item before it is sent.
        interrupt_after: Number of row blocks after which the call is cut off, so that
            the job resumes; None: it is not.
    """
    x, w, dy = job.operands
    rows, n, k = job.shape
    # Missing elements stay NaN, so the comparison fails.
    results = {
        "y": np.full((rows, k), np.nan, x.dtype),
        "dx": np.full((rows, n), np.nan, x.dtype),
    }

    def parts() -> Iterator[tuple[Any, Any]]:
        for number, first in enumerate(range(0, rows, rows_at_once)):
            if on_item is not None:
                on_item(number)
            part = slice(first, first + rows_at_once)
            yield x[part], dy[part]

    # A sequence can be read again.
    items = parts() if interrupt_after is None else list(parts())
    with client.stream(
        items, w, m=m, results=RESULTS, checkpoint_rows=checkpoint_rows
    ) as stream:
        for number, block in enumerate(stream, 1):
            here = slice(block.first_row, block.first_row + len(block))
            results["y"][here] = block.y
            results["dx"][here] = block.dx
            if number == interrupt_after:
                stream._interrupt(ConnectionLostError("cut off by the check"))
        sums = {"dw": stream.dw, "db": stream.db}
    for name, array in sums.items():
        if array is None:
            raise TypeError(f"an exhausted stream has {name} if it was requested")
        results[name] = array
    return results, stream.receipt


def block_rows(client: Client, job: Products) -> int:
    """Return the rows of the server's row blocks, for jobs of this n, k and dtype."""
    few = Products(job.x[:1], job.w, job.dy[:1])
    return streamed(client, few, rows_at_once=1)[1].block_rows
