"""Both clients behind one face, so that a test runs against each."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import gradwire
from gradwire._base import Tuning


class SyncCaller:
    def __init__(self, address: str, **options: Any) -> None:
        self.client = gradwire.connect(address, timeout_s=60, **options)

    def tune(self, **tuning: Any) -> None:
        self.client._tuning = Tuning(**tuning)

    def gradients(self, *args: Any, **options: Any) -> Any:
        return self.client.gradients(*args, **options)

    def forward(self, *args: Any, **options: Any) -> Any:
        return self.client.forward(*args, **options)

    def backward(self, *args: Any, **options: Any) -> Any:
        return self.client.backward(*args, **options)

    def server_info(self) -> Any:
        return self.client.server_info()

    def stream(self, rows: Iterable[Any], *args: Any, **options: Any) -> Any:
        """The row blocks, dW and the receipt."""
        with self.client.stream(rows, *args, **options) as stream:
            blocks = list(stream)
        return blocks, stream.dw, stream.receipt

    def close(self) -> None:
        self.client.close()


class AsyncCaller:
    def __init__(self, address: str, **options: Any) -> None:
        self._runner = asyncio.Runner()
        self.client = gradwire.AsyncClient(address, timeout_s=60, **options)
        self._runner.run(self.client.__aenter__())

    def tune(self, **tuning: Any) -> None:
        self.client._tuning = Tuning(**tuning)

    def gradients(self, *args: Any, **options: Any) -> Any:
        return self._runner.run(self.client.gradients(*args, **options))

    def forward(self, *args: Any, **options: Any) -> Any:
        return self._runner.run(self.client.forward(*args, **options))

    def backward(self, *args: Any, **options: Any) -> Any:
        return self._runner.run(self.client.backward(*args, **options))

    def server_info(self) -> Any:
        return self._runner.run(self.client.server_info())

    def stream(self, rows: Iterable[Any], *args: Any, **options: Any) -> Any:
        async def collect() -> Any:
            async with self.client.stream(rows, *args, **options) as stream:
                blocks = [block async for block in stream]
            return blocks, stream.dw, stream.receipt

        return self._runner.run(collect())

    def close(self) -> None:
        self._runner.run(self.client.close())
        self._runner.close()
