"""What `AsyncClient.stream` returns."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Iterable,
    Mapping,
)
from typing import TYPE_CHECKING, TypeVar

from gradwire._api.errors import GradwireError, VerificationError
from gradwire._api.types import Array, Receipt, RowBlock
from gradwire._arrays.operand import Operand
from gradwire._client._async.row_source import AsyncRowSource
from gradwire._core.exchange import JobExchange
from gradwire._resilience.load_balancer import Lease
from gradwire._resilience.retry import Attempts
from gradwire._resilience.row_reader import RowReader
from gradwire._resilience.stream_job import StreamJob, require_receipt
from gradwire._transport.grpc.async_call import AsyncCall
from gradwire_protocol.matrices import Matrix

if TYPE_CHECKING:
    from gradwire._client._async.client import AsyncClient


_Taken = TypeVar("_Taken")


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
        self._held = client._held_rows(reader, rows)
        self._rows = AsyncRowSource(rows, self._held)
        self._reader = reader
        self._job: StreamJob | None = None
        self._call: AsyncCall | None = None
        self._attempts: Attempts | None = None
        self._lease: Lease[AsyncClient] | None = None
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
                    try:
                        await self._read(*await self._opened())
                    except GradwireError as error:
                        self._leave(error)
                        delay_s = self._delay_s(error)
                        if delay_s is None:
                            raise
                        await self._again()
                        await self._client._sleep(delay_s)
            except BaseException as error:
                self._leave(error)
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
        await self._rows.aclose()
        if self._job is not None:
            self._job.ready.clear()
        self._leave(GeneratorExit())

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self._leave(GeneratorExit())
            if self._call is not None:
                self._call.abandon()
            self._rows.abandon()

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

    async def _opened(self) -> tuple[StreamJob, AsyncCall]:
        if self._job is None or self._attempts is None:
            await self._rows.draw(0)
            self._attempts = self._client._attempts(self._reader.options)
            self._job = self._client._row_job(self._reader, self._held)
        if self._lease is None:
            self._lease = await self._client._lease(self._attempts)
        if self._call is None:
            job, client = self._job, self._lease.client
            job.address = client.address
            exchange = job.begin()
            portions = self._rows.portions(job.first_row)
            self._call = AsyncCall(
                client._connection(),
                exchange,
                lambda: _messages(job, exchange, portions),
                self._attempts.options(job.options),
            )
        return self._job, self._call

    async def _again(self) -> None:
        """Announce the job anew, where it is."""
        if self._call is not None:
            await self._call.cancel()
        self._call = None

    def _leave(self, error: BaseException | None = None) -> None:
        """The server has the job no more; None: it came to a good end."""
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.ended(error)

    def _delay_s(self, error: GradwireError) -> float | None:
        """When the job goes on after it failed; None: never.

        Raises:
            RowsLostError: It would, but for rows that are held no more.
        """
        if self._attempts is None or self._job is None:
            return None
        if isinstance(error, VerificationError):
            return None  # what was summed of dW so far may be wrong as well
        if self._call is not None and self._job.cut_off(error, self._attempts):
            return 0.0
        delay_s = self._attempts.after(error)
        if delay_s is not None:
            self._job.require_rows(error)
        return delay_s

    async def _read(self, job: StreamJob, call: AsyncCall) -> None:
        try:
            message = await anext(call)
        except StopAsyncIteration:
            attempts = self._attempts
            if attempts is not None:
                attempts.succeeded()
                receipt = await _beside(job, lambda: job.finish(attempts))
                self._client._remember_receipt(receipt)
            self._leave()
            self._over = True
        else:
            await _beside(job, lambda: job.receive(message))


async def _beside(job: StreamJob, take: Callable[[], _Taken]) -> _Taken:
    """Take what came where the event loop's others do not notice, if it is checked."""
    if job.check is None:
        return take()
    return await asyncio.to_thread(take)


async def _messages(
    job: StreamJob,
    exchange: JobExchange,
    portions: AsyncIterator[Mapping[Matrix, Operand]],
) -> AsyncGenerator[bytes]:
    for message in job.opening_messages(exchange):
        yield message
    async for operands in portions:
        for message in exchange.row_messages(operands):
            yield message
    for message in exchange.end_messages():
        yield message
