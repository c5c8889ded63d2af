"""Verification of a stream's results as they arrive."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping

import numpy as np

from gradwire._api.types import Array, RowBlock
from gradwire._api.verify import Verify
from gradwire._arrays.operand import Operand
from gradwire._core.job_plan import Plan
from gradwire._integrity.verifier import Computed, Verifier
from gradwire_protocol.matrices import ROW_OPERANDS, ROW_RESULTS, Matrix


class RowCheck:
    """Keeps sent rows until their results arrive, and checks the results.

    Rows and results may come from different threads. When the next item is requested,
    the rows of the last one that are still needed are copied, because the caller may
    then reuse their memory.

    Args:
        plan: The job, with any number of rows.
        w: W, if the job needs it.
        verify: Settings of the check.
    """

    def __init__(self, plan: Plan, w: Operand | None, verify: Verify) -> None:
        self._verifier = Verifier(plan, w, verify)
        self._needs_rows = any(result in plan.results for result in ROW_RESULTS)
        self._lock = threading.Lock()
        self._kept: deque[tuple[int, Mapping[Matrix, Operand]]] = deque()
        self._last: tuple[int, Mapping[Matrix, Operand]] | None = None
        self._checked = 0

    @property
    def seconds(self) -> float:
        """Time spent so far."""
        return self._verifier.seconds

    def took(self, first_row: int, operands: Mapping[Matrix, Operand]) -> None:
        """Record a new item, with its first row."""
        with self._lock:
            self._last = first_row, operands
            if self._needs_rows:
                self._kept.append(self._last)

    def settle(self) -> None:
        """Prepare for the request of the next item."""
        with self._lock:
            if self._last is None:
                return
            (first_row, operands), self._last = self._last, None
            rows = next(iter(operands.values())).rows
            for first in range(0, rows, self._verifier.step):
                last = min(first + self._verifier.step, rows)
                self._verifier.add(
                    {each: value.take(first, last) for each, value in operands.items()}
                )
            if self._kept and self._kept[-1][0] == first_row:
                self._kept.pop()
                needed = min(max(0, self._checked - first_row), rows)
                if needed < rows:
                    copies = {
                        each: _copied(value, needed, rows)
                        for each, value in operands.items()
                    }
                    self._kept.append((first_row + needed, copies))

    def check(self, block: RowBlock, by: Computed) -> None:
        """Check a row block. Row blocks must be checked in order.

        Raises:
            VerificationError: A result is wrong.
        """
        given = {Matrix.Y: block.y, Matrix.DX: block.dx}
        came = {each: array for each, array in given.items() if array is not None}
        rows = len(next(iter(came.values())))
        with self._lock:
            for first in range(0, rows, self._verifier.step):
                part = slice(first, min(first + self._verifier.step, rows))
                row = block.first_row + first
                self._verifier.check_rows(
                    self._rows(row, block.first_row + part.stop),
                    {each: array[part] for each, array in came.items()},
                    row,
                    by,
                )
            self._checked = block.first_row + rows
            while self._kept and _end(self._kept[0]) <= self._checked:
                self._kept.popleft()

    def finish(self, sums: Mapping[Matrix, Array], m: int, by: Computed) -> None:
        """Check what was summed over all rows, after everything else.

        Raises:
            VerificationError: A sum is wrong.
        """
        with self._lock:
            self._verifier.check_sums(sums, m, by)

    def _rows(self, first: int, last: int) -> dict[Matrix, Array]:
        """Return rows [first, last) of X and dY."""
        parts: dict[Matrix, list[Array]] = {matrix: [] for matrix in ROW_OPERANDS}
        for first_row, operands in self._kept:
            for matrix, operand in operands.items():
                begin = max(0, first - first_row)
                end = min(operand.rows, last - first_row)
                if begin < end:
                    parts[matrix].append(operand.take(begin, end))
        return {
            matrix: found[0] if len(found) == 1 else np.concatenate(found)
            for matrix, found in parts.items()
            if found
        }


def _copied(operand: Operand, first: int, last: int) -> Operand:
    """Copy rows [first, last) of an operand, as sent."""
    return Operand(np.array(operand.take(first, last)), operand.dtype)


def _end(part: tuple[int, Mapping[Matrix, Operand]]) -> int:
    first_row, operands = part
    return first_row + next(iter(operands.values())).rows
