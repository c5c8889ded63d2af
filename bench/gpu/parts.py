"""Shared code of the GPU bench: options, answers, bars."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.report import tables
from bench.report.bound import Bound


@dataclass(frozen=True, slots=True)
class Options:
    """Options of the command line."""

    backend: str
    quick: bool = False
    scale: int = 1
    """Divisor of every size."""

    @property
    def seconds(self) -> float:
        """Approximate time for one measurement."""
        return 1.0 if self.quick else 4.0

    def scaled(self, size: int) -> int:
        """The size divided by `scale`."""
        return max(size // self.scale, 1)


def _no_bounds(_: Sequence[dict[str, Any]], __: dict[str, Any]) -> list[Bound]:
    return []


@dataclass(slots=True)
class Answer:
    """The result of a part: rows of named figures."""

    name: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None
    """Why the part failed."""
    skipped: str | None = None
    """Why the part was skipped."""
    judge: Callable[[Sequence[dict[str, Any]], dict[str, Any]], Iterable[Bound]] = (
        _no_bounds
    )
    """Computes the bars from the rows and all answers so far."""

    def bounds(self, answers: dict[str, Any]) -> list[Bound]:
        """The bars of this answer."""
        return list(self.judge(self.rows, answers))

    def as_json(self) -> dict[str, Any]:
        """The answer for the JSON file."""
        found: dict[str, Any] = {"rows": self.rows}
        if self.error is not None:
            found["error"] = self.error
        if self.skipped is not None:
            found["skipped"] = self.skipped
        return found

    def table(self) -> str:
        """The answer as a table."""
        if self.error is not None:
            return f"{self.name}: failed: {self.error}"
        if self.skipped is not None:
            return f"{self.name}: {self.skipped}"
        head = tuple(self.rows[0])
        body = [tuple(map(_cell, row.values())) for row in self.rows]
        return f"{self.name}:\n\n{tables.table(body, head, texts=2)}"


def median(samples: Sequence[float]) -> float:
    """The median of at least one sample."""
    return statistics.median(samples)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
