"""The bench's figures mean what their docs say."""

import numpy as np
import pytest

from bench.driver import Turn
from bench.report.statistics import bootstrap_median, figures


def test_a_turn_counts_once_however_many_calls_it_held():
    turns = [
        Turn("numpy", 0, (1.0, 1.0, 1.0, 1.0)),
        Turn("numpy", 1, (3.0,)),
        Turn("numpy", 2, (5.0,)),
    ]
    (figure,) = figures(turns, yardstick="numpy")
    assert (figure.median_s, figure.min_s) == (3.0, 1.0)
    assert (figure.turns, figure.calls) == (3, 6)


def test_the_ratio_is_taken_within_each_round():
    # Round 1 was ten times slower for both: the ratio does not see it.
    turns = [
        Turn("numpy", 0, (1.0,)),
        Turn("peer", 0, (2.0,)),
        Turn("peer", 1, (20.0,)),
        Turn("numpy", 1, (10.0,)),
    ]
    local, peer = figures(turns, yardstick="numpy")
    assert local.times_yardstick == 1.0
    assert peer.times_yardstick == 2.0
    assert peer.over_yardstick_s == 11.0 - 5.5


def test_figures_stand_in_the_order_in_which_contenders_came():
    turns = [Turn("b", 0, (1.0,)), Turn("a", 0, (1.0,))]
    assert [f.contender for f in figures(turns, yardstick="a")] == ["b", "a"]


def test_the_interval_of_a_constant_is_that_constant():
    assert bootstrap_median([2.0] * 7) == (2.0, 2.0)


@pytest.mark.parametrize("count", [20, 80])
def test_the_interval_holds_the_true_median_about_as_often_as_it_says(count):
    rng = np.random.default_rng(5)
    held = 0
    for _ in range(100):
        low, high = bootstrap_median(rng.standard_normal(count).tolist())
        held += low <= 0.0 <= high
    # 95 expected; the percentile bootstrap of a median is a little off, and
    # 100 tries spread by 2.2.
    assert held >= 85
