"""The jobs that faults happen to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import gradwire
from tests.support import oracle

M, N, K = 40, 12, 8
X, W, DY = oracle.operands(M, N, K)
JOBS = {"all results": ("y", "dx", "dw"), "Y alone": ("y",), "dW alone": ("dw",)}


def compute(client: Any, job: str, **options: Any) -> gradwire.Gradients:
    """One of the jobs, from arrays."""
    return client.gradients(X, W, DY, results=JOBS[job], **options)


def bits(result: Any, job: str) -> tuple[bytes, ...]:
    """The bits of a job's results."""
    return tuple(getattr(result, name).tobytes() for name in JOBS[job])


def placed(blocks: Iterable[gradwire.RowBlock]) -> dict[int, tuple[Any, Any]]:
    """Y and dX of every row block, by its first row.

    Raises:
        AssertionError: A row is missing, or comes twice.
    """
    found: dict[int, tuple[Any, Any]] = {}
    rows = 0
    for block in blocks:
        assert block.first_row == rows
        found[block.first_row] = (block.y, block.dx)
        rows += block.y.shape[0]
    assert rows == M
    return found


def parts(rows: int = 5) -> Iterator[tuple[Any, Any]]:
    """X and dY some rows at a time, from a generator that can be read once."""
    for first in range(0, M, rows):
        yield X[first : first + rows], DY[first : first + rows]
