"""What `AsyncClient.stream` returns."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Iterable,
    Iterator,
)
from typing import TYPE_CHECKING

from gradwire._aio_calls import AsyncCall
from gradwire._rows import RowJob, RowReader, iterate, require_receipt
from gradwire._types import Array, Receipt, RowBlock

if TYPE_CHECKING:
    from gradwire._aio import AsyncClient

_NOTHING = object()


class AsyncGradientStream(AsyncIterator[RowBlock]):
    """The results of `AsyncClient.stream`: an iterator of row blocks.

    Once it is exhausted, `dw` and `receipt` are there. Left early, it
    cancels its job: at once as a context manager, else when it is collected.
    Coroutines may share one: each block goes to one of them.

    Example:
        >>> async with client.stream(pairs, w) as stream:
        ...     async for block in stream:
        ...         print(block.first_row, block.dx.shape)
        >>> stream.dw
    """

    def __init__(
        self,
        client: AsyncClient,
        rows: Iterable[object] | AsyncIterable[object],
        reader: RowReader,
    ) -> None:
        self._client = client
        self._rows = _iterate(rows)
        self._reader = reader
        self._job: RowJob | None = None
        self._call: AsyncCall | None = None
        self._over = False
        self._turn = asyncio.Lock()

    async def __aenter__(self) -> AsyncGradientStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __aiter__(self) -> AsyncGradientStream:
        return self

    async def __anext__(self) -> RowBlock:
        """The next block of rows.

        Raises:
            StopAsyncIteration: The job is done.
            GradwireError: The job failed.
            BaseException: What the caller's iterable raised, unchanged.
        """
        async with self._turn:
            try:
                while not self._over and not (self._job and self._job.ready):
                    await self._read(*await self._opened())
            except BaseException:
                await self.aclose()
                raise
            if self._job is None or not self._job.ready:
                raise StopAsyncIteration
            return self._job.ready.popleft()

    async def aclose(self) -> None:
        """Cancel the job, unless it is done; no more blocks come."""
        self._over = True
        if self._call is not None:
            await self._call.cancel()
        if self._job is not None:
            self._job.ready.clear()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            if self._call is not None:
                self._call.abandon()

    @property
    def dw(self) -> Array | None:
        """DW, shape (n, k), once the stream is exhausted; None if not wanted.

        Raises:
            ClientStateError: It is not exhausted.
        """
        require_receipt(self._job)
        return self._job.dw if self._job else None

    @property
    def receipt(self) -> Receipt:
        """What became of the job, once the stream is exhausted.

        Raises:
            ClientStateError: It is not exhausted.
        """
        return require_receipt(self._job)

    async def _opened(self) -> tuple[RowJob, AsyncCall]:
        if self._job is None or self._call is None:
            item = await anext(self._rows, _NOTHING)
            first = None if item is _NOTHING else self._reader.read(item)
            job = self._client._row_job(self._reader, first)
            rows, reader = self._rows, self._reader
            self._call = AsyncCall(
                self._client._connection(),
                job.exchange,
                lambda: _messages(job, rows, reader),
                job.options,
            )
            self._job = job
        return self._job, self._call

    async def _read(self, job: RowJob, call: AsyncCall) -> None:
        try:
            message = await anext(call)
        except StopAsyncIteration:
            self._client._keep(job.finish())
            self._over = True
        else:
            job.receive(message)


async def _messages(
    job: RowJob, rows: AsyncIterator[object], reader: RowReader
) -> AsyncGenerator[bytes]:
    for message in job.opening_messages():
        yield message
    async for item in rows:
        for message in job.exchange.row_messages(reader.read(item)):
            yield message
    for message in job.exchange.end_messages():
        yield message


def _iterate(rows: Iterable[object] | AsyncIterable[object]) -> AsyncIterator[object]:
    if isinstance(rows, AsyncIterable):
        return aiter(rows)
    return _in_turn(iterate(rows))


async def _in_turn(rows: Iterator[object]) -> AsyncIterator[object]:
    for item in rows:
        yield item
