"""Figures that no run has seen."""

from typing import Any

from bench.driver import Usage
from bench.report.statistics import Figure


def figure(contender: str, median_s: float, **others: Any) -> Figure:
    values = {
        "low_s": median_s * 0.9,
        "high_s": median_s * 1.1,
        "min_s": median_s * 0.8,
        "turns": 9,
        "calls": 12,
        "times_yardstick": 1.0,
        "over_yardstick_s": 0.0,
    }
    return Figure(contender=contender, median_s=median_s, **(values | others))


def usage(contender: str, **others: Any) -> Usage:
    values = {
        "calls": 1,
        "client_cpu_s": 0.0,
        "server_cpu_s": 0.0,
        "client_peak_bytes": 30 << 20,
        "server_peak_bytes": None,
    }
    return Usage(contender=contender, **(values | others))
