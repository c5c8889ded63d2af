"""Checks of jobs that several servers compute together."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gradwire_cli.checks.clients import Clients, called
from gradwire_cli.checks.reference import integer_products, normal_products
from gradwire_cli.checks.result import CheckResult, exact, same
from gradwire_protocol.dtypes import Dtype

_N, _K = 40, 56
_BLOCK_ROWS = 16
"""So small that a segment has several row blocks."""


def spread_jobs(
    clients: Clients, dtype: Dtype, rng: np.random.Generator
) -> Iterator[CheckResult]:
    """Check jobs that all servers compute together: exact sums, and one server's bits.

    They have some segments for each server, and the last one is short.
    """
    if clients.one is None:
        return
    few = integer_products(rng, (1, _N, _K), dtype).operands
    receipt = clients.one.gradients(*few, spread=True, block_rows=_BLOCK_ROWS).receipt
    rows = receipt.fingerprint.segment_rows
    m = rows * (2 * clients.servers + 1) - rows // 2
    job = integer_products(rng, (m, _N, _K), dtype)
    together = called(clients.messages, job, spread=True, block_rows=_BLOCK_ROWS)
    yield from exact("spread", job, together)
    job = normal_products(rng, (m, _N, _K), dtype)
    together, alone = (
        called(client, job, spread=True, block_rows=_BLOCK_ROWS)
        for client in (clients.messages, clients.one)
    )
    right = {label: a.astype(np.float64) for label, a in alone.items()}
    yield from same("spread = one server", job, together, right)
