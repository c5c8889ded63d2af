from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from gradwire._api.options import parse_options
from gradwire._client._sync.row_source import SyncRowSource
from gradwire._resilience.replay_buffer import _PORTION_BYTES, ReplayBuffer
from gradwire._resilience.row_reader import RowReader
from gradwire_protocol.matrices import Matrix
from tests.support import oracle

X, W, DY = oracle.operands(60, 3, 2)


def reader() -> RowReader:
    return RowReader(W, None, parse_options(results=("y", "dx", "dw")))


def items(size: int = 7) -> Iterator[Any]:
    memory = np.empty((size, 3), np.float32), np.empty((size, 2), np.float32)
    for first in range(0, 60, size):
        parts = tuple(a[: 60 - first] for a in memory)
        parts[0][:], parts[1][:] = X[first : first + size], DY[first : first + size]
        yield parts


def rows(drawn: SyncRowSource, first: int, last: int | None = None) -> Any:
    """X's rows from a row on, to the end or at least up to another."""
    parts, count = [np.empty((0, 3), np.float32)], first
    for batch in drawn.batches(first):
        x = batch[Matrix.X]
        parts.append(np.array(x.take(0, x.rows)))
        count += x.rows
        if last is not None and count >= last:
            break
    return np.concatenate(parts)


def test_rows_come_again_though_their_memory_was_used_again() -> None:
    held = ReplayBuffer(reader(), 1 << 20)
    drawn = SyncRowSource(items(), held)
    assert oracle.same_bits(rows(drawn, 0, 20), X[:21])
    assert oracle.same_bits(rows(drawn, 0), X)
    assert held.complete
    for first in (0, 5, 7, 33, 59, 60):
        assert oracle.same_bits(rows(drawn, first), X[first:])


def test_a_sequence_is_read_again_and_not_copied() -> None:
    pairs = [(X[a : a + 7], DY[a : a + 7]) for a in range(0, 60, 7)]
    held = ReplayBuffer(reader(), 0, pairs)
    drawn = SyncRowSource(iter(pairs), held)
    rows(drawn, 0)
    batch = held.batch(0)
    assert batch is not None
    assert batch[Matrix.X].array is pairs[0][0]
    assert oracle.same_bits(rows(drawn, 40), X[40:])


def test_what_is_not_needed_again_is_forgotten() -> None:
    held = ReplayBuffer(reader(), 1 << 20)
    rows(SyncRowSource(items(), held), 0)
    held.discard_before(20)
    assert held.first_available == 14
    assert held.has(14)
    assert not held.has(13)
    held.discard_before(60)
    assert held.first_available == 60


@pytest.mark.parametrize("limit", [0, 1, 3000])
def test_no_more_than_the_limit_is_held(limit: int) -> None:
    held = ReplayBuffer(reader(), limit)
    assert oracle.same_bits(rows(SyncRowSource(items(), held), 0), X)
    assert held._held_bytes <= limit
    assert held.first_available > 0


def test_of_a_large_item_a_portion_is_copied_at_a_time() -> None:
    x = np.zeros((3 * _PORTION_BYTES // 12, 3), np.float32)
    dy = np.zeros((len(x), 2), np.float32)
    held = ReplayBuffer(reader(), 1 << 30)
    drawn = SyncRowSource(iter([(x, dy)]), held)
    batches = drawn.batches(0)
    next(batches)
    assert held._held_bytes < 1.1 * _PORTION_BYTES
    rest = sum(part[Matrix.X].rows for part in batches)
    assert held.count == len(x) > rest


def test_an_attempt_that_has_failed_takes_no_more_rows() -> None:
    drawn = SyncRowSource(items(), ReplayBuffer(reader(), 1 << 20))
    failed = drawn.batches(0)
    next(failed)
    assert oracle.same_bits(rows(drawn, 0), X)
    assert list(failed) == []


def test_what_the_iterable_raised_is_raised_again_and_no_short_job_made_of_it() -> None:
    def breaks() -> Iterator[Any]:
        yield X[:5], DY[:5]
        raise OSError("the disk is gone")

    drawn = SyncRowSource(breaks(), ReplayBuffer(reader(), 1 << 20))
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            rows(drawn, 0)
