"""A job of arrays over all of its attempts, without I/O."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from gradwire._api.errors import GradwireError
from gradwire._api.types import Array, Receipt
from gradwire._arrays.array_sink import ArraySink
from gradwire._arrays.device_copy import HostCopies
from gradwire._arrays.operand import Operand
from gradwire._core.exchange import JobExchange
from gradwire._core.job_plan import Plan, with_rows
from gradwire._core.outputs import ArrayOutputs
from gradwire._core.receiver import Sink
from gradwire._core.resume import (
    ResumePoint,
    made_progress,
    needs_no_checkpoints,
    resume_refused,
    was_too_early,
)
from gradwire._core.sender import Sender
from gradwire._core.unary import UnaryExchange
from gradwire._integrity.verifier import Computed, Verifier
from gradwire._resilience.retry import Attempts
from gradwire_protocol.matrices import Matrix

_log = logging.getLogger("gradwire")


def exclude(unusable: set[str], job_id: str, address: str, why: str) -> None:
    """Give a server no segments of a job, and log it once.

    Args:
        unusable: Addresses of the servers that get none.
        job_id: The job.
        address: The server.
        why: As a sentence.
    """
    if address in unusable:
        return
    unusable.add(address)
    _log.warning(
        "job %s: the server at %s gets no segments: %s",
        job_id,
        address,
        why,
        extra={"job_id": job_id, "server_address": address, "why_no_segments": why},
    )


class ArrayJob:
    """A job whose operands and results are arrays."""

    def __init__(
        self,
        plan: Plan,
        operands: Mapping[Matrix, Operand],
        outputs: ArrayOutputs,
        *,
        unary: bool,
        copies: HostCopies,
        checkpoint_rows: int | None = None,
        early_bytes: int = 0,
    ) -> None:
        self.resume_point: ResumePoint | None = None
        """Where the next attempt resumes; None: at the start."""
        self.on_call: Callable[[Callable[[], object]], object] | None = None
        """Called when a call begins, with a function that cancels it."""
        self._sums_before: list[Mapping[Matrix, Array]] = []
        self._sums_now: list[Mapping[Matrix, Array]] = []
        self._rows_before = 0
        """Rows of the segments that earlier attempts have completed."""
        self.address = ""
        """Address of the server of the current attempt."""
        self.once = False
        """Whether a failed attempt is the last one."""
        self.late = False
        """Whether the job was cancelled because another one has overtaken it."""
        self.unusable: set[str] = set()
        """Addresses of servers not to use."""
        self._checkpoint_rows = checkpoint_rows
        self._early_bytes = early_bytes
        self._copies = copies
        self.plan = plan
        self.operands = operands
        self.unary = unary
        self.outputs = outputs

    def exchange(self, direct: int = 0) -> JobExchange:
        """Create the exchange of a streamed attempt.

        Args:
            direct: Most direct connections.
        """
        self._sums_now = []
        return JobExchange(
            self.plan,
            Sender(self.plan),
            self.sinks(),
            point=self.resume_point,
            checkpoint_rows=self._checkpoint_rows,
            early_bytes=self._early_bytes,
            direct=direct,
            segment_sums=self._sums_now,
        )

    @property
    def segment_sums(self) -> Sequence[Mapping[Matrix, Array]]:
        """The sums of each segment, if the plan wants them."""
        return [*self._sums_before, *self._sums_now]

    def cut_off(
        self, exchange: JobExchange, error: GradwireError, attempts: Attempts
    ) -> bool:
        """Record a failed stream, and return whether to start over immediately."""
        # Another attempt may be refused as well, and need not send rows for nothing.
        early, self._early_bytes = self._early_bytes, 0
        if early and was_too_early(error):
            return True
        if self.plan.segment_rows:
            if self._keep_segments(exchange.complete_segments()):
                attempts.progressed()
            return False
        if self.plan.kept is not None:
            return False  # Kept operands and gradients start over, too.
        before = self.resume_point
        if before is not None and resume_refused(error):
            self.resume_point = None
            return True
        if self._checkpoint_rows == 0 and needs_no_checkpoints(self.plan, error):
            self._checkpoint_rows = None
            return True
        self.resume_point = exchange.resume_point()
        if made_progress(self.resume_point, before):
            attempts.progressed()
        return False

    def _keep_segments(self, count: int) -> bool:
        """Keep what the first segments have, so that the next attempt begins behind.

        Returns:
            Whether there are any.
        """
        plan, rows = self.plan, count * self.plan.segment_rows
        m = plan.m or 0
        if not 0 < rows < m:
            return False
        self._sums_before += self._sums_now[:count]
        self._sums_now = []
        self._rows_before += rows
        self.plan = with_rows(plan, m - rows)
        self.operands = {
            matrix: each if matrix is Matrix.W else each.part(rows, m)
            for matrix, each in self.operands.items()
        }
        return True

    def exclude(self, address: str, error: GradwireError) -> None:
        """Use a server neither for this job nor for others with the same `unusable`."""
        exclude(self.unusable, self.plan.options.job_id, address, str(error))

    def unary_exchange(self) -> UnaryExchange:
        """Create the exchange of an attempt with one message each way."""
        return UnaryExchange(self.plan, self.outputs.all())

    def messages(self, exchange: JobExchange) -> Iterator[bytes]:
        """Yield the messages after the first."""
        for message in exchange.array_messages(self.operands):
            if isinstance(message, bytes):  # frames are sent elsewhere
                yield message

    @property
    def to_verify(self) -> bool:
        """Whether results are checked before they are returned."""
        return bool(self.plan.options.verify)

    def verified(self, receipt: Receipt, address: str) -> Receipt:
        """Check the results, if the caller wants that.

        Args:
            receipt: The server's receipt.
            address: The server's address.

        Returns:
            The receipt, with the address.

        Raises:
            VerificationError: A result is wrong.
        """
        # If a result is wrong, the next attempt must start over.
        self.resume_point = None
        receipt = replace(
            receipt, server_address=address, m=receipt.m + self._rows_before
        )
        if not self.plan.options.verify:
            return receipt
        w = self.operands.get(Matrix.W)
        verifier = Verifier(self.plan, w, self.plan.options.verify)
        by = Computed.of(receipt, address)
        verifier.check_arrays(self.operands, self.outputs.present(), receipt.m, by)
        return replace(receipt, verifying_s=verifier.seconds)

    def deliver(self, receipt: Receipt) -> Receipt:
        """Make the objects that the caller gets from the results.

        Returns:
            The receipt, with the size and time of all copies from and to GPUs.
        """
        self.outputs.deliver(self._copies)
        return self._copies.told(receipt)

    def sinks(self) -> dict[Matrix, Sink]:
        """Make sinks that store the results in the job's arrays."""
        before, sinks = self._rows_before, dict[Matrix, Sink]()
        for matrix, array in self.outputs.all().items():
            missing = array[before:] if before and matrix.row_wise else array
            sinks[matrix] = ArraySink(missing, self.plan.result_dtype(matrix))
        return sinks
