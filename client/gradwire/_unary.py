"""A small job in one message each way: the same checks, without a stream."""

from __future__ import annotations

from collections.abc import Mapping

from gradwire._arrays import Operand
from gradwire._exceptions import ProtocolError
from gradwire._exchange import Reporter, check_accepted, check_receipt
from gradwire._plan import Plan
from gradwire._receiving import Sink
from gradwire._types import Receipt, receipt_of
from gradwire.v1.gradient_service_pb2 import ComputeRequest, ComputeResponse
from gradwire.wire.matrices import Matrix

MAX_BYTES = 1 << 20
"""Jobs with more bytes than this in either direction are streamed."""


def fits(plan: Plan) -> bool:
    """Whether a job is small enough to be worth one message each way."""
    return (
        plan.m is not None
        and not plan.options.checksum
        and plan.upload_bytes(plan.m) <= MAX_BYTES
        and plan.download_bytes(plan.m) <= MAX_BYTES
    )


class UnaryExchange:
    """A call of Compute, as its client sees it."""

    def __init__(self, plan: Plan, sinks: Mapping[Matrix, Sink]) -> None:
        self._plan = plan
        self._job = plan.job()
        self._sinks = sinks
        self._reporter = Reporter(plan)

    def request(self, operands: Mapping[Matrix, Operand]) -> ComputeRequest:
        """The message to send."""
        self._report(sent=False, received=0)
        payloads = {
            matrix.label: operand.take(0, operand.rows).tobytes()
            for matrix, operand in operands.items()
        }
        return ComputeRequest(job=self._job, **payloads)

    def receive(self, response: ComputeResponse) -> Receipt:
        """Take the message that came back.

        Raises:
            ProtocolError: It does not answer the request.
        """
        check_accepted(response.accepted, self._job)
        m = self._job.m
        received = 0
        for matrix in Matrix:
            if matrix.label not in response.DESCRIPTOR.fields_by_name:
                continue
            payload = memoryview(getattr(response, matrix.label))
            wanted = matrix in self._sinks
            size = self._plan.size_bytes(matrix, m) if wanted else 0
            if len(payload) != size:
                raise ProtocolError(
                    f"the server sent {len(payload)} bytes of {matrix.label}, which"
                    f" has {size}"
                )
            if wanted:
                self._sinks[matrix].write(payload)
                self._sinks[matrix].close()
            received += size
        check_receipt(response.receipt, self._job, m)
        self._report(sent=True, received=received)
        return receipt_of(response.receipt, response.accepted)

    def _report(self, *, sent: bool, received: int) -> None:
        m = self._job.m
        self._reporter.report(
            bytes_sent=self._plan.upload_bytes(m) if sent else 0,
            bytes_received=received,
            rows_sent=m if sent else 0,
            m=m,
        )
