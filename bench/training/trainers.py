"""Ways to make a training step of the linear layers of a GPT.

Activations and their gradients are random, each layer's its own: only products and
updates are of interest. All ways start from the same weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

import gradwire
from bench.training.sizes import Size
from bench.work import Array
from gradwire_server.backends.numpy import updates

OPTIMIZER = gradwire.AdamW(lr=1e-3)


class Data:
    """X and dY of each layer, and its W at the start: float32."""

    def __init__(self, size: Size, seed: int = 7) -> None:
        rng = np.random.default_rng(seed)

        def normal(rows: int, columns: int) -> Array:
            return rng.standard_normal((rows, columns), dtype=np.float32)

        self.x = [normal(size.rows, n) for n, _ in size.layers]
        self.dy = [normal(size.rows, k) for _, k in size.layers]
        self.w = [normal(n, k) / np.float32(n**0.5) for n, k in size.layers]


class LocalWeights:
    """Weights and states of AdamW in this process."""

    def __init__(self, start: Sequence[Array]) -> None:
        self.w = [w.copy() for w in start]
        self._states = [
            {"exp_avg": np.zeros_like(w), "exp_avg_sq": np.zeros_like(w)}
            for w in self.w
        ]
        self._updates = 0

    def step(self, gradients: list[Array]) -> None:
        """Update all weights, with the arithmetic of gradwire's servers."""
        spec = OPTIMIZER.spec()
        for w, dw, states in zip(self.w, gradients, self._states, strict=True):
            elements = np.ascontiguousarray(dw)
            updates.update(spec, w, elements, states, self._updates)
        self._updates += 1


class Trainer(ABC):
    """One way to make a step."""

    on_call: Callable[[str, int], None] | None = None
    """Called after each call of the SDK, with the method's name and the layer."""

    def __init__(self, data: Data) -> None:
        self.data = data
        self.results: dict[int, tuple[Array, Array]] | None = None
        """If it is a dictionary, Y and dX of each layer are put there."""

    @abstractmethod
    def forward(self, layer: int) -> Array:
        """Y."""

    @abstractmethod
    def backward(self, layer: int) -> Array:
        """dX; dW is kept for `update`."""

    @abstractmethod
    def update(self) -> None:
        """Update all weights."""

    @abstractmethod
    def weight(self, layer: int) -> Array:
        """W as it is now."""

    def step(self) -> None:
        """Forward in order, backward in reverse, and update."""
        y = [self._called("forward", layer) for layer in range(len(self.data.x))]
        for layer in reversed(range(len(y))):
            dx = self._called("backward", layer)
            if self.results is not None:
                self.results[layer] = y[layer], dx
        self.update()

    def close(self) -> None:  # noqa: B027  # there may be nothing to end
        """Release what the server keeps."""

    def _called(self, method: str, layer: int) -> Array:
        result: Array = getattr(self, method)(layer)
        if self.on_call is not None:
            self.on_call(method, layer)
        return result


class Local(Trainer):
    """NumPy in this process.

    Args:
        threads: Threads of BLAS; None: as many as it has.
    """

    def __init__(
        self, data: Data, weights: LocalWeights, threads: int | None = None
    ) -> None:
        super().__init__(data)
        self._weights = weights
        self._threads = threads
        self._dw: list[Any] = [None] * len(data.x)

    def step(self) -> None:
        with threadpool_limits(self._threads):
            super().step()

    def forward(self, layer: int) -> Array:
        y: Array = self.data.x[layer] @ self._weights.w[layer]
        return y

    def backward(self, layer: int) -> Array:
        dy = self.data.dy[layer]
        self._dw[layer] = self.data.x[layer].T @ dy
        dx: Array = dy @ self._weights.w[layer].T
        return dx

    def update(self) -> None:
        self._weights.step(self._dw)

    def weight(self, layer: int) -> Array:
        return self._weights.w[layer]


class Calls(Trainer):
    """gradwire as it was before sessions: W and X go up, dW comes down."""

    def __init__(
        self, data: Data, weights: LocalWeights, client: gradwire.Client
    ) -> None:
        super().__init__(data)
        self._weights = weights
        self._client = client
        self._dw: list[Any] = [None] * len(data.x)

    def forward(self, layer: int) -> Array:
        y: Array = self._client.forward(self.data.x[layer], self._weights.w[layer])
        return y

    def backward(self, layer: int) -> Array:
        data, w = self.data, self._weights.w[layer]
        results = self._client.backward(data.x[layer], w, data.dy[layer])
        dx: Array = results[0]
        self._dw[layer] = results[1]
        return dx

    def update(self) -> None:
        self._weights.step(self._dw)

    def weight(self, layer: int) -> Array:
        return self._weights.w[layer]


class Session(Trainer):
    """gradwire with W, X, dW and AdamW on the server.

    Args:
        wire_dtype: The option of that name.
    """

    def __init__(
        self, data: Data, client: gradwire.Client, wire_dtype: str | None = None
    ) -> None:
        super().__init__(data)
        weights = sum(w.nbytes for w in data.w)
        # W, dW, two states, a copy in 16 bits; X; and the header of each.
        keep = 5 * weights + sum(x.nbytes for x in data.x) + (16 << 20)
        self._forward: Any = {"wire_dtype": wire_dtype} if wire_dtype else {}
        # Gradients stay in float32, as the weights.
        self._backward: Any = {"result_dtype": {"dw": "float32"}} if wire_dtype else {}
        self._session = client.session(keep=keep)
        self._session.open()
        self._w = [self._session.put(w, compute_dtype=wire_dtype) for w in data.w]
        self._dw = [self._session.zeros_like(w) for w in self._w]
        self._contexts: list[Any] = [None] * len(data.x)

    def forward(self, layer: int) -> Array:
        result = self._session.forward(
            self.data.x[layer], self._w[layer], **self._forward
        )
        self._contexts[layer] = result.context
        y: Array = result.y
        return y

    def backward(self, layer: int) -> Array:
        dx: Array = self._session.backward(
            self._contexts[layer],
            self.data.dy[layer],
            into=self._dw[layer],
            **self._backward,
        )
        return dx

    def update(self) -> None:
        self._session.step(OPTIMIZER, dict(zip(self._w, self._dw, strict=True)))

    def weight(self, layer: int) -> Array:
        w: Array = self._session.get(self._w[layer])
        return w

    def close(self) -> None:
        self._session.close()
