"""What a contender is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeAlias

from bench.work import Array, empty_results

Arrays: TypeAlias = tuple[Array, Array, Array]
"""X, W and dY, or Y, dX and dW."""


class Contender(ABC):
    """A way to compute Y, dX and dW, with one call after the other.

    It has two forms, which are never compared with each other. In the `fresh`
    form operands lie in the caller's own arrays, and a call returns arrays
    that no earlier call has returned. In the `reused` form results go where
    they went in the call before: into arrays that are made once, as training
    loops do, and operands lie wherever the contender has its callers put them.
    """

    server_pid: int | None = None
    """The process that computes, where it is not this one."""

    def start(self) -> None:  # noqa: B027  # there may be nothing to start
        """Start the server, if there is one, and connect."""

    @abstractmethod
    def call(self, given: Arrays, *, reused: bool) -> Callable[[], Arrays]:
        """The call that is timed, with all that it needs once made ready."""

    def close(self) -> None:  # noqa: B027  # nor to end
        """End what `start` started. Harmless before it and twice."""


class ArrayContender(Contender):
    """One that reads and writes any arrays of its caller's."""

    @abstractmethod
    def gradients(self, x: Array, w: Array, dy: Array, out: Arrays | None) -> Arrays:
        """Y = X W, dX = dY Wᵀ and dW = Xᵀ dY, in fresh arrays or in `out`."""

    def call(self, given: Arrays, *, reused: bool) -> Callable[[], Arrays]:
        out = empty_results(*given) if reused else None
        return lambda: self.gradients(*given, out)
