"""Gradients of more rows than fit into memory: a generator in, blocks out.

.venv/bin/python examples/row_blocks.py [ADDRESS]

Rows are generated on demand and dropped after sending. Both sides hold a few row
blocks, so memory does not grow with the number of rows. The number of rows need not
be known in advance.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from local_server import given_or_local_server

import gradwire

N, K = 256, 64
PARTS, ROWS_OF_A_PART = 200, 2000

Array = npt.NDArray[Any]


def parts(count: int) -> Iterator[tuple[Array, Array]]:
    """Pairs of rows of X and of dY; a part may have any number of rows."""
    rng = np.random.default_rng(1)
    for _ in range(count):
        x_rows = rng.standard_normal((ROWS_OF_A_PART, N), dtype=np.float32)
        yield x_rows, x_rows[:, :K] * 0.5


def peak_mib() -> int:
    """Highest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def run(client: gradwire.Client, count: int) -> gradwire.Receipt:
    """Compute the gradients of `count` parts, and use and drop each result."""
    w = np.eye(N, K, dtype=np.float32)
    total = 0.0
    with client.stream(parts(count), w) as stream:
        for block in stream:
            total += float(np.square(block.dx).sum())
    print(f"  |dX| = {total**0.5:.1f}, |dW| = {np.linalg.norm(stream.dw):.1f}")
    return stream.receipt


with given_or_local_server() as address, gradwire.connect(address) as client:
    print("A short job to warm up:")
    run(client, PARTS // 10)
    before_mib = peak_mib()
    print("A job ten times as long:")
    receipt = run(client, PARTS)

moved_mib = (receipt.bytes_received + receipt.bytes_sent) / 2**20
print(f"{receipt.m:,} rows in {receipt.blocks} blocks, {moved_mib:,.0f} MiB moved")
print(f"Memory on the server: {receipt.reserved_bytes / 2**20:.0f} MiB")
print(f"Peak memory here: {before_mib} MiB before, {peak_mib()} MiB after")
