"""Rounds of turns within a limit of time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class Rounds:
    """Yields the numbers of the rounds.

    A round begins if it will probably end in time, as long as those before.
    """

    seconds: float
    """Of all rounds, about."""
    least: int
    """Rounds in any case."""
    most: int

    @classmethod
    def of(cls, given: dict[str, Any]) -> Self:
        return cls(given["seconds"], given["least_rounds"], given["rounds"])

    def __iter__(self) -> Iterator[int]:
        begun = time.monotonic()
        for number in range(self.most):
            taken = time.monotonic() - begun
            if number >= self.least and taken * (number + 1) / number > self.seconds:
                return
            yield number
