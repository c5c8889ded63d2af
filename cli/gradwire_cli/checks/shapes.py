"""Checks of shapes: few, square, wide and long matrices, and many row blocks.

All operands are integers whose sums are exact in any order.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gradwire_cli.checks.clients import Clients, block_rows, called, streamed
from gradwire_cli.checks.reference import MOST_ROWS, integer_products, weighted_sums
from gradwire_cli.checks.result import CheckResult, exact, same, same_in_all
from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.limits import DEFAULT_CHUNK_BYTES


def small_shapes(
    clients: Clients, dtype: Dtype, rng: np.random.Generator
) -> Iterator[CheckResult]:
    """Check shapes with ones, equal sizes, powers of two and their neighbours."""
    for shape in _SMALL:
        job = integer_products(rng, shape, dtype)
        got = called(clients.messages, job)
        yield same_in_all("shapes", job, got, job.expected())


_SMALL = (
    *((1, 1, 1), (1, 1, 9), (1, 9, 1), (9, 1, 1), (1, 9, 7), (9, 1, 7), (9, 7, 1)),
    *((16, 16, 16), (31, 31, 5), (31, 5, 31), (5, 31, 31), (64, 64, 64)),
    *((65, 33, 17), (8, 128, 128), (7, 129, 257)),
)


def wide(
    clients: Clients, dtype: Dtype, rng: np.random.Generator
) -> Iterator[CheckResult]:
    """Check matrices with more than 1024 columns, square W and not."""
    square = dtype in {Dtype.BFLOAT16, Dtype.FLOAT32}
    shape = (2, 1056, 1056) if square else (3, 1030, 1090)
    job = integer_products(rng, shape, dtype)
    yield from exact("wide", job, called(clients.messages, job))


def long_rows(
    clients: Clients, dtype: Dtype, rng: np.random.Generator
) -> Iterator[CheckResult]:
    """Check rows larger than a stream message, of X and of dY."""
    limits = clients.messages.server_info().limits
    length = min(DEFAULT_CHUNK_BYTES // dtype.itemsize + 1001, limits.max_columns)
    for shape in ((2, length, 1), (2, 1, length)):
        job = integer_products(rng, shape, dtype)
        got, _ = streamed(clients.messages, job, rows_at_once=1, m=2)
        yield from exact("long rows", job, got)


def row_blocks(
    clients: Clients, dtype: Dtype, rng: np.random.Generator
) -> Iterator[CheckResult]:
    """Check results over several row blocks.

    Many blocks of few columns, with one row in the last block; a stream of
    known length with full blocks only; a few blocks of more columns.
    """
    client = clients.messages
    for (n, k), blocks, more, known in (
        ((2, 3), 17, 0, False),
        ((5, 4), 2, None, True),
        ((17, 11), 3, 3, False),
    ):
        rows = block_rows(client, integer_products(rng, (1, n, k), dtype))
        m = blocks * rows
        if more is not None:
            m = max(m + (rows // more if more else 1), 99)
        m = min(m, MOST_ROWS)
        job = integer_products(rng, (m, n, k), dtype)
        got, _ = streamed(client, job, rows_at_once=m // 7 + 1, m=m if known else None)
        yield from exact("row blocks", job, got)


def wide_blocks(
    clients: Clients, dtype: Dtype, rng: np.random.Generator
) -> Iterator[CheckResult]:
    """Check several row blocks of matrices with more than 1024 columns.

    The products are too large to compute here, so exact sums of their columns, with
    random weights, are compared: a wrong row passes with a probability of at most
    1/511.
    """
    n, k = (1030, 140) if dtype is Dtype.FLOAT32 else (140, 1030)
    few = integer_products(rng, (1, n, k), dtype)
    rows = block_rows(clients.messages, few)
    job = integer_products(rng, (rows + 1, n, k), dtype)
    got = called(clients.messages, job)
    right, found = weighted_sums(rng, job, got)
    yield from same("wide blocks", job, found, right)
