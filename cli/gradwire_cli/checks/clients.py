"""The clients of a server that is checked, and the ways in which they send jobs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from gradwire import (
    Client,
    ConnectionLostError,
    GradwireError,
    NumericsError,
    Receipt,
)
from gradwire_cli import sdk_warnings
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

    servers: int = 1
    """Number of servers, at least: a DNS name counts as one."""

    one: Client | None = None
    """Sends elements to a single one of several servers, in messages; None if there is
    one server only, or if none can be reached alone."""

    no_segments: Mapping[str, str] = field(default_factory=dict)
    """Addresses of those of several servers that get no segments of jobs with
    ``spread=True``, and why."""


@contextmanager
def open_clients(connect: Connect, addresses: Sequence[str] = ()) -> Iterator[Clients]:
    """Connect to a server in every way.

    Args:
        connect: Makes the clients. With ``address=`` one of `addresses`, or of those
            that a DNS name has, of that server alone.
        addresses: The servers' addresses. Those of one server are not used.

    Raises:
        GradwireError: The server is unreachable.
    """
    with ExitStack() as stack:
        messages = stack.enter_context(connect(transport="grpc"))
        other = stack.enter_context(connect(transport="grpc"))
        shared, direct = _sharing(connect, stack), _direct(connect, stack)
        if len(addresses) < 2 and not any(map(_is_name, addresses)):
            yield Clients(messages, other, shared, direct)
            return
        excluded: dict[str, str] = {}

        def note(record: logging.LogRecord) -> None:
            fields = vars(record)
            if "why_no_segments" in fields:
                excluded[fields["server_address"]] = fields["why_no_segments"]

        stack.enter_context(sdk_warnings.noted(note))
        one = _one(connect, messages, stack)
        for address in addresses:
            if not _is_name(address):
                try:
                    messages.server_info(timeout_s=_ASK_S, address=address)
                except GradwireError as error:
                    excluded.setdefault(address, str(error))
        yield Clients(messages, other, shared, direct, len(addresses), one, excluded)


_ASK_S = 5.0
"""Seconds that each of several servers has to say something about itself."""


def _is_name(address: str) -> bool:
    """Whether an address stands for all addresses of a DNS name."""
    return address.startswith("dns:")


def _one(connect: Connect, several: Client, stack: ExitStack) -> Client | None:
    """Connect to a server that computes segments; None if that is not possible."""
    row = np.ones((1, 1))
    try:
        receipt = several.gradients(row, row, row, spread=True).receipt
    except NumericsError:  # all servers are older
        return None
    with ExitStack() as attempt:
        try:
            address = receipt.segments[0].server_address
            client = attempt.enter_context(connect(transport="grpc", address=address))
        except GradwireError:
            # Over TLS, where the certificate is for the name that has the address.
            return None
        stack.push(attempt.pop_all())
        return client


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
