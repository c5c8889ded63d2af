"""The figure of `train_digits`: the trainings side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.gridspec import GridSpec
from matplotlib.ticker import MultipleLocator, PercentFormatter

Array = npt.NDArray[Any]

TEAL, AMBER, GREY, RED = "#0f766e", "#d97706", "#6b7280", "#dc2626"
SHOWN_ROWS, SHOWN_COLUMNS = 4, 12
STYLE = {
    "axes.edgecolor": "#9ca3af",
    "axes.grid": True,
    "axes.labelcolor": "#374151",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "grid.color": "#e5e7eb",
    "legend.frameon": False,
    "xtick.color": "#374151",
    "ytick.color": "#374151",
}


class Training(Protocol):
    """The data of one training in the figure."""

    name: str
    losses: list[float]
    accuracies: list[float]


def draw(
    path: Path,
    runs: Sequence[Training],
    exact: Training,
    held_out: tuple[Array, Array, Array],
) -> None:
    """Write the figure.

    Args:
        path: The PNG file.
        runs: gradwire's training and NumPy's.
        exact: The same training in float64, to show rounding errors.
        held_out: Images, shape (count, 64); their labels; and the answers of
            the network trained with gradwire.
    """
    images, labels, answers = held_out
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(14, 8.4), dpi=120, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
        left, right = figure.subfigures(1, 2, width_ratios=(1, 1.12), wspace=0.03)
        figure.suptitle(
            "Handwritten digits, learned through a gradwire server and with NumPy",
            fontsize=15,
            fontweight="bold",
            x=0.012,
            ha="left",
        )
        curves = left.subplots(3, 1, height_ratios=(1.35, 1, 0.9))
        _losses(curves[0], runs)
        _rounding(curves[1], runs, exact)
        _accuracies(curves[2], runs)
        left.align_ylabels(curves)
        above, below = right.subfigures(2, 1, height_ratios=(1, 1.15))
        _digits(above, images, labels, answers)
        _confusion(below, labels, answers)
        figure.savefig(path)


def _losses(axes: Axes, runs: Sequence[Training]) -> None:
    gradwire, local = runs
    window = len(gradwire.losses) // len(gradwire.accuracies)
    steps = np.arange(window - 1, len(gradwire.losses)) - (window - 1) / 2
    axes.set_title("Loss of each batch, and its mean over an epoch")
    axes.semilogy(gradwire.losses, color=GREY, lw=0.5, alpha=0.5)
    smooth = _mean_over(gradwire.losses, window)
    axes.semilogy(steps, smooth, color=TEAL, lw=6, alpha=0.4, label=gradwire.name)
    smooth = _mean_over(local.losses, window)
    axes.semilogy(steps, smooth, color=AMBER, lw=1.6, label=local.name)
    axes.set_ylabel("cross-entropy")
    axes.legend(loc="upper right")
    axes.margins(x=0.01)


def _mean_over(values: Sequence[float], window: int) -> Array:
    return np.convolve(values, np.full(window, 1 / window), mode="valid")


def _rounding(axes: Axes, runs: Sequence[Training], exact: Training) -> None:
    gradwire, local = (np.array(run.losses) for run in runs)
    between, to_exact = np.abs(gradwire - local), np.abs(local - exact.losses)
    axes.set_title("Difference between the losses")
    axes.semilogy(
        np.where(to_exact > 0, to_exact, np.nan),
        color=GREY,
        lw=0.9,
        label="NumPy in float32 from NumPy in float64",
    )
    if between.any():
        label = f"gradwire from NumPy (at most {between.max():.1e})"
        shown = np.where(between > 0, between, np.nan)
        axes.semilogy(shown, color=TEAL, lw=0, marker=".", ms=3, label=label)
    else:
        label = "gradwire from NumPy: 0 at every step, the same bits"
        axes.plot([], color=TEAL, lw=6, alpha=0.4, label=label)
    axes.set_ylabel("difference")
    axes.legend(loc="lower right")
    axes.margins(x=0.01)
    # Room for the legend under the curves.
    axes.set_ylim(bottom=1e-4 * np.quantile(to_exact[to_exact > 0], 0.02))
    axes.set_xlabel("step")


def _accuracies(axes: Axes, runs: Sequence[Training]) -> None:
    gradwire, local = runs
    epochs = np.arange(1, len(gradwire.accuracies) + 1)
    axes.set_title("Accuracy on held-out digits")
    axes.plot(
        epochs,
        gradwire.accuracies,
        color=TEAL,
        lw=6,
        alpha=0.4,
        label=f"{gradwire.name}: {gradwire.accuracies[-1]:.1%} at the end",
    )
    axes.plot(
        epochs,
        local.accuracies,
        color=AMBER,
        lw=1.6,
        marker=".",
        label=f"{local.name}: {local.accuracies[-1]:.1%} at the end",
    )
    axes.yaxis.set_major_locator(MultipleLocator(0.02))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("epoch")
    axes.legend(loc="lower right")
    axes.margins(x=0.01)


def _digits(figure: SubFigure, images: Array, labels: Array, answers: Array) -> None:
    """Draw mistakes first, then correct answers, up to the size of the grid."""
    wrong = answers != labels
    shown = np.argsort(~wrong, kind="stable")[: SHOWN_ROWS * SHOWN_COLUMNS]
    figure.suptitle(
        f"Held-out digits: the {wrong.sum()} mistakes first, {len(labels)} in all",
        x=0.02,
        ha="left",
        fontsize=11,
        fontweight="bold",
    )
    grid = figure.subplots(
        SHOWN_ROWS, SHOWN_COLUMNS, gridspec_kw={"wspace": 0, "hspace": 0}
    )
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, index in zip(grid.flat, shown, strict=False):
        axes.imshow(images[index].reshape(8, 8), cmap="gray_r", interpolation="nearest")
        if wrong[index]:
            axes.set_title(
                f"{answers[index]}, is {labels[index]}",
                color=RED,
                fontsize=8.5,
                loc="center",
                pad=2,
            )
        else:
            axes.set_title(
                str(answers[index]),
                color=TEAL,
                fontsize=9.5,
                fontweight="normal",
                loc="center",
                pad=2,
            )


def _confusion(figure: SubFigure, labels: Array, answers: Array) -> None:
    counts = np.zeros((10, 10), int)
    np.add.at(counts, (labels, answers), 1)
    axes = figure.add_subplot(GridSpec(1, 1, figure=figure)[0])
    axes.set_title("Answers for the held-out digits")
    axes.grid(visible=False)
    right = np.ma.masked_where(~np.eye(10, dtype=bool), counts)
    wrong = np.ma.masked_where(np.eye(10, dtype=bool) | (counts == 0), counts)
    axes.imshow(right, cmap="GnBu", vmin=-10, vmax=counts.max() * 1.3, aspect="auto")
    axes.imshow(wrong, cmap="Reds", vmin=-1, vmax=4, aspect="auto")
    for row, column in np.argwhere(counts):
        axes.text(
            column, row, str(counts[row, column]), ha="center", va="center", fontsize=9
        )
    axes.set_xticks(range(10))
    axes.set_yticks(range(10))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("the network's answer")
    axes.set_ylabel("the digit")
