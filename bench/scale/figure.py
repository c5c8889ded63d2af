"""Figure of the model: speed of a spread job against the number of servers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.scale.command import Points

_COLOURS = ("#9ecae1", "#4292c6", "#2171b5", "#08306b")


def draw(points: Points, path: Path) -> None:
    """Write the figure; the file name's suffix selects the format.

    A panel for each shape and device, a line for each rate.
    """
    # Imported here: only this function needs it.
    import matplotlib as mpl  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    # Makes the file reproducible, and keeps text as text.
    mpl.rcParams.update({"svg.hashsalt": "gradwire", "svg.fonttype": "none"})
    shapes = list(dict.fromkeys(key[0] for key in points))
    devices = list(dict.fromkeys(key[1] for key in points))
    size = (3.2 * len(shapes), 2.8 * len(devices))
    figure: Any = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(devices), len(shapes), squeeze=False, sharex=True)
    for row, device in zip(panels, devices, strict=True):
        for panel, shape in zip(row, shapes, strict=True):
            _panel(panel, points, (shape, device))
            panel.set_title(f"{shape.label}, {device}", fontsize=9)
        row[0].set_ylabel("times one server's speed")
    for panel in panels[-1]:
        panel.set_xlabel("servers")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    is_svg = path.suffix == ".svg"
    figure.savefig(path, dpi=120, metadata={"Date": None} if is_svg else None)


def _panel(panel: Any, points: Points, of: tuple[Any, str]) -> None:
    rates = list(dict.fromkeys(key[3] for key in points))
    for gbits, colour in zip(rates, _COLOURS[-len(rates) :], strict=False):
        line = {
            key[2]: point.gain
            for key, point in points.items()
            if key[:2] == of and key[3] == gbits
        }
        label = f"{gbits:g} Gbit/s"
        panel.plot(*zip(*line.items(), strict=True), "o-", color=colour, label=label)
    panel.set_xscale("log")
    panel.set_ylim(bottom=0)
    panel.axhline(1, color="black", linewidth=0.6)
    panel.grid(visible=True, alpha=0.3)
