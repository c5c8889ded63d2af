"""A job on arrays over all of its attempts, without the I/O."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from gradwire._api.errors import GradwireError
from gradwire._api.types import Array, Receipt
from gradwire._arrays.buffer_pool import ResultPool
from gradwire._arrays.device_copy import HostCopies, is_on_device, to_device
from gradwire._arrays.operand import Operand
from gradwire._core.exchange import JobExchange
from gradwire._core.job_plan import Plan
from gradwire._core.outputs import ArraySink, Output, handed_back, output_shape
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
        given: Mapping[Matrix, Output],
        *,
        unary: bool,
        memory: ResultPool,
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
        self._memory = memory
        self._outputs = dict(given)

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
        return UnaryExchange(self.plan, self._made_outputs())

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
        verifier.check_arrays(self.operands, self.present_outputs(), receipt.m, by)
        return replace(receipt, verifying_s=verifier.seconds)

    def delivered(self, receipt: Receipt) -> Receipt:
        """Results are where the caller wants them; what became of the job.

        Those for which `out` has an array in a GPU's memory are copied there.
        """
        for output in self._outputs.values():
            if is_on_device(output.handed_back):
                with self._copies.copying():
                    to_device(output.array, output.handed_back)
                self._copies.size_bytes += output.array.nbytes
        return self._copies.told(receipt)

    def results(self, *wanted: Matrix) -> list[Any]:
        """What the caller gets of these, None for those it did not want."""
        return handed_back(self._outputs, wanted)

    def present_outputs(self) -> dict[Matrix, Array]:
        """The results' arrays that are there already."""
        return {matrix: output.array for matrix, output in self._outputs.items()}

    def hand_back(self, matrix: Matrix, elements: Array) -> None:
        """Make a result that has no array yet of these elements."""
        shape = output_shape(self.plan, self.operands, matrix)
        array = elements.reshape(shape)
        self._outputs[matrix] = Output(array, array)

    def _sinks(self) -> dict[Matrix, ArraySink]:
        return {
            matrix: ArraySink(array, self.plan.result_dtype(matrix))
            for matrix, array in self._made_outputs().items()
        }

    def _made_outputs(self) -> dict[Matrix, Array]:
        """All results' arrays; they are made for those that have none."""
        for matrix in self.plan.results:
            if matrix not in self._outputs:
                shape = output_shape(self.plan, self.operands, matrix)
                dtype = self.plan.array_dtype(matrix).numpy
                array = self._memory.empty(shape, dtype)
                self._outputs[matrix] = Output(array, array)
        return self.present_outputs()
