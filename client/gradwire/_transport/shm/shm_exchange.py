"""The messages of a job in shared memory, without I/O."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from gradwire._api.errors import ProtocolError
from gradwire._api.types import Receipt, receipt_of
from gradwire._core.acceptance import check_accepted, check_receipt
from gradwire._core.exchange import decode_response
from gradwire._core.job_plan import Plan
from gradwire._core.progress import Reporter
from gradwire._core.sender import WAIT
from gradwire._transport.shm.segments import Segment
from gradwire_protocol import framing
from gradwire_protocol.job_spec import BufferRef
from gradwire_protocol.matrices import Matrix
from gradwire_protocol.v1.job_pb2 import Accepted, Job, Queued
from gradwire_protocol.v1.job_pb2 import Receipt as ReceiptMessage


class ShmExchange:
    """The client's side of a ComputeStream call without chunks.

    Attributes:
        accepted: The server's Accepted, once received.
    """

    def __init__(
        self, plan: Plan, places: Mapping[Matrix, tuple[Segment, int]]
    ) -> None:
        self.accepted: Accepted | None = None
        self._plan = plan
        self._m = plan.m or 0
        self._job = _header(plan, places)
        self._reporter = Reporter(plan)
        self._receipt: ReceiptMessage | None = None

    def opening(self) -> bytes:
        """Return the first message."""
        return framing.encode_job(self._job)

    def messages(self) -> Iterator[bytes]:
        """Yield the other messages."""
        while self.accepted is None:
            yield WAIT
        yield framing.encode_end(self._m)

    def receive(self, message: bytes) -> None:
        """Process a message from the server.

        Raises:
            ProtocolError: The message violates the contract.
        """
        received = decode_response(message, after_receipt=self._receipt is not None)
        if isinstance(received, Queued):
            self._report(jobs_ahead=received.jobs_ahead)
            return
        if isinstance(received, Accepted):
            if self.accepted is not None:
                raise ProtocolError("the server accepted the job twice")
            check_accepted(received, self._job, self._plan)
            self.accepted = received
        elif isinstance(received, ReceiptMessage):
            self._receipt = received
        else:
            raise ProtocolError("the server sent elements of a job in shared memory")
        self._report()

    def finish(self) -> Receipt:
        """Return the receipt, once the server has ended the stream with OK.

        Raises:
            ProtocolError: There is no receipt.
        """
        if self._receipt is None or self.accepted is None:
            raise ProtocolError("the server ended the job without a receipt")
        check_receipt(self._receipt, self._job, self._m)
        return receipt_of(self._receipt, self.accepted)

    def _report(self, jobs_ahead: int | None = None) -> None:
        m, there, done = self._m, self.accepted is not None, self._receipt is not None
        self._reporter.report(
            bytes_sent=self._plan.upload_bytes(m) if there else 0,
            bytes_received=self._plan.download_bytes(m) if done else 0,
            rows_sent=m if there else 0,
            m=m,
            jobs_ahead=jobs_ahead,
        )


def _header(plan: Plan, places: Mapping[Matrix, tuple[Segment, int]]) -> Job:
    tokens: dict[str, int] = {}
    buffers = {
        matrix: BufferRef(tokens.setdefault(region.token, len(tokens)), offset)
        for matrix, (region, offset) in places.items()
    }
    spec = replace(plan.spec(), regions=tuple(tokens), buffers=buffers)
    return spec.to_message(plan.options.job_id)
