"""A job on arrays over all of its attempts, without the I/O."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from gradwire._api.errors import GradwireError
from gradwire._api.types import Receipt
from gradwire._arrays.array_sink import ArraySink
from gradwire._arrays.device_copy import HostCopies
from gradwire._arrays.operand import Operand
from gradwire._core.exchange import JobExchange
from gradwire._core.job_plan import Plan
from gradwire._core.outputs import ArrayOutputs
from gradwire._core.resume import (
    ResumePoint,
    made_progress,
    needs_no_checkpoints,
    resume_refused,
)
from gradwire._core.sender import Sender
from gradwire._core.unary import UnaryExchange
from gradwire._integrity.verifier import Computed, Verifier
from gradwire._resilience.retry import Attempts
from gradwire_protocol.matrices import Matrix


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
    ) -> None:
        self.resume_point: ResumePoint | None = None
        """Where the next attempt goes on; None: at the beginning."""
        self._checkpoint_rows = checkpoint_rows
        self._copies = copies
        self.plan = plan
        self.operands = operands
        self.unary = unary
        self.outputs = outputs

    def exchange(self) -> JobExchange:
        """The conversation, as a stream."""
        return JobExchange(
            self.plan,
            Sender(self.plan),
            self._sinks(),
            point=self.resume_point,
            checkpoint_rows=self._checkpoint_rows,
        )

    def cut_off(
        self, exchange: JobExchange, error: GradwireError, attempts: Attempts
    ) -> bool:
        """Take the failure of a stream; whether to begin anew, and at once."""
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

    def unary_exchange(self) -> UnaryExchange:
        """The conversation, as one message each way."""
        return UnaryExchange(self.plan, self.outputs.all())

    def messages(self, exchange: JobExchange) -> Iterator[bytes]:
        """What the stream sends after its opening."""
        return exchange.array_messages(self.operands)

    @property
    def to_verify(self) -> bool:
        """Whether results shall be checked before they are handed back."""
        return bool(self.plan.options.verify)

    def verified(self, receipt: Receipt, address: str) -> Receipt:
        """Results are right, as far as the caller wants that checked.

        Args:
            receipt: What the server said.
            address: Where it was reached.

        Returns:
            The receipt, with that address.

        Raises:
            VerificationError: One is wrong.
        """
        # Should they be wrong, nothing of them is to be gone on with.
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
        """Have results where the caller wants them.

        Returns:
            The receipt, with what was copied from and to a GPU's memory.
        """
        self.outputs.copy_to_devices(self._copies)
        return self._copies.told(receipt)

    def _sinks(self) -> dict[Matrix, ArraySink]:
        return {
            matrix: ArraySink(array, self.plan.result_dtype(matrix))
            for matrix, array in self.outputs.all().items()
        }
