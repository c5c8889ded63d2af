"""A job in shared memory: where its matrices lie, and its conversation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from gradwire._api.errors import CallError, ProtocolError
from gradwire._api.types import Array, Receipt, receipt_of
from gradwire._core.acceptance import check_accepted, check_receipt
from gradwire._core.job_plan import Plan
from gradwire._core.progress import Reporter
from gradwire._transport.shm.segments import Allocation, Pool, Segment
from gradwire_protocol import framing
from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.job_spec import BufferRef
from gradwire_protocol.matrices import Matrix
from gradwire_protocol.v1.job_pb2 import Accepted, Job, Queued
from gradwire_protocol.v1.job_pb2 import Receipt as ReceiptMessage

if TYPE_CHECKING:
    from gradwire._resilience.array_job import ArrayJob


class ShmJob:
    """Places for a job's matrices in a client's regions.

    Operands and results that lie there are used where they are; for the
    others room is needed, out of which results without an array of the
    caller's are handed back.

        shared = SharedJob(job, pool)
        shared.place(rooms of shared.sizes)
        shared.copy_in()
        ... run shared.exchange() ...
        shared.copy_out()

    Attributes:
        sizes: Bytes of the room that is needed, by matrix.
        at_risk: Whether the server may still write to arrays that the caller
            gave as `out`, so that no other attempt may.
    """

    def __init__(self, job: ArrayJob, pool: Pool) -> None:
        self.at_risk = False
        self._job = job
        self._pool = pool
        self._places: dict[Matrix, tuple[Segment, int]] = {}
        self._room: dict[Matrix, Array] = {}
        plan = job.plan
        # What travels in another dtype cannot be used where it lies.
        self._widened = {
            matrix
            for matrix in plan.results
            if plan.array_dtype(matrix) is not plan.result_dtype(matrix)
        }
        present = {
            matrix: value.array
            for matrix, value in job.operands.items()
            if value.rounding is None
        }
        present |= {
            matrix: array
            for matrix, array in job.present_outputs().items()
            if matrix not in self._widened
        }
        for matrix, array in present.items():
            place = pool.find(array)
            if place is not None:
                self._places[matrix] = place
        self._missing = [
            matrix
            for matrix in (*plan.operands, *plan.results)
            if matrix not in self._places
        ]
        self.sizes = [plan.size_bytes(matrix, plan.m or 0) for matrix in self._missing]

    def place(self, rooms: Sequence[Allocation]) -> None:
        """Use these for what does not lie in a region yet."""
        for matrix, room in zip(self._missing, rooms, strict=True):
            self._places[matrix] = (room.region, room.offset)
            self._room[matrix] = room.array

    @property
    def copies(self) -> bool:
        """Whether elements have to be copied, before or after."""
        given = self._job.present_outputs()
        return any(
            matrix in self._job.operands or matrix in given or matrix in self._widened
            for matrix in self._room
        )

    def copy_in(self) -> None:
        """Copy the operands that lie elsewhere.

        Raises:
            InputError: An element is too large for 16 bits.
        """
        for matrix, operand in self._job.operands.items():
            if matrix in self._room:
                operand.copy_to(self._room[matrix])

    def exchange(self) -> ShmExchange:
        """The conversation."""
        return ShmExchange(self._job.plan, self._places)

    def copy_out(self) -> None:
        """Have the results where the caller gets them."""
        plan, given = self._job.plan, self._job.present_outputs()
        for matrix in plan.results:
            if matrix not in self._room:
                continue
            room = self._room[matrix].view(plan.result_dtype(matrix).numpy)
            if matrix in given:
                np.copyto(given[matrix], room.reshape(given[matrix].shape))
            elif matrix in self._widened:
                self._job.hand_back(matrix, room.astype(plan.array_dtype(matrix).numpy))
            else:
                self._job.hand_back(matrix, room)

    def worth_another_try(self, error: BaseException) -> bool:
        """What a failed job means for its regions; whether they were the cause.

        Only the server's own word says that it has let go of them. Without
        that, with a deadline for example, it may write results for as long as
        a row block takes, so their regions are not used again.
        """
        reason = error.reason if isinstance(error, CallError) else None
        if reason is Reason.REGION_UNKNOWN:
            self._pool.invalidate({region for region, _ in self._places.values()})
            return True
        if reason is None:
            results = self._job.plan.results
            self._pool.invalidate({self._places[matrix][0] for matrix in results})
            self.at_risk = any(matrix not in self._room for matrix in results)
        return False


class ShmExchange:
    """A stream without blocks, as its client sees it.

    Attributes:
        accepted: What the server said when it took the job on.
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
        """The first message; the next ones may go once `accepted` is set."""
        return framing.encode_job(self._job)

    def messages(self) -> Iterator[bytes]:
        """Everything after it."""
        yield framing.encode_end(self._m)

    def receive(self, message: bytes) -> None:
        """Take a message from the server.

        Raises:
            ProtocolError: The contract does not allow it here.
        """
        try:
            received = framing.decode_response(message)
        except framing.FramingError as error:
            raise ProtocolError(f"the server sent no message: {error}") from error
        if self._receipt is not None:
            raise ProtocolError("the server went on after the job's receipt")
        if isinstance(received, Queued):
            self._report(jobs_ahead=received.jobs_ahead)
            return
        if isinstance(received, Accepted):
            if self.accepted is not None:
                raise ProtocolError("the server took the job on twice")
            check_accepted(received, self._job)
            self.accepted = received
        elif isinstance(received, ReceiptMessage):
            self._receipt = received
        else:
            raise ProtocolError("the server sent elements of a job in shared memory")
        self._report()

    def finish(self) -> Receipt:
        """The receipt, once the server has ended the stream with OK.

        Raises:
            ProtocolError: There is none.
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
