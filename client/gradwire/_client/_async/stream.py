"""The class `AsyncGradientStream`."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Sequence
from typing import Any, TypeVar

from gradwire._api.errors import GradwireError, NumericsError, VerificationError
from gradwire._api.types import Receipt, RowBlock
from gradwire._client._async.engine import AsyncEngine
from gradwire._client._async.row_source import AsyncRowSource
from gradwire._client.spread_plan import SpreadPlan
from gradwire._resilience.call_span import callers_context, job_span
from gradwire._resilience.load_balancer import Lease, overtaken_error
from gradwire._resilience.retry import Attempts
from gradwire._resilience.row_reader import RowReader
from gradwire._resilience.stream_job import StreamJob, require_receipt
from gradwire._transport.async_io import AsyncLock, AsyncThread, run_beside
from gradwire._transport.grpc.async_call import AsyncCall
from gradwire_protocol.matrices import Matrix

R = TypeVar("R")


class AsyncGradientStream(AsyncIterator[RowBlock]):
    """The results of `AsyncClient.stream`: an iterator of row blocks.

    `dw` and `receipt` are available once the stream is exhausted. A stream that is
    left early cancels its job: at once as a context manager, else when it is
    garbage collected. Coroutines may share a stream: each block goes to one of them.

    Example:
        >>> async with client.stream(pairs, w) as stream:
        ...     async for block in stream:
        ...         print(block.first_row, block.dx.shape)
        >>> stream.dw
    """

    def __init__(
        self,
        engine: AsyncEngine,
        rows: Iterable[object] | AsyncIterable[object],
        reader: RowReader,
        remember: Callable[[Receipt], Receipt],
        *,
        again: Sequence[object] | None = None,
        spread: SpreadPlan | None = None,
    ) -> None:
        self._engine = engine
        self._remember = remember
        self._spread = spread
        self._buffer = engine.jobs.replay_buffer(reader, rows, again)
        self._rows = AsyncRowSource(rows, self._buffer)
        self._reader = reader
        self._caller = callers_context()
        self._job: StreamJob | None = None
        self._call: AsyncCall | None = None
        self._attempts: Attempts | None = None
        self._lease: Lease[AsyncEngine] | None = None
        self._over = False
        self._receiving = AsyncThread("gradwire-stream-down")
        self._turn = AsyncLock()

    async def __aenter__(self) -> AsyncGradientStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __aiter__(self) -> AsyncGradientStream:
        return self

    async def __anext__(self) -> RowBlock:
        """Return the next row block.

        Raises:
            StopAsyncIteration: The job is done.
            GradwireError: The job failed.
            BaseException: An exception of the caller's iterable, unchanged.
        """
        async with self._turn:
            try:
                while not self._over and not (self._job and self._job.ready):
                    try:
                        await self._read(*await self._begun())
                    except GradwireError as error:
                        if self._rows.has_raised(error):
                            raise
                        if self._spread is not None and self._job is not None:
                            self._spread.note(self._job.address, error)
                            self._forget(error)
                        if self._lease is not None and self._attempts is not None:
                            await self._lease.engine.report(error, self._attempts)
                            self._lease.engine.note_broken(self._job, error)
                        self._release(error)
                        delay_s = self._delay_s(error)
                        if delay_s is None:
                            raise
                        # The job keeps the error, whose frames hold the rows.
                        error.__traceback__ = None
                        await self._end_call()
                        await self._engine.sleep(delay_s)
            except BaseException as error:
                self._release(error)
                self._end_span(error)
                await self.aclose()
                raise
            if self._job is None or not self._job.ready:
                raise StopAsyncIteration
            return self._job.ready.popleft()

    def interrupt(self) -> None:
        """Cancel the job while another thread or coroutine waits for its results."""
        self._over = True
        if self._call is not None:
            self._call.abandon()

    def move_elsewhere(self) -> None:
        """End the running attempt, because its server is late: the job resumes.

        While another thread or coroutine waits for its results.
        """
        if self._call is not None and self._job is not None:
            self._call.fail(overtaken_error(self._job.address))

    async def aclose(self) -> None:
        """Cancel the job, unless it is done, and yield no more row blocks."""
        self._over = True
        try:
            if self._call is not None:
                await self._call.cancel()
        finally:  # also if the caller is cancelled meanwhile
            self._end_direct()
            if self._job is not None:
                self._job.end()
            self._release(GeneratorExit())
            self._end_span(GeneratorExit())
            await self._rows.aclose()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self._release(GeneratorExit())
            self._end_span(GeneratorExit())
            if self._call is not None:
                self._call.abandon()
            self._end_direct()
            self._rows.abandon()

    @property
    def dw(self) -> Any:
        """DW, shape (n, k), once the stream is exhausted; None if not wanted.

        Raises:
            ClientStateError: The stream is not exhausted.
        """
        require_receipt(self._job)
        return self._job.sum(Matrix.DW) if self._job else None

    @property
    def db(self) -> Any:
        """The column sums of dY, shape (k,), like `dw`.

        Raises:
            ClientStateError: The stream is not exhausted.
        """
        require_receipt(self._job)
        return self._job.sum(Matrix.DB) if self._job else None

    @property
    def receipt(self) -> Receipt:
        """The job's receipt, once the stream is exhausted.

        Raises:
            ClientStateError: The stream is not exhausted.
        """
        return require_receipt(self._job)

    async def _begun(self) -> tuple[StreamJob, AsyncCall]:
        """Return the job and its call, and begin them if necessary."""
        if self._job is None or self._attempts is None:
            await self._rows.fetch(0)
            job = self._engine.jobs.stream_job(self._reader, self._buffer)
            options = job.options
            span = job_span(
                job.plan, options.metadata, unary=False, context=self._caller
            )
            self._attempts = self._engine.attempts(options, span)
            if self._spread is not None:
                self._attempts.unusable = self._spread.unusable
            self._job = job
        if self._lease is None:
            self._lease = await self._engine.lease(self._attempts)
        if self._call is None:
            batches = self._rows.batches(self._job.first_row)
            self._call = self._lease.engine.call(self._job, batches, self._attempts)
            if self._over:  # interrupted meanwhile
                self._call.abandon()
        return self._job, self._call

    async def _end_call(self) -> None:
        """End the call of a failed attempt."""
        if self._call is not None:
            await self._call.cancel()
        self._call = None
        self._end_direct()

    def _end_direct(self) -> None:
        """End the use of the direct connection, also in a thread that sends.

        After the call has ended: the server would take this for its cause.
        """
        if self._job is not None and self._job.direct is not None:
            self._job.direct.interrupt()
            self._job.direct = None
            self._receiving.close()
            self._receiving = AsyncThread("gradwire-stream-down")

    async def _interrupt(self, error: GradwireError) -> None:
        """End the running attempt as if `error` had: the job resumes on its server.

        For `gradwire check`. The rows must be a sequence.
        """
        if self._job is not None and self._attempts is not None:
            self._job.cut_off(error, self._attempts)
            await self._end_call()

    def _release(self, error: BaseException | None = None) -> None:
        """Release the server, with the error of the attempt, if any."""
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.ended(error)

    def _forget(self, error: GradwireError) -> None:
        """Have a server asked about itself once more that has other numerics now."""
        if isinstance(error, NumericsError) and self._lease is not None:
            self._lease.engine.info = None

    def _end_span(self, error: BaseException | None = None) -> None:
        """End the span, with the error of the stream, if any."""
        if self._attempts is not None:
            self._attempts.ended(error)

    def _delay_s(self, error: GradwireError) -> float | None:
        """Return the seconds until the next attempt after a failure; None: no attempt.

        Raises:
            RowsLostError: The next attempt needs rows that are no longer buffered.
        """
        if self._attempts is None or self._job is None:
            return None
        if isinstance(error, VerificationError):
            return None  # the sums of dW so far may be wrong as well
        if self._call is not None and self._job.cut_off(error, self._attempts):
            return 0.0
        delay_s = self._attempts.after(error)
        if delay_s is not None:
            self._job.require_rows(error)
        return delay_s

    async def _read(self, job: StreamJob, call: AsyncCall) -> None:
        direct = job.direct
        if direct is not None and direct.receives:
            frame = await self._receiving.run(direct.receive)
            if frame is not None:
                await _checked(job, lambda: job.take(frame))
                return
            # The call ends as well, and has the cause.
        try:
            message = await anext(call)
        except StopAsyncIteration:
            if direct is not None:
                direct.require_whole()
            attempts = self._attempts
            if attempts is not None:
                attempts.succeeded()
                receipt = await _checked(job, lambda: job.finish(attempts))
                if attempts.span is not None:
                    attempts.span.computed(receipt)
                    attempts.ended()
                self._remember(receipt)
                if self._lease is not None:
                    self._lease.engine.keep_direct(job, receipt)
                self._receiving.close()
            self._release()
            self._over = True
        else:
            await _checked(job, lambda: job.receive(message))
            offered = job.exchange.offered is not None
            if offered and self._lease is not None:
                await self._lease.engine.open_direct(job, call)


async def _checked(job: StreamJob, take: Callable[[], R]) -> R:
    """Take results; verifying them happens beside the event loop."""
    if job.check is None:
        return take()
    return await run_beside(take)
