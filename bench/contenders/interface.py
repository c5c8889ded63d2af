"""The interface of a contender."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeAlias

from bench.contenders.server_process import ServerProcess
from bench.work import Array, Shape, empty_results

Arrays: TypeAlias = tuple[Array, Array, Array]
"""X, W and dY, or Y, dX and dW."""


class Contender(ABC):
    """A way to compute Y, dX and dW, with one call after the other.

    There are two forms, never compared with each other. In the `fresh` form,
    operands are in the caller's own arrays, and every call returns new arrays. In
    the `reused` form, results go into the same arrays in every call, as in a
    training loop, and the contender chooses the memory of the operands.
    """

    server: ServerProcess | None = None
    """The server, if the bench has started one."""

    @property
    def server_pid(self) -> int | None:
        """Process id of that server."""
        return None if self.server is None else self.server.pid

    def start(self) -> None:  # noqa: B027  # there may be nothing to start
        """Start the server, if there is one, and connect."""

    @abstractmethod
    def call(self, given: Arrays, *, reused: bool) -> Callable[[], Arrays]:
        """Prepare the timed call, with all its one-time setup done."""

    def check_way(self, shape: Shape) -> None:  # noqa: B027  # most have only one
        """Check that the call before went the way that the contender is named for.

        Raises:
            RuntimeError: It went another way.
        """

    def close(self) -> None:  # noqa: B027  # nor to end
        """Stop everything from `start`. May be called before it and twice."""


class ArrayContender(Contender):
    """A contender that reads and writes any arrays of the caller."""

    @abstractmethod
    def gradients(self, x: Array, w: Array, dy: Array, out: Arrays | None) -> Arrays:
        """Y = X W, dX = dY Wᵀ and dW = Xᵀ dY, in fresh arrays or in `out`."""

    def call(self, given: Arrays, *, reused: bool) -> Callable[[], Arrays]:
        out = empty_results(*given) if reused else None
        return lambda: self.gradients(*given, out)
