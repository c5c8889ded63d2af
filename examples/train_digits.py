"""Train a classifier of handwritten digits through a gradwire server.

The example starts a server in a separate process. The server computes every product
and gradient of a two-layer network, one call over a socket each. The same network
trains with local NumPy, from the same weights and on the same batches. A figure
compares the two. Then `kept_training` shows a few steps of a wider network, whose
weights stay on the server.

    .venv/bin/python examples/train_digits.py
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from digits_figure import draw
from kept_training import caption, compare
from local_server import local_server
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.datasets import load_digits

import gradwire

Array = npt.NDArray[Any]

HIDDEN = 128
BATCH = 64
LEARNING_RATE = 0.1
MOMENTUM = 0.9
HELD_OUT = 360
LEAST_ACCURACY = 0.95


class Products(Protocol):
    """The interface for products, implemented by `gradwire.Client`."""

    def forward(self, x: Array, w: Array) -> Array:
        """Y = X W."""

    def backward(self, x: Array, w: Array, dy: Array) -> tuple[Array, Array]:
        """The pair dX = dY Wᵀ, dW = Xᵀ dY."""


class NumpyProducts:
    """The same products with NumPy, in this process."""

    def forward(self, x: Array, w: Array) -> Array:
        """Y = X W."""
        return x @ w

    def backward(self, x: Array, w: Array, dy: Array) -> tuple[Array, Array]:
        """The pair dX = dY Wᵀ, dW = Xᵀ dY."""
        return dy @ w.T, x.T @ dy


class Linear:
    """A layer y = [x 1] w: the last row of w is the bias.

    The gradient of the bias is then the last row of dW, so the layer needs only the
    three products.
    """

    def __init__(self, w: Array, products: Products) -> None:
        self.w = w.copy()
        self.products = products
        self._velocity = np.zeros_like(w)

    def forward(self, x: Array) -> Array:
        """The layer's output for x, shape (rows, inputs)."""
        self._x = np.ones((len(x), len(self.w)), self.w.dtype)
        self._x[:, :-1] = x
        return self.products.forward(self._x, self.w)

    def backward(self, dy: Array) -> Array:
        """The gradient for the input, from the gradient for the output."""
        dx, self._dw = self.products.backward(self._x, self.w, dy)
        return dx[:, :-1]

    def step(self) -> None:
        """Gradient descent with momentum."""
        self._velocity = MOMENTUM * self._velocity - LEARNING_RATE * self._dw
        self.w += self._velocity


class Classifier:
    """Two layers with a ReLU between, and softmax cross-entropy at the end."""

    def __init__(self, weights: tuple[Array, Array], products: Products) -> None:
        self._first, self._second = (Linear(w, products) for w in weights)

    def logits(self, x: Array) -> Array:
        """Shape (rows, classes); the largest of a row is the answer."""
        self._hidden = np.maximum(self._first.forward(x), 0)
        return self._second.forward(self._hidden)

    def train(self, x: Array, labels: Array) -> float:
        """Train on one batch, and return its mean loss before the step."""
        logits = self.logits(x)
        logits -= logits.max(axis=1, keepdims=True)
        p = np.exp(logits)
        p /= p.sum(axis=1, keepdims=True)
        rows = np.arange(len(x))
        loss = -np.log(p[rows, labels]).mean()
        # The gradient of the mean cross-entropy is (p - one_hot) / rows.
        p[rows, labels] -= 1
        d_hidden = self._second.backward(p / len(x))
        self._first.backward(d_hidden * (self._hidden > 0))
        self._first.step()
        self._second.step()
        return float(loss)


@dataclass
class Run:
    """One of the trainings, with its losses and accuracies so far."""

    name: str
    model: Classifier
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def train(self, x: Array, labels: Array) -> None:
        """Train on one batch."""
        began = time.perf_counter()
        self.losses.append(self.model.train(x, labels))
        self.seconds += time.perf_counter() - began

    def answers(self, x: Array) -> Array:
        """The network's answer for each row."""
        return self.model.logits(x).argmax(axis=1)


@dataclass(frozen=True)
class Digits:
    """Images of 8 x 8 pixels as rows of 64 numbers from 0 to 1."""

    x: Array
    labels: Array
    held_out_x: Array
    held_out_labels: Array

    @classmethod
    def load(cls, rng: np.random.Generator) -> Digits:
        """Load scikit-learn's digits, shuffled and split."""
        x, labels = load_digits(return_X_y=True)
        order = rng.permutation(len(x))
        x, labels = (x[order] / 16).astype(np.float32), labels[order]
        return cls(x[HELD_OUT:], labels[HELD_OUT:], x[:HELD_OUT], labels[:HELD_OUT])


def initial_weights(rng: np.random.Generator) -> tuple[Array, Array]:
    """He initialization, with zero bias."""

    def layer(inputs: int, outputs: int) -> Array:
        w = rng.normal(0, np.sqrt(2 / inputs), (inputs + 1, outputs))
        w[-1] = 0
        return w.astype(np.float32)

    return layer(64, HIDDEN), layer(HIDDEN, 10)


def doubled(weights: tuple[Array, Array]) -> tuple[Array, Array]:
    """The same weights in float64."""
    first, second = weights
    return first.astype(np.float64), second.astype(np.float64)


def train(runs: list[Run], digits: Digits, epochs: int, rng: Any) -> None:
    """Train all runs together, batch by batch, with a progress bar."""
    columns = (
        TextColumn("epoch {task.fields[epoch]:>3}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  held out {task.fields[seen]:.1%}"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    batches = range(0, len(digits.x), BATCH)
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(
            "", total=epochs * len(batches), epoch=0, loss=np.nan, seen=0
        )
        for epoch in range(1, epochs + 1):
            order = rng.permutation(len(digits.x))
            for start in batches:
                batch = order[start : start + BATCH]
                for run in runs:
                    run.train(digits.x[batch], digits.labels[batch])
                progress.update(bar, advance=1, loss=runs[0].losses[-1], epoch=epoch)
            for run in runs:
                right = run.answers(digits.held_out_x) == digits.held_out_labels
                run.accuracies.append(right.mean())
            progress.update(bar, seen=runs[0].accuracies[-1])


def summary(runs: list[Run]) -> Table:
    """The two runs side by side."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("", "held-out accuracy", "last loss", "seconds", "ms a step"):
        table.add_column(heading, justify="right" if heading else "left")
    for run in runs:
        table.add_row(
            run.name,
            f"{run.accuracies[-1]:.1%}",
            f"{run.losses[-1]:.6f}",
            f"{run.seconds:.1f}",
            f"{run.seconds / len(run.losses) * 1e3:.2f}",
        )
    return table


def main() -> int:
    """Train, compare, draw. The status is 0 if both are accurate enough."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    options = parser.parse_args()

    rng = np.random.default_rng(0)
    digits, weights = Digits.load(rng), initial_weights(rng)
    with local_server() as address, gradwire.connect(address) as client:
        device = client.server_info().devices[0]
        print(f"A gradwire server computes at {address} ({device.backend}).")
        runs = [
            Run("gradwire", Classifier(weights, client)),
            Run("NumPy", Classifier(weights, NumpyProducts())),
        ]
        # Only for the figure: shows the rounding error of float32.
        exact = Run("NumPy, float64", Classifier(doubled(weights), NumpyProducts()))
        train([*runs, exact], digits, options.epochs, rng)
        answers = runs[0].answers(digits.held_out_x)
        wide = compare(address)

    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "train_digits.png"
    draw(path, runs, exact, (digits.held_out_x, digits.held_out_labels, answers))
    difference = max(abs(a - b) for a, b in zip(*(r.losses for r in runs), strict=True))
    Console().print(summary(runs))
    same = " (the same bits)" if difference == 0 else ""
    print(f"Largest difference between their losses: {difference:.1e}{same}")
    print(f"Figure: {path}\n\n{caption()}")
    Console().print(wide)
    worst = min(run.accuracies[-1] for run in runs)
    if worst < LEAST_ACCURACY:
        print(f"{worst:.1%} is less than {LEAST_ACCURACY:.0%}.", file=sys.stderr)
    return int(worst < LEAST_ACCURACY)


if __name__ == "__main__":
    sys.exit(main())
