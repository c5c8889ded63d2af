"""Whether samples of times differ, by their ranks, and what would have been seen."""

from __future__ import annotations

import math

import numpy as np

LEVEL = 4.0
"""Standard deviations of a rank sum: one of 16,000 equal pairs of samples has more."""


def rank_z(one: np.ndarray, other: np.ndarray) -> float:
    """Wilcoxon's rank sum of the first, in standard deviations from the expected one.

    Equal values share their ranks' mean.
    """
    count, others = len(one), len(other)
    both = np.concatenate([one, other])
    _, which, sizes = np.unique(both, return_inverse=True, return_counts=True)
    last = sizes.cumsum()
    ranks = (last - (sizes - 1) / 2)[which.reshape(-1)]
    expected = count * (count + others + 1) / 2
    deviation = math.sqrt(count * others * (count + others + 1) / 12)
    return float((ranks[:count].sum() - expected) / deviation)


def smallest_seen(one: np.ndarray, other: np.ndarray, least: float) -> float:
    """The smallest shift that would be seen in nine of ten such pairs of samples.

    Args:
        one: A sample.
        other: Another one.
        least: The shift to begin with; it grows by a quarter.
    """
    both, shift = np.concatenate([one, other]), least
    while True:
        rng = np.random.default_rng(0)
        seen = 0
        for _ in range(30):
            first = rng.choice(both, len(one))
            second = rng.choice(both, len(other))
            seen += abs(rank_z(first + shift, second)) > LEVEL
        if seen >= 27:
            return shift
        shift *= 1.25
