"""What the parts of the GPU bench have in common: options, answers, bars."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.report import tables
from bench.report.bound import Bound


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for."""

    backend: str
    quick: bool = False
    scale: int = 1
    """By what every size is divided."""

    @property
    def seconds(self) -> float:
        """About how long to measure one thing."""
        return 1.0 if self.quick else 4.0

    def scaled(self, size: int) -> int:
        """A size, as it was asked for."""
        return max(size // self.scale, 1)


def _no_bounds(_: Sequence[dict[str, Any]], __: dict[str, Any]) -> list[Bound]:
    return []


@dataclass(slots=True)
class Answer:
    """What a part has found: rows of figures, by their names."""

    name: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None
    """Why there are none."""
    skipped: str | None = None
    """Why it was not asked."""
    judge: Callable[[Sequence[dict[str, Any]], dict[str, Any]], Iterable[Bound]] = (
        _no_bounds
    )
    """Told the rows, and every answer so far; gives the bars."""

    def bounds(self, answers: dict[str, Any]) -> list[Bound]:
        """The bars that it says something of."""
        return list(self.judge(self.rows, answers))

    def as_json(self) -> dict[str, Any]:
        """As it is written down."""
        found: dict[str, Any] = {"rows": self.rows}
        if self.error is not None:
            found["error"] = self.error
        if self.skipped is not None:
            found["skipped"] = self.skipped
        return found

    def table(self) -> str:
        """As it is printed."""
        if self.error is not None:
            return f"{self.name}: failed: {self.error}"
        if self.skipped is not None:
            return f"{self.name}: {self.skipped}"
        head = tuple(self.rows[0])
        body = [tuple(map(_cell, row.values())) for row in self.rows]
        return f"{self.name}:\n\n{tables.table(body, head, texts=2)}"


def median(samples: Sequence[float]) -> float:
    """Of any number of samples but none."""
    return statistics.median(samples)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
