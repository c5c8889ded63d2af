"""Figure of a run: time against size, one line per contender.

``python -m bench.report.figure RUN.jsonl FIGURE.svg`` writes the figure. It shows
cubes, on logarithmic axes, with one panel for each form of results. Below them, if the
run measured transports alone, are their rates and what they cost both ends.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.report.record import Part, Run
from bench.report.summary import transports
from bench.work import FORMS

# gradwire in one hue, other contenders in other hues, NumPy in black.
_STYLES = {
    "numpy": ("black", "--", ""),
    "gradwire-direct": ("#08306b", "-", "o"),
    "gradwire-grpc": ("#2171b5", "-", "o"),
    "gradwire-auto": ("#9ecae1", "-", "v"),
    "gradwire-unix": ("#4292c6", "-", "s"),
    "gradwire-shm": ("#6baed6", "-", "D"),
    "grpcio-unary": ("#a50f15", "-", "^"),
    "grpcio-stream": ("#fb6a4a", "-", "v"),
    "arrow-flight": ("#d95f0e", "-", "<"),
    "torch-rpc": ("#756bb1", "-", ">"),
    "raw-tcp": ("#636363", ":", "x"),
    "raw-shm": ("#969696", ":", "+"),
}
_OTHER = ("#31a354", "-", "*")


def draw(run: Run, path: Path) -> None:
    """Write the figure; the file name's suffix selects the format."""
    # Imported here: only this function needs it.
    import matplotlib as mpl  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    # Makes the file reproducible, and keeps text as text.
    mpl.rcParams.update({"svg.hashsalt": "gradwire", "svg.fonttype": "none"})
    alone = transports(run)
    figure: Any = Figure(
        figsize=(10, 4.6 if alone is None else 7.4), layout="constrained"
    )
    upper, lower = figure, None
    if alone is not None:
        upper, lower = figure.subfigures(2, 1, height_ratios=(4.6, 2.8))
    panels = upper.subplots(1, len(FORMS), sharey=True)
    for panel, form in zip(panels, FORMS, strict=True):
        _panel(panel, [part for part in cubes(run) if part.form == form])
        panel.set_title(f"results in {form} arrays")
    panels[0].set_ylabel("median of a call, ms")
    handles, labels = panels[0].get_legend_handles_labels()
    upper.legend(handles, labels, loc="outside right center", frameon=False)
    if alone is not None:
        _transports(lower, alone)
    is_svg = path.suffix == ".svg"
    figure.savefig(path, dpi=120, metadata={"Date": None} if is_svg else None)


def cubes(run: Run) -> list[Part]:
    """The parts with cubic shapes and without a link, by size."""
    found = (
        part
        for part in run.parts
        if part.shape.m == part.shape.n == part.shape.k
        and part.link_bits_per_s is None
        and part.products
    )
    return sorted(found, key=lambda part: part.shape)


def _panel(panel: Any, parts: Sequence[Part]) -> None:
    names = {figure.contender: None for part in parts for figure in part.figures}
    for name in names:
        seen = [(p, f) for p in parts if (f := p.figure(name))]
        colour, line, marker = _STYLES.get(name, _OTHER)
        panel.plot(
            [part.shape.m for part, _ in seen],
            [1e3 * figure.median_s for _, figure in seen],
            color=colour,
            linestyle=line,
            marker=marker,
            markersize=5,
            linewidth=1.4,
            label=name,
        )
    sides = [part.shape.m for part in parts]
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter("{x:g}")
    panel.set_xticks(sides, [f"{side}³" for side in sides])
    panel.grid(visible=True, alpha=0.3)
    panel.set_xlabel("m = n = k")


def _transports(figure: Any, part: Part) -> None:
    """Bars of the transports alone, the first contender on top."""
    names = [each.contender for each in part.figures][::-1]
    colours = [_STYLES.get(name.removesuffix("-tls"), _OTHER)[0] for name in names]
    hatches = ["///" if name.endswith("-tls") else "" for name in names]
    panels = figure.subplots(1, 2, sharey=True)
    for panel, measure, title in (
        (panels[0], part.gb_per_s, "GB/s each way"),
        (panels[1], part.cpu_s_per_gb, "CPU s/GB, both ends"),
    ):
        values = [measure(name) or 0.0 for name in names]
        bars = panel.barh(
            names, values, color=colours, hatch=hatches, edgecolor="white"
        )
        panel.bar_label(bars, fmt="{:.2f}", padding=3)
        panel.margins(x=0.12)
        panel.set_title(title)
        panel.grid(visible=True, axis="x", alpha=0.3)
        panel.set_axisbelow(True)
    figure.suptitle(f"transports alone: {part.shape.label}, nothing is computed")


def main(arguments: Sequence[str]) -> int:
    """Draw the run of one file into another."""
    draw(Run.read(Path(arguments[0])), Path(arguments[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
