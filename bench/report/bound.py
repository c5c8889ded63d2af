"""Bounds on measured figures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bench.report import tables


@dataclass(frozen=True, slots=True)
class Bound:
    """A figure and its upper or lower bound."""

    name: str
    seen: float
    bound: float
    at_least: bool = False
    """Whether it is a lower bound."""

    @property
    def holds(self) -> bool:
        """Whether the figure is within its bound."""
        return self.seen >= self.bound if self.at_least else self.seen <= self.bound


def table(bounds: Iterable[Bound]) -> str:
    """A table of the figures and their bounds."""
    body = [
        (
            bound.name,
            f"{bound.seen:.3f}",
            f"{'at least' if bound.at_least else 'at most'} {bound.bound:.2f}",
            "holds" if bound.holds else "FAILS",
        )
        for bound in bounds
    ]
    return tables.table(body, ("bar", "seen", "bound", ""), texts=1)
