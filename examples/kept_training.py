"""Train a wide network with weights that stay on the server.

The same network trains three times, from the same weights and on the same rows: with
local NumPy, with a gradwire server that is sent the weights in every call, and in a
session, where weights, activations, gradients and the optimizer are the server's. A
relay between client and server passes 1 Gbit/s each way.

    .venv/bin/python examples/kept_training.py
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from local_server import local_server
from rich.console import Console
from rich.table import Table

import gradwire

Array = npt.NDArray[Any]

ROOT = Path(__file__).parents[1]
WIDTHS = (2048, 2048, 2048, 2048)
ROWS = 128
STEPS = 5
LINK_BYTES_PER_S = 125e6
OPTIMIZER = gradwire.SGD(lr=1e-3, momentum=0.9)


class Layers(Protocol):
    """The linear layers of a network, wherever they are computed."""

    def forward(self, layer: int, x: Array) -> Array:
        """Y = X W."""

    def backward(self, layer: int, dy: Array) -> Array:
        """The pair's dX = dY Wᵀ; dW = Xᵀ dY is kept for `step`."""

    def step(self) -> None:
        """Gradient descent with momentum."""


class LocalLayers:
    """Layers in this process, whose products a subclass may compute elsewhere."""

    def __init__(self, weights: Sequence[Array]) -> None:
        self._w = [w.copy() for w in weights]
        self._velocity = [np.zeros_like(w) for w in weights]
        self._x: list[Any] = [None] * len(weights)
        self._dw: list[Any] = [None] * len(weights)

    def forward(self, layer: int, x: Array) -> Array:
        """Y = X W."""
        self._x[layer] = x
        return self._product(x, self._w[layer])

    def backward(self, layer: int, dy: Array) -> Array:
        """dX = dY Wᵀ."""
        gradients = self._gradients(self._x[layer], self._w[layer], dy)
        dx, self._dw[layer] = gradients
        return dx

    def step(self) -> None:
        """Gradient descent with momentum."""
        for layer, dw in enumerate(self._dw):
            velocity = OPTIMIZER.momentum * self._velocity[layer] + dw
            self._velocity[layer] = velocity
            self._w[layer] -= OPTIMIZER.lr * velocity

    def _product(self, x: Array, w: Array) -> Array:
        y: Array = x @ w
        return y

    def _gradients(self, x: Array, w: Array, dy: Array) -> tuple[Array, Array]:
        return dy @ w.T, x.T @ dy


class SentLayers(LocalLayers):
    """Layers whose weights are sent to a server in every call."""

    def __init__(self, weights: Sequence[Array], client: gradwire.Client) -> None:
        super().__init__(weights)
        self._client = client
        self.bytes_moved = 0

    def _product(self, x: Array, w: Array) -> Array:
        y: Array = self._client.forward(x, w)
        self.bytes_moved += bytes_of_last_call(self._client)
        return y

    def _gradients(self, x: Array, w: Array, dy: Array) -> tuple[Array, Array]:
        dx, dw = self._client.backward(x, w, dy)
        self.bytes_moved += bytes_of_last_call(self._client)
        return dx, dw


class KeptLayers:
    """Layers whose weights stay in a session."""

    def __init__(
        self,
        weights: Sequence[Array],
        client: gradwire.Client,
        session: gradwire.Session,
    ) -> None:
        self._client, self._session = client, session
        self._w = [session.put(w) for w in weights]
        self._dw = [session.zeros_like(w) for w in self._w]
        self._contexts: list[Any] = [None] * len(weights)
        self.bytes_moved = 0

    def forward(self, layer: int, x: Array) -> Array:
        """Y = X W; X stays on the server."""
        y, self._contexts[layer] = self._session.forward(x, self._w[layer])
        self.bytes_moved += bytes_of_last_call(self._client)
        return y

    def backward(self, layer: int, dy: Array) -> Array:
        """dX = dY Wᵀ; dW stays on the server."""
        context, into = self._contexts[layer], self._dw[layer]
        dx: Array = self._session.backward(context, dy, into=into)
        self.bytes_moved += bytes_of_last_call(self._client)
        return dx

    def step(self) -> None:
        """Gradient descent with momentum, on the server."""
        self._session.step(OPTIMIZER, dict(zip(self._w, self._dw, strict=True)))


def bytes_of_last_call(client: gradwire.Client) -> int:
    """Bytes of the operands and results that were sent."""
    receipt = client.last_receipt
    return receipt.bytes_received + receipt.bytes_sent if receipt else 0


def train(layers: Layers, x: Array, target: Array) -> float:
    """Make one step; return the mean squared error before it."""
    hidden = x
    last = len(WIDTHS) - 2
    positive = []  # where the derivative of each layer's ReLU is 1
    for layer in range(last + 1):
        hidden = layers.forward(layer, hidden)
        positive.append(hidden > 0)
        if layer < last:
            hidden = np.maximum(hidden, 0)
    error = hidden - target
    dy = 2 * error / len(x)
    for layer in range(last, -1, -1):
        dx = layers.backward(layer, dy)
        if layer:
            dy = dx * positive[layer - 1]
    layers.step()
    return float(np.square(error).mean())


@contextlib.contextmanager
def slow_link(address: str) -> Iterator[str]:
    """Put a relay of 1 Gbit/s each way before a server; yield the relay's address."""
    command = [sys.executable, "-m", "bench.links.relay", address]
    with subprocess.Popen(
        [*command, str(LINK_BYTES_PER_S)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as relay:
        try:
            # The relay prints its address, and ends at the end of its input.
            where = relay.stdout.readline().strip() if relay.stdout else ""
            if not where:
                raise RuntimeError(f"no relay: it ended with {relay.wait()}")
            yield where
        finally:
            relay.kill()


def compare(address: str) -> Table:
    """Train in all three ways with a server at `address`, step by step in turns."""
    rng = np.random.default_rng(0)
    weights = [
        rng.normal(0, np.sqrt(2 / n), (n, k)).astype(np.float32)
        for n, k in itertools.pairwise(WIDTHS)
    ]
    x, target = (
        rng.standard_normal((ROWS, columns), np.float32)
        for columns in (WIDTHS[0], WIDTHS[-1])
    )
    with (
        slow_link(address) as link,
        gradwire.connect(link, transport="grpc") as client,
        # Weights, gradients, momentum, and a MiB for each X.
        client.session(keep=3 * sum(w.nbytes for w in weights) + (16 << 20)) as session,
    ):
        ways: dict[str, Any] = {
            "NumPy": LocalLayers(weights),
            "gradwire, weights sent": SentLayers(weights, client),
            "gradwire, weights kept": KeptLayers(weights, client, session),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        losses = {}
        for _ in range(STEPS):
            for name, layers in ways.items():
                began = time.perf_counter()
                losses[name] = train(layers, x, target)
                seconds[name].append(time.perf_counter() - began)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("", "last loss", "MB a step", "ms a step"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, layers in ways.items():
        moved = getattr(layers, "bytes_moved", 0) / STEPS / 1e6
        median_s = statistics.median(seconds[name])
        columns = f"{losses[name]:.6f}", f"{moved:.1f}", f"{median_s * 1e3:.0f}"
        table.add_row(name, *columns)
    return table


def caption() -> str:
    """What the table compares."""
    return (
        f"A wider network ({len(WIDTHS) - 1} layers of {WIDTHS[0]} x {WIDTHS[1]},"
        f" {ROWS} rows a step),\nwith the server behind a relay of 1 Gbit/s each way:"
    )


def main() -> int:
    """Compare the three ways with a server of this program's own."""
    with local_server() as address:
        table = compare(address)
    print(caption())
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
