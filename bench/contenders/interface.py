"""What a contender is."""

from __future__ import annotations

from typing import Protocol

from bench.work import Array


class Contender(Protocol):
    """A way to compute Y, dX and dW.

    Every call returns arrays that no earlier call has returned: nothing is
    reused between calls that the caller could see.
    """

    server_pid: int | None
    """The process that computes, where it is not this one."""

    def start(self) -> None:
        """Start the server, if there is one, and connect."""

    def gradients(self, x: Array, w: Array, dy: Array) -> tuple[Array, Array, Array]:
        """Y = X W, dX = dY Wᵀ and dW = Xᵀ dY in fresh arrays."""

    def close(self) -> None:
        """End what `start` started. Harmless before it and twice."""
