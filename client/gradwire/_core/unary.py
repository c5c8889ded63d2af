"""A small job in one message each way, with the same checks as a stream."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gradwire._api.errors import ProtocolError
from gradwire._api.types import Array, Receipt, receipt_of
from gradwire._arrays.operand import Operand
from gradwire._core.acceptance import check_accepted, check_receipt
from gradwire._core.job_plan import Plan
from gradwire._core.progress import Reporter
from gradwire_protocol.limits import MAX_COMPUTE_BYTES, MIB
from gradwire_protocol.matrices import RESULTS, Matrix
from gradwire_protocol.v1.gradient_service_pb2 import ComputeRequest, ComputeResponse

SMALL_BYTES = MIB
"""Most bytes of a small job, in either direction: those of one message of a stream."""


def suits_one_message(plan: Plan) -> bool:
    """Return whether a job shall travel in one message each way.

    That saves a round trip: a stream waits for Accepted. But only a stream sends
    results of the first blocks early, reports progress, and can resume.
    """
    if plan.options.checksum:
        return False
    options, m = plan.options, plan.m or 0
    in_steps = (
        0 < plan.block_rows < m
        or options.on_progress is not None
        or options.checkpoint_rows is not None
    )
    return has_at_most(SMALL_BYTES if in_steps else MAX_COMPUTE_BYTES, plan)


def has_at_most(size_bytes: int, plan: Plan) -> bool:
    """Return whether a job has at most so many bytes of elements in each direction."""
    m = plan.m
    return m is not None and size_bytes >= max(
        plan.upload_bytes(m), plan.download_bytes(m)
    )


class UnaryExchange:
    """The client's side of a Compute call.

    Args:
        plan: The job.
        outputs: Arrays for the results, in any memory layout.
    """

    def __init__(self, plan: Plan, outputs: Mapping[Matrix, Array]) -> None:
        self._plan = plan
        self._job = plan.header()
        self._outputs = outputs
        self._reporter = Reporter(plan)

    def request(self, operands: Mapping[Matrix, Operand]) -> ComputeRequest:
        """Return the request."""
        self._report(sent=False, received=0)
        payloads = {
            matrix.label: operand.take(0, operand.rows).tobytes()
            for matrix, operand in operands.items()
        }
        return ComputeRequest(job=self._job, **payloads)

    def receive(self, response: ComputeResponse) -> Receipt:
        """Store the results of a response.

        Raises:
            ProtocolError: The response does not match the request.
        """
        check_accepted(response.accepted, self._job, self._plan)
        m = self._job.m
        received = 0
        for result in RESULTS:
            payload: bytes = getattr(response, result.label)
            output = self._outputs.get(result)
            size = 0 if output is None else self._plan.size_bytes(result, m)
            if len(payload) != size:
                raise ProtocolError(
                    f"the server sent {len(payload)} bytes of {result.label}:"
                    f" expected {size}"
                )
            if output is not None:
                elements = np.frombuffer(payload, self._plan.result_dtype(result).numpy)
                output[...] = elements.reshape(output.shape)
            received += size
        check_receipt(response.receipt, self._job, m)
        self._report(sent=True, received=received)
        return receipt_of(response.receipt, response.accepted)

    def _report(self, *, sent: bool, received: int) -> None:
        if self._plan.options.on_progress is None:
            return  # Avoids the cost of computing the sizes.
        m = self._job.m
        self._reporter.report(
            bytes_sent=self._plan.upload_bytes(m) if sent else 0,
            bytes_received=received,
            rows_sent=m if sent else 0,
            m=m,
        )
