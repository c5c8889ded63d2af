# Generated from _async/stream.py by scripts/generate-sync: edit that file.

"""The class `GradientStream`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from gradwire._api.errors import GradwireError, NumericsError, VerificationError
from gradwire._api.types import Receipt, RowBlock
from gradwire._client._sync.engine import SyncEngine
from gradwire._client._sync.row_source import SyncRowSource
from gradwire._client.spread_plan import SpreadPlan
from gradwire._resilience.call_span import callers_context, job_span
from gradwire._resilience.load_balancer import Lease, overtaken_error
from gradwire._resilience.retry import Attempts
from gradwire._resilience.row_reader import RowReader
from gradwire._resilience.stream_job import StreamJob, require_receipt
from gradwire._transport.grpc.sync_call import SyncCall
from gradwire._transport.sync_io import SyncLock, SyncThread, run_beside
from gradwire_protocol.matrices import Matrix

R = TypeVar("R")


class GradientStream(Iterator[RowBlock]):
    """The results of `Client.stream`: an iterator of row blocks.

    `dw` and `receipt` are available once the stream is exhausted. A stream that is
    left early cancels its job: at once as a context manager, else when it is
    garbage collected. Threads may share a stream: each block goes to one of them.

    Example:
        >>> with client.stream(pairs, w) as stream:
        ...     for block in stream:
        ...         print(block.first_row, block.dx.shape)
        >>> stream.dw
    """

    def __init__(
        self,
        engine: SyncEngine,
        rows: Iterable[object],
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
        self._rows = SyncRowSource(rows, self._buffer)
        self._reader = reader
        self._caller = callers_context()
        self._job: StreamJob | None = None
        self._call: SyncCall | None = None
        self._attempts: Attempts | None = None
        self._lease: Lease[SyncEngine] | None = None
        self._over = False
        self._receiving = SyncThread("gradwire-stream-down")
        self._turn = SyncLock()

    def __enter__(self) -> GradientStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> GradientStream:
        return self

    def __next__(self) -> RowBlock:
        """Return the next row block.

        Raises:
            StopIteration: The job is done.
            GradwireError: The job failed.
            BaseException: An exception of the caller's iterable, unchanged.
        """
        with self._turn:
            try:
                while not self._over and not (self._job and self._job.ready):
                    try:
                        self._read(*self._begun())
                    except GradwireError as error:
                        if self._rows.has_raised(error):
                            raise
                        if self._spread is not None and self._job is not None:
                            self._spread.note(self._job.address, error)
                            self._forget(error)
                        if self._lease is not None and self._attempts is not None:
                            self._lease.engine.report(error, self._attempts)
                            self._lease.engine.note_broken(self._job, error)
                        self._release(error)
                        delay_s = self._delay_s(error)
                        if delay_s is None:
                            raise
                        # The job keeps the error, whose frames hold the rows.
                        error.__traceback__ = None
                        self._end_call()
                        self._engine.sleep(delay_s)
            except BaseException as error:
                self._release(error)
                self._end_span(error)
                self.close()
                raise
            if self._job is None or not self._job.ready:
                raise StopIteration
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

    def close(self) -> None:
        """Cancel the job, unless it is done, and yield no more row blocks."""
        self._over = True
        try:
            if self._call is not None:
                self._call.cancel()
        finally:  # also if the caller is cancelled meanwhile
            self._end_direct()
            if self._job is not None:
                self._job.end()
            self._release(GeneratorExit())
            self._end_span(GeneratorExit())
            self._rows.close()

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

    def _begun(self) -> tuple[StreamJob, SyncCall]:
        """Return the job and its call, and begin them if necessary."""
        if self._job is None or self._attempts is None:
            self._rows.fetch(0)
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
            self._lease = self._engine.lease(self._attempts)
        if self._call is None:
            batches = self._rows.batches(self._job.first_row)
            self._call = self._lease.engine.call(self._job, batches, self._attempts)
            if self._over:  # interrupted meanwhile
                self._call.abandon()
        return self._job, self._call

    def _end_call(self) -> None:
        """End the call of a failed attempt."""
        if self._call is not None:
            self._call.cancel()
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
            self._receiving = SyncThread("gradwire-stream-down")

    def _interrupt(self, error: GradwireError) -> None:
        """End the running attempt as if `error` had: the job resumes on its server.

        For `gradwire check`. The rows must be a sequence.
        """
        if self._job is not None and self._attempts is not None:
            self._job.cut_off(error, self._attempts)
            self._end_call()

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

    def _read(self, job: StreamJob, call: SyncCall) -> None:
        direct = job.direct
        if direct is not None and direct.receives:
            frame = self._receiving.run(direct.receive)
            if frame is not None:
                _checked(job, lambda: job.take(frame))
                return
            # The call ends as well, and has the cause.
        try:
            message = next(call)
        except StopIteration:
            if direct is not None:
                direct.require_whole()
            attempts = self._attempts
            if attempts is not None:
                attempts.succeeded()
                receipt = _checked(job, lambda: job.finish(attempts))
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
            _checked(job, lambda: job.receive(message))
            offered = job.exchange.offered is not None
            if offered and self._lease is not None:
                self._lease.engine.open_direct(job, call)


def _checked(job: StreamJob, take: Callable[[], R]) -> R:
    """Take results, which are verified if the caller wants that."""
    if job.check is None:
        return take()
    return run_beside(take)
