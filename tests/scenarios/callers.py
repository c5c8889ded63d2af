"""Both clients behind one face, so that a test runs against each."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from tests.scenarios.ways import Way
from tests.support.serving import ServerProcess


class Caller:
    """A client of a server, and the way that its jobs take."""

    def __init__(self, way: Way, server: ServerProcess) -> None:
        self.way = way
        self.server = server
        self.client: Any = None

    def run(self, called: Any) -> Any:
        """What a method of the client gives in the end."""
        raise NotImplementedError

    def tune(self, **tuning: Any) -> None:
        """Has jobs cut into other messages; without arguments, as ever."""
        self.client._engine.jobs.tuning = self.way.tuning(**tuning)

    def empty(self, shape: Any, dtype: Any = np.float32) -> Any:
        """An array as this way's callers have them."""
        if self.way.inside:
            return self.run(self.client.empty(shape, dtype))
        return np.empty(shape, dtype)

    def placed(self, operand: Any) -> Any:
        """An operand where this way's callers have it.

        What the client could not hand out stays as it is.
        """
        if not (
            self.way.inside
            and type(operand) is np.ndarray
            and operand.flags.c_contiguous
            and operand.flags.writeable
            and operand.dtype.isnative
            and operand.dtype.kind in "fV"
        ):
            return operand
        placed = self.empty(operand.shape, operand.dtype)
        placed[...] = operand
        return placed

    def gradients(self, *operands: Any, **options: Any) -> Any:
        result = self.run(self.client.gradients(*map(self.placed, operands), **options))
        self.way.arrived(result.receipt, checksum=options.get("checksum", False))
        return result

    def forward(self, *operands: Any, **options: Any) -> Any:
        return self.run(self.client.forward(*map(self.placed, operands), **options))

    def backward(self, *operands: Any, **options: Any) -> Any:
        result = self.run(self.client.backward(*map(self.placed, operands), **options))
        self.way.arrived(result.receipt)
        return result

    def server_info(self) -> Any:
        return self.run(self.client.server_info())

    def stream(self, rows: Iterable[Any], *args: Any, **options: Any) -> Any:
        """The row blocks, dW and the receipt."""
        raise NotImplementedError

    def close(self) -> None:
        self.run(self.client.close())


class SyncCaller(Caller):
    def __init__(
        self, way: Way, server: ServerProcess, runner: asyncio.Runner | None = None
    ) -> None:
        super().__init__(way, server)
        self.client = way.connect(server)

    def run(self, called: Any) -> Any:
        return called

    def stream(self, rows: Iterable[Any], *args: Any, **options: Any) -> Any:
        with self.client.stream(rows, *args, **options) as stream:
            blocks = list(stream)
        return blocks, stream.dw, stream.receipt


class AsyncCaller(Caller):
    def __init__(
        self, way: Way, server: ServerProcess, runner: asyncio.Runner | None = None
    ) -> None:
        super().__init__(way, server)
        self._own_runner = runner is None
        self._runner = runner or asyncio.Runner()
        self.client = way.async_client(server)
        self.run(self.client.__aenter__())

    def run(self, called: Any) -> Any:
        return self._runner.run(called)

    def close(self) -> None:
        super().close()
        if self._own_runner:
            self._runner.close()

    def stream(self, rows: Iterable[Any], *args: Any, **options: Any) -> Any:
        async def collect() -> Any:
            async with self.client.stream(rows, *args, **options) as stream:
                blocks = [block async for block in stream]
            return blocks, stream.dw, stream.receipt

        return self.run(collect())


CALLERS: Mapping[str, type[Caller]] = {"sync": SyncCaller, "async": AsyncCaller}
