"""What `Client.stream` returns."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from gradwire._api.errors import GradwireError, VerificationError
from gradwire._api.types import Array, Receipt, RowBlock
from gradwire._client._sync.row_source import RowSource
from gradwire._resilience.load_balancer import Lease
from gradwire._resilience.retry import Attempts
from gradwire._resilience.row_reader import RowReader, iterate
from gradwire._resilience.stream_job import StreamJob, require_receipt
from gradwire._transport.grpc.sync_call import Call

if TYPE_CHECKING:
    from gradwire._client._sync.client import Client


class GradientStream(Iterator[RowBlock]):
    """The results of `Client.stream`: an iterator of row blocks.

    Once it is exhausted, `dw` and `receipt` are there. Left early, it
    cancels its job. Threads may share one: each block goes to one of them.

    Example:
        >>> stream = client.stream(pairs, w, results=("dx", "dw"))
        >>> for block in stream:
        ...     print(block.first_row, block.dx.shape)
        >>> stream.dw
    """

    def __init__(
        self, client: Client, rows: Iterable[object], reader: RowReader
    ) -> None:
        self._client = client
        self._held = client._held_rows(reader, rows)
        self._rows = RowSource(iterate(rows), self._held)
        self._reader = reader
        self._job: StreamJob | None = None
        self._call: Call | None = None
        self._attempts: Attempts | None = None
        self._lease: Lease[Client] | None = None
        self._over = False
        self._turn = threading.RLock()

    def __enter__(self) -> GradientStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> GradientStream:
        return self

    def __next__(self) -> RowBlock:
        """The next block of rows.

        Raises:
            StopIteration: The job is done.
            GradwireError: The job failed.
            BaseException: What the caller's iterable raised, unchanged.
        """
        with self._turn:
            try:
                while not self._over and not (self._job and self._job.ready):
                    try:
                        self._read(*self._opened())
                    except GradwireError as error:
                        self._leave(error)
                        delay_s = self._delay_s(error)
                        if delay_s is None:
                            raise
                        self._again()
                        self._client._sleep(delay_s)
            except BaseException as error:
                self._leave(error)
                self.close()
                raise
            if self._job is None or not self._job.ready:
                raise StopIteration
            return self._job.ready.popleft()

    def close(self) -> None:
        """Cancel the job, unless it is done; no more blocks come."""
        self._over = True
        if self._call is not None:
            self._call.cancel()
        if self._job is not None:
            self._job.ready.clear()
        self._leave(GeneratorExit())

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()

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

    def _opened(self) -> tuple[StreamJob, Call]:
        if self._job is None or self._attempts is None:
            self._rows.draw(0)
            self._attempts = self._client._attempts(self._reader.options)
            self._job = self._client._row_job(self._reader, self._held)
        if self._lease is None:
            self._lease = self._client._lease(self._attempts)
        if self._call is None:
            job, client = self._job, self._lease.client
            job.address = client.address
            exchange = job.begin()
            messages = job.messages(self._rows.portions(job.first_row))
            self._call = Call(
                client._connection(),
                exchange,
                lambda: messages,
                self._attempts.options(job.options),
            )
        return self._job, self._call

    def _again(self) -> None:
        """Announce the job anew, where it is."""
        if self._call is not None:
            self._call.cancel()
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

    def _read(self, job: StreamJob, call: Call) -> None:
        try:
            message = next(call)
        except StopIteration:
            if self._attempts is not None:
                self._attempts.succeeded()
                self._client._remember_receipt(job.finish(self._attempts))
            self._leave()
            self._over = True
        else:
            job.receive(message)
