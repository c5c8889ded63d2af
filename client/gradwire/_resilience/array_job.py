"""A job of arrays over all of its attempts, without I/O."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from gradwire._api.errors import GradwireError
from gradwire._api.types import Receipt
from gradwire._arrays.array_sink import ArraySink
from gradwire._arrays.device_copy import HostCopies
from gradwire._arrays.operand import Operand
from gradwire._core.direct_exchange import RowSource
from gradwire._core.exchange import JobExchange
from gradwire._core.job_plan import Plan
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
        self.wake: Callable[[], object] = _do_nothing
        """Has the call of the current attempt ask for messages again."""
        self.waits = False
        """Whether the call waits for that."""
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
        return JobExchange(
            self.plan,
            Sender(self.plan),
            self.sinks(),
            point=self.resume_point,
            checkpoint_rows=self._checkpoint_rows,
            early_bytes=self._early_bytes,
            direct=direct,
        )

    @property
    def whole(self) -> Plan:
        """The plan that decides how the elements travel."""
        return self.plan

    @property
    def source(self) -> RowSource | None:
        """Where the rows come from, if not from the operands."""
        return None

    def interrupt(self) -> None:
        """Have the source wait for rows no longer, from any thread."""

    def was_too_early(self, error: GradwireError) -> bool:
        """Return whether the attempt has only sent rows too early; none will again.

        Another attempt may be refused as well, and need not send rows for nothing.
        """
        early, self._early_bytes = self._early_bytes, 0
        return bool(early) and was_too_early(error)

    def cut_off(
        self, exchange: JobExchange, error: GradwireError, attempts: Attempts
    ) -> bool:
        """Record a failed stream, and return whether to start over immediately."""
        if self.was_too_early(error):
            return True
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
        receipt = replace(receipt, server_address=address)
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

    def detach(self) -> None:
        """Refer no more to calls: results would live as long as those."""
        self.on_call, self.wake = None, _do_nothing

    def sinks(self) -> dict[Matrix, Sink]:
        """Make sinks that store the results in the job's arrays."""
        return {
            matrix: ArraySink(array, self.plan.result_dtype(matrix))
            for matrix, array in self.outputs.all().items()
        }


def _do_nothing() -> None:
    pass
