"""NumPy in the caller's own process: the yardstick, with no transport."""

from __future__ import annotations

from bench.work import Array


class LocalNumpy:
    """Three products, three new arrays."""

    server_pid: int | None = None

    def start(self) -> None:
        pass

    def gradients(self, x: Array, w: Array, dy: Array) -> tuple[Array, Array, Array]:
        return x @ w, dy @ w.T, x.T @ dy

    def close(self) -> None:
        pass


create = LocalNumpy
