"""A run's figures as tables for people (GitHub's Markdown)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from bench.report.record import Part
from bench.report.statistics import Figure

HEAD = (
    "shape",
    "contender",
    "median ms",
    "95 % interval",
    "min ms",
    "x numpy",
    "over numpy ms",
    "GB/s each way",
    "CPU s/GB",
    "switches/GB",
    "client MiB",
    "server MiB",
    "turns",
)
TRANSPORT_HEAD = (
    "transport",
    "median ms",
    "95 % interval",
    "min ms",
    "GB/s each way",
    "x first",
    "CPU s/GB",
    "switches/GB",
    "client MiB",
    "server MiB",
    "turns",
)


def rows(part: Part) -> list[tuple[str, ...]]:
    """One row of `HEAD` per contender."""
    return [_row(part, figure) for figure in part.figures]


def transport_rows(part: Part) -> list[tuple[str, ...]]:
    """One row of `TRANSPORT_HEAD` per contender of a part without products."""
    first = part.gb_per_s(part.figures[0].contender) or 1.0
    return [
        (
            figure.contender,
            *_times(figure),
            _number(rate := part.gb_per_s(figure.contender)),
            _number((rate or 0.0) / first),
            *_costs(part, figure),
        )
        for figure in part.figures
    ]


def _row(part: Part, figure: Figure) -> tuple[str, ...]:
    return (
        part.shape.label,
        figure.contender,
        *_times(figure),
        f"{figure.times_yardstick:.2f}",
        milliseconds(figure.over_yardstick_s) if figure.over_yardstick_s else "",
        _number(part.gb_per_s(figure.contender)),
        *_costs(part, figure),
    )


def _times(figure: Figure) -> tuple[str, ...]:
    return (
        milliseconds(figure.median_s),
        f"{milliseconds(figure.low_s)} to {milliseconds(figure.high_s)}",
        milliseconds(figure.min_s),
    )


def _costs(part: Part, figure: Figure) -> tuple[str, ...]:
    usage = part.usage(figure.contender)
    return (
        _number(part.cpu_s_per_gb(figure.contender)),
        _number(part.switches_per_gb(figure.contender), digits=0),
        _mib(usage and usage.client_peak_bytes),
        _mib(usage and usage.server_peak_bytes),
        str(figure.turns),
    )


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def table(
    body: Iterable[tuple[str, ...]], head: Sequence[str] = HEAD, texts: int = 2
) -> str:
    """Format rows under a head, with aligned columns, the first `texts` to the left."""
    lines = [tuple(head), *body]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]

    def row(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i < texts else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [
        "-" * width if i < texts else "-" * (width - 1) + ":"
        for i, width in enumerate(widths)
    ]
    return "\n".join([row(lines[0]), row(rule), *(row(line) for line in lines[1:])])


def heading(machine: dict[str, Any]) -> str:
    """One line about the machine behind the figures."""
    memory_gib = machine["memory_bytes"] / 2**30
    packages = ", ".join(f"{k} {v}" for k, v in machine["packages"].items())
    return (
        f"{machine['processor']}, {machine['cores']} cores, {memory_gib:.0f} GiB; "
        f"Python {machine['python']}, {packages}; {machine['blas']} with "
        f"{machine['blas_threads']} threads in every process; "
        f"load before the run {machine['load_before']}"
    )


def milliseconds(seconds: float) -> str:
    """Format seconds as milliseconds, with significant digits only."""
    value = seconds * 1e3
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}"


def _mib(size_bytes: int | None) -> str:
    return "" if size_bytes is None else f"{size_bytes / 2**20:.0f}"
