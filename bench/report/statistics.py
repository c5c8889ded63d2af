"""Statistics of turns: medians, their uncertainty, and ratios."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bench.driver import Turn

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Figure:
    """One contender at one shape. Times are in seconds."""

    contender: str
    median_s: float
    """Median over turns of the median call of a turn."""

    low_s: float
    """Lower end of the median's 95 % bootstrap interval."""

    high_s: float
    """Upper end of the same interval."""

    min_s: float
    """The fastest call of all."""

    turns: int
    calls: int

    times_yardstick: float
    """Median over rounds of the ratio of this contender's time to the yardstick's
    in the same round: disturbances of both cancel."""

    over_yardstick_s: float
    """Median minus the yardstick's median: the cost of the transport."""


def figures(turns: Sequence[Turn], yardstick: str) -> list[Figure]:
    """The figures of all contenders, in order of first appearance."""
    seen: dict[str, dict[int, Turn]] = {}
    for turn in turns:
        seen.setdefault(turn.contender, {})[turn.round] = turn
    base = {number: _seconds(turn) for number, turn in seen[yardstick].items()}
    base_median_s = statistics.median(base.values())
    return [_figure(rounds, base, base_median_s) for rounds in seen.values()]


def _figure(
    rounds: dict[int, Turn], base: dict[int, float], base_median_s: float
) -> Figure:
    per_turn = {number: _seconds(turn) for number, turn in rounds.items()}
    calls = [call for turn in rounds.values() for call in turn.calls_s]
    median_s = statistics.median(per_turn.values())
    low_s, high_s = bootstrap_median(list(per_turn.values()))
    return Figure(
        contender=next(iter(rounds.values())).contender,
        median_s=median_s,
        low_s=low_s,
        high_s=high_s,
        min_s=min(calls),
        turns=len(rounds),
        calls=len(calls),
        times_yardstick=statistics.median(
            seconds / base[number] for number, seconds in per_turn.items()
        ),
        over_yardstick_s=median_s - base_median_s,
    )


def bootstrap_median(samples: Sequence[float]) -> tuple[float, float]:
    """The percentile bootstrap interval of the samples' median."""
    values: npt.NDArray[np.float64] = np.asarray(samples, np.float64)
    drawn = np.random.default_rng(0).choice(values, (RESAMPLES, len(values)))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.median(drawn, axis=1), [tail, 1 - tail])
    return float(low), float(high)


def _seconds(turn: Turn) -> float:
    return statistics.median(turn.calls_s)
