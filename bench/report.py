"""The figures as a table for people (GitHub's Markdown)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from bench.driver import Peak
from bench.statistics import Figure
from bench.work import Shape

_HEAD = (
    "shape",
    "contender",
    "median ms",
    "95 % interval",
    "min ms",
    "x numpy",
    "over numpy ms",
    "client MiB",
    "server MiB",
    "turns",
)


def rows(
    shape: Shape, figures: Sequence[Figure], peaks: Sequence[Peak]
) -> list[tuple[str, ...]]:
    """The table's rows of one shape."""
    peak_of = {peak.contender: peak for peak in peaks}
    made: list[tuple[str, ...]] = []
    for figure in figures:
        peak = peak_of[figure.contender]
        made.append(
            (
                shape.label,
                figure.contender,
                _ms(figure.median_s),
                f"{_ms(figure.low_s)} to {_ms(figure.high_s)}",
                _ms(figure.min_s),
                f"{figure.times_yardstick:.2f}",
                _ms(figure.over_yardstick_s) if figure.over_yardstick_s else "",
                _mib(peak.client_bytes),
                _mib(peak.server_bytes),
                str(figure.turns),
            )
        )
    return made


def table(body: Iterable[tuple[str, ...]]) -> str:
    """The rows under the head, with the columns lined up."""
    lines = [_HEAD, *body]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_HEAD))]

    def row(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [
        "-" * width if i < 2 else "-" * (width - 1) + ":"
        for i, width in enumerate(widths)
    ]
    return "\n".join([row(_HEAD), row(rule), *(row(line) for line in lines[1:])])


def heading(machine: dict[str, Any]) -> str:
    """One line about where the figures come from."""
    memory_gib = machine["memory_bytes"] / 2**30
    packages = ", ".join(f"{k} {v}" for k, v in machine["packages"].items())
    return (
        f"{machine['processor']}, {machine['cores']} cores, {memory_gib:.0f} GiB; "
        f"Python {machine['python']}, {packages}; {machine['blas']} with "
        f"{machine['blas_threads']} threads in every process; "
        f"load before the run {machine['load_before']}"
    )


def _ms(seconds: float) -> str:
    value = seconds * 1e3
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}"


def _mib(size_bytes: int | None) -> str:
    return "" if size_bytes is None else f"{size_bytes / 2**20:.0f}"
