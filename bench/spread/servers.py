"""Servers of the parts, and what they and the client use."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import gradwire
from bench.contenders import gradwire_server
from bench.contenders.server_process import ServerProcess, Used
from bench.work import Array, Shape, operands

TIMEOUT_S = 60.0
"""Of a call: longer than any that ends well."""


class Servers:
    """Servers of one kind, each in a process of its own.

    Args:
        stack: Ends them.
        kind: What they are, see `bench.server`.
        count: Number of servers.
        flags: Flags of ``gradwire serve``.
    """

    def __init__(
        self, stack: ExitStack, kind: str, count: int, flags: Sequence[str] = ()
    ) -> None:
        self._kind, self._flags = kind, flags
        self._processes: list[ServerProcess] = []
        stack.callback(self._stop)
        with ThreadPoolExecutor(count) as threads:
            self._processes += threads.map(lambda _: self._start(), range(count))

    def _start(self) -> ServerProcess:
        return gradwire_server.start(self._kind, *self._flags)

    def _stop(self) -> None:
        for each in self._processes:
            each.stop()

    @property
    def addresses(self) -> list[str]:
        return [each.address for each in self._processes]

    def signal(self, number: int, what: signal.Signals) -> None:
        """Send a signal to one of them."""
        os.kill(self._processes[number].pid, what)

    def replace(self, number: int) -> None:
        """Start another one in the place of a server that was killed."""
        self._processes[number].stop()
        self._processes[number] = self._start()

    def used(self) -> Used:
        """What all of them have used so far."""
        return total(each.used() for each in self._processes)


def total(used: Iterable[Used]) -> Used:
    """What several processes have used."""
    every = list(used)
    return Used(sum(each.cpu_s for each in every), sum(each.switches for each in every))


def connect(
    stack: ExitStack, addresses: str | Sequence[str], transport: str
) -> gradwire.Client:
    """Connect a client that ends with `stack`."""
    return stack.enter_context(
        gradwire.connect(addresses, transport=transport, timeout_s=TIMEOUT_S)
    )


class Arrays:
    """Operands of a shape, and arrays for results that calls use in turn."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        x, w, dy = operands(shape)
        self.operands = (x, w, dy)
        self.out: dict[str, Array] = {
            "y": dy.copy(),
            "dx": x.copy(),
            "dw": w.copy(),
        }

    def call(
        self, client: gradwire.Client, *, spread: bool, **options: Any
    ) -> gradwire.Receipt:
        """Compute the results, and return the receipt."""
        result = client.gradients(
            *self.operands, out=self.out, spread=spread, **options
        )
        return result.receipt

    def copies(self) -> dict[str, Array]:
        """Copies of the results."""
        return {name: array.copy() for name, array in self.out.items()}

    def same(self, others: dict[str, Array]) -> bool:
        """Whether the results have the bits of others."""
        return all(
            array.tobytes() == others[name].tobytes()
            for name, array in self.out.items()
        )

    def forget(self) -> None:
        """Overwrite the results."""
        for array in self.out.values():
            array.fill(UNSET)

    def written(self) -> bool:
        """Whether something was written to the results after `forget`."""
        return any((array != UNSET).any() for array in self.out.values())


UNSET = 12345.0

WARM_UP = Shape(30000, 64, 64)
"""Some segments, of more than one message each: a first job makes connections."""

Say = Callable[..., None]
"""Prints the line of a measurement."""
