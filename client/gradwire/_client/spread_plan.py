"""What all jobs of a spread product have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from gradwire._api.errors import GradwireError, NumericsError
from gradwire._api.options import Numerics
from gradwire._api.types import Receipt, Segment, receipt_of, spread_receipt
from gradwire._core.job_plan import Plan
from gradwire._core.numerics import most_common
from gradwire._core.segments import Division, accumulator_of, divide
from gradwire._resilience.array_job import exclude
from gradwire._resilience.segments_job import SegmentsJob
from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.limits import MAX_JOB_ID_LENGTH
from gradwire_protocol.matrices import Matrix
from gradwire_protocol.v1.job_pb2 import Receipt as ReceiptMessage


class SpreadPlan:
    """The plan of a product, its division into segments, and its servers.

    Args:
        plan: The plan of the whole product.

    Attributes:
        plan: As above; once the servers are known, with what they have in common.
        division: The division; known after `divide`.
        unusable: Addresses of the servers that get no segments.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.division = Division(plan.m or 0, 1)
        self.unusable: set[str] = set()

    def choose_numerics(self, found: Mapping[str, Numerics | None]) -> None:
        """Decide which servers compute segments: those that most have in common.

        Args:
            found: The numerics of each server, by address; None: it computes no
                segments.

        Raises:
            NumericsError: No server computes segments.
        """
        known = {at: each for at, each in found.items() if each is not None}
        chosen = most_common(known)
        if chosen is None:
            raise NumericsError(
                f"spread is on, but no server at {', '.join(found)} computes segments:"
                " update them"
            )
        for address, each in found.items():
            if each != chosen:
                why = f"it computes with {each}: expected {chosen}"
                if each is None:
                    why = "it does not say with what it computes: update it"
                exclude(self.unusable, self.plan.options.job_id, address, why)
        options = replace(self.plan.options, numerics=chosen)
        rows = options.block_rows if isinstance(options.block_rows, int) else 0
        self.plan = replace(self.plan, options=options, block_rows=rows)

    def note(self, address: str, error: GradwireError) -> None:
        """Note the error of a job: a server with other numerics gets no more."""
        if isinstance(error, NumericsError):
            exclude(self.unusable, self.plan.options.job_id, address, str(error))

    def divide(self, *, several: bool) -> None:
        """Divide the product, once its servers are known.

        Args:
            several: Whether a job may take several segments.
        """
        numerics = self.plan.options.numerics
        if numerics is None:
            raise RuntimeError("the servers of the job are not known")
        self.division = divide(self.plan, numerics.row_block_bytes, several=several)

    def sum_dtypes(self) -> dict[Matrix, Dtype]:
        """Return the dtype in which the sums of a segment are received."""
        return dict.fromkeys(self.plan.sums, accumulator_of(self.plan))

    def job_id(self, number: int, again: str = "") -> str:
        """Return the id of one of the jobs, for the server's log."""
        whole = self.plan.options.job_id
        own = f"{whole}/{number}{again}"
        return own if len(own) <= MAX_JOB_ID_LENGTH else whole

    def receipt_so_far(self, job: SegmentsJob, segments: Sequence[int]) -> Receipt:
        """Return what is known of an attempt that failed behind complete segments.

        Args:
            job: The job.
            segments: Their numbers.
        """
        accepted = job.accepted
        if accepted is None:
            raise RuntimeError("no server has accepted the job")
        plan = self.plan
        m = sum(last - first for first, last in map(self.division.rows_of, segments))
        message = ReceiptMessage(
            job_id=job.plan.options.job_id,
            server_instance=accepted.server_instance,
            m=m,
            blocks=-(-m // accepted.block_rows),
            bytes_received=plan.upload_bytes(m),
            bytes_sent=plan.download_bytes(m),
        )
        receipt = receipt_of(message, accepted)
        return replace(receipt, server_address=job.address, attempts=job.attempt)

    def receipt(self, computed: Iterable[tuple[Sequence[int], Receipt]]) -> Receipt:
        """Return the receipt of the product.

        Args:
            computed: The receipts of its jobs, with the numbers of their segments.
        """
        in_order = sorted(computed, key=lambda each: min(each[0]))
        segments: dict[int, Segment] = {}
        for numbers, receipt in in_order:
            for number in numbers:
                first, last = self.division.rows_of(number)
                segments[number] = Segment(
                    first_row=first,
                    rows=last - first,
                    server_address=receipt.server_address,
                    server_instance=receipt.server_instance,
                    device=receipt.device if receipt.device.backend else None,
                    attempts=receipt.attempts,
                )
        # Those of failed attempts know less.
        in_order.sort(key=lambda each: bool(each[1].device.backend))
        return spread_receipt(
            [receipt for _, receipt in in_order],
            [segment for _, segment in sorted(segments.items())],
            m=self.division.m,
            job_id=self.plan.options.job_id,
            segment_rows=self.division.segment_rows,
            result_dtypes={
                each.label: self.plan.result_dtype(each).label
                for each in self.plan.results
            },
        )
