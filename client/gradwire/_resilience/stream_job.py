"""A stream's job over all of its attempts, without I/O."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from gradwire._api.errors import ClientStateError, GradwireError, RowsLostError
from gradwire._api.types import Array, Receipt, RowBlock
from gradwire._arrays.array_sink import ArraySink
from gradwire._arrays.device_copy import HostCopies
from gradwire._arrays.operand import Operand
from gradwire._arrays.result_library import ResultLibrary
from gradwire._core.exchange import JobExchange
from gradwire._core.frame import Message
from gradwire._core.job_plan import Plan
from gradwire._core.outputs import output_shape
from gradwire._core.receiver import BlockSink, Sink
from gradwire._core.resume import (
    ResumePoint,
    made_progress,
    needs_no_checkpoints,
    resume_refused,
    was_too_early,
)
from gradwire._core.sender import Sender
from gradwire._integrity.stream_verifier import RowCheck
from gradwire._integrity.verifier import Computed
from gradwire._resilience.replay_buffer import ReplayBuffer
from gradwire._resilience.retry import Attempts
from gradwire._transport.direct.transfer import DirectStream
from gradwire_protocol.matrices import ROW_RESULTS, Matrix


class StreamJob:
    """A job whose rows are sent and received in parts.

        job = StreamJob(plan, w, held)
        exchange = job.begin()
        ... send job.opening_messages(exchange), then the rows from first_row on,
            and pass each received message to receive ...
        receipt = job.finish(), or, after a failure,
        job.cut_off(...), and begin() again

    Attributes:
        exchange: The conversation with the server, that of the last attempt.
        plan: The job's plan.
        options: What the caller asked for.
        ready: Row blocks that are complete and were not handed out yet.
        sums: The wanted results that are summed over row blocks, as NumPy arrays.
        receipt: What became of the job, once it is done.
        address: Of the server of the attempt that runs.
        check: What checks the results before they are handed out, if anything.
    """

    exchange: JobExchange
    direct: DirectStream | None = None
    """The direct connection of the current attempt, if it has one."""
    _sinks: dict[Matrix, Sink]
    _sender: Sender
    _blocks: dict[Matrix, BlockSink]

    def __init__(
        self,
        plan: Plan,
        w: Operand | None,
        held: ReplayBuffer,
        copies: HostCopies | None = None,
        checkpoint_rows: int | None = None,
        *,
        check: RowCheck | None = None,
        library: ResultLibrary | None = None,
        early_bytes: int = 0,
    ) -> None:
        self.check = check
        self._library = library
        self._delivered: dict[Matrix, Any] = {}
        self.address = ""
        self.options = plan.options
        self._copies = copies or HostCopies()
        self.plan = plan
        self._held = held
        self._checkpoint_rows = checkpoint_rows
        self._early_bytes = early_bytes
        self.ready: deque[RowBlock] = deque()
        self._w = w if Matrix.W in plan.operands else None
        self.sums: dict[Matrix, Array] = {
            matrix: np.empty(
                output_shape(plan, {}, matrix), plan.array_dtype(matrix).numpy
            )
            for matrix in plan.sums
        }
        self._next_row = 0
        self._point: ResumePoint | None = None
        self._cause: GradwireError | None = None
        self.receipt: Receipt | None = None

    @property
    def first_row(self) -> int:
        """The first row that the current attempt sends."""
        return self._point.first_row if self._point else 0

    def begin(self, direct: int = 0) -> JobExchange:
        """Begin the next attempt, and return its exchange.

        Args:
            direct: Most direct connections: 0 or 1.
        """
        self.direct = None
        plan = self.plan
        if self._held.complete:
            plan = replace(plan, m=self._held.count)
        self._sender = Sender(plan)
        self._blocks = self._block_sinks(plan)
        sinks: dict[Matrix, Sink] = dict(self._blocks)
        for matrix, array in self.sums.items():
            sinks[matrix] = ArraySink(array, plan.result_dtype(matrix))
        self.exchange = JobExchange(
            plan,
            self._sender,
            sinks,
            point=self._point,
            checkpoint_rows=self._checkpoint_rows,
            early_bytes=self._early_bytes,
            direct=direct,
        )
        self._sinks = sinks
        return self.exchange

    def use_direct(self, direct: DirectStream) -> None:
        """Send and receive the elements of this attempt on a direct connection."""
        self.direct = direct
        direct.begin(self.exchange.use_direct(lambda: self._sinks, in_turn=True))

    def opening_messages(self, exchange: JobExchange) -> Iterator[Message]:
        """Yield the messages before the rows."""
        return exchange.weight_messages(self._w)

    def receive(self, message: bytes) -> None:
        """Process a message from the server; see `JobExchange.receive`.

        Raises:
            VerificationError: The message completes a wrong row block.
        """
        self.exchange.receive(message)
        self._received()

    def take(self, frame: Callable[[], None]) -> None:
        """Process a frame of the direct connection; see `receive`."""
        frame()
        self._received()

    def _received(self) -> None:
        # A matrix without columns has no elements to receive.
        filled = [sink for sink in self._blocks.values() if sink.columns]
        while filled and all(self._next_row in sink.complete for sink in filled):
            self._hand_out(len(filled[0].complete[self._next_row]))
        self._held.discard_before(self._needed_row())
        if self.sums and self._checkpoint_rows is None and self._held.first_available:
            self._held.disable()  # the first rows are needed, and held no more

    def finish(self, attempts: Attempts | None = None) -> Receipt:
        """Finish after the server has ended with OK; see `JobExchange.finish`.

        Raises:
            VerificationError: The last block or a sum is wrong.
        """
        receipt = self.exchange.finish()
        if attempts is not None:
            receipt = attempts.annotate(receipt)
        while self._blocks and self._next_row < receipt.m:
            self._hand_out(min(receipt.block_rows, receipt.m - self._next_row))
        receipt = replace(receipt, server_address=self.address)
        if self.check is not None:
            self.check.finish(self.sums, receipt.m, Computed.of(receipt, self.address))
            receipt = replace(receipt, verifying_s=self.check.seconds)
        self._delivered = {
            matrix: self._converted(array) for matrix, array in self.sums.items()
        }
        receipt = self._copies.told(receipt)
        self.receipt = receipt
        self._held.discard_before(receipt.m)
        return receipt

    def sum(self, matrix: Matrix) -> Any:
        """Return a sum as the caller gets it, once the job is done; None: not wanted.

        Raises:
            ClientStateError: The job is not done.
        """
        require_receipt(self)
        return self._delivered.get(matrix)

    def end(self) -> None:
        """Drop row blocks that nobody will take, and the error that ended the job."""
        self.ready.clear()
        self._cause = None  # its frames refer to the job

    def cut_off(self, error: GradwireError, attempts: Attempts) -> bool:
        """Record a failed attempt, and return whether to start over immediately.

        Raises:
            GradwireError: The server computes other bits, and row blocks were already
                yielded. It is the error of the earlier attempt.
        """
        # Another attempt may be refused as well, and need not send rows for nothing.
        early, self._early_bytes = self._early_bytes, 0
        if early and was_too_early(error) and self._held.has(0):
            return True
        before = self._point
        if before is not None and resume_refused(error):
            if not self._next_row and self._held.has(0):
                self._point = None
                return True
            if self._cause is not None:
                self._cause.add_note(
                    f"The job cannot resume on another server: {error}"
                )
                raise self._cause from error
            return False
        if self._checkpoint_rows is not None and needs_no_checkpoints(self.plan, error):
            self._checkpoint_rows = None
            return True
        self._cause = error
        self._point = self.exchange.resume_point(
            self._next_row if self._blocks else None
        )
        if made_progress(self._point, before):
            attempts.progressed()
        return False

    def require_rows(self, error: GradwireError) -> None:
        """Check that the rows of the next attempt are available.

        Args:
            error: The error of the current attempt.

        Raises:
            RowsLostError: Rows are no longer available.
        """
        first, oldest = self.first_row, self._held.first_available
        if self._held.has(first):
            return
        lost = RowsLostError(
            f"{error}; the job cannot resume, because rows {first} to {oldest - 1} are"
            " needed again and are no longer buffered: give rows as a sequence, which"
            " can be read again, or checkpoint_rows, so that fewer rows are needed, or"
            " RetryPolicy(held_bytes=...), so that more rows are buffered",
            status=error.status,
            job_id=error.job_id,
            details=error.details,
        )
        lost.rows = range(first, oldest)
        raise lost from error

    def _needed_row(self) -> int:
        """Return the first row that a later attempt may have to send."""
        here = self._next_row - self._next_row % self._sender.block_rows
        if not self.sums:
            return here
        sure = self.exchange.committed_rows
        # The checkpoint of a stopping server has at least the rows with results sent.
        only_last = self._checkpoint_rows == 0 and not self._held.has(sure)
        return max(sure, here) if only_last else sure

    def _block_sinks(self, plan: Plan) -> dict[Matrix, BlockSink]:
        return {
            matrix: BlockSink(
                plan.shape(matrix, 0)[1],
                plan.array_dtype(matrix),
                plan.result_dtype(matrix),
                self._sender,
            )
            for matrix in ROW_RESULTS
            if matrix in plan.results
        }

    def _hand_out(self, rows: int) -> None:
        parts = {
            matrix: (
                sink.complete.pop(self._next_row) if sink.columns else sink.empty(rows)
            )
            for matrix, sink in self._blocks.items()
        }
        block = RowBlock(self._next_row, parts.get(Matrix.Y), parts.get(Matrix.DX))
        if self.check is not None and self.exchange.accepted is not None:
            accepted = self.exchange.accepted
            self.check.check(block, Computed.as_accepted(accepted, self.address))
        if self._library is not None:
            y, dx = self._converted(block.y), self._converted(block.dx)
            block = RowBlock(block.first_row, y, dx)
        self.ready.append(block)
        self._next_row += rows

    def _converted(self, array: Array | None) -> Any:
        if array is None or self._library is None:
            return array
        return self._library.converted(array, self._copies)


def require_receipt(job: StreamJob | None) -> Receipt:
    """Return the receipt of a stream's job.

    Raises:
        ClientStateError: The job is not done, or did not begin.
    """
    if job is None or job.receipt is None:
        raise ClientStateError(
            "dw and receipt are available once the stream is exhausted"
        )
    return job.receipt
