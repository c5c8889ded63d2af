"""Figure of a run: time against size, one line per contender.

``python -m bench.report.figure RUN.jsonl FIGURE.svg`` writes the figure. It shows
cubes, on logarithmic axes, with one panel for each form of results.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.report.record import Part, Run
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
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    panels = figure.subplots(1, len(FORMS), sharey=True)
    for panel, form in zip(panels, FORMS, strict=True):
        _panel(panel, [part for part in cubes(run) if part.form == form])
        panel.set_title(f"results in {form} arrays")
    panels[0].set_ylabel("median of a call, ms")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    is_svg = path.suffix == ".svg"
    figure.savefig(path, dpi=120, metadata={"Date": None} if is_svg else None)


def cubes(run: Run) -> list[Part]:
    """The parts with cubic shapes and without a link, by size."""
    found = (
        part
        for part in run.parts
        if part.shape.m == part.shape.n == part.shape.k and part.link_bits_per_s is None
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


def main(arguments: Sequence[str]) -> int:
    """Draw the run of one file into another."""
    draw(Run.read(Path(arguments[0])), Path(arguments[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
