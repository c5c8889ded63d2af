"""What all jobs of a spread product have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from gradwire._api.errors import GradwireError, NumericsError
from gradwire._api.options import Numerics
from gradwire._api.types import Receipt, Segment, spread_receipt
from gradwire._core.job_plan import Plan
from gradwire._core.numerics import most_common
from gradwire._core.segments import Division, accumulator_of, divide
from gradwire._resilience.array_job import exclude
from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.limits import MAX_JOB_ID_LENGTH
from gradwire_protocol.matrices import Matrix


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

    def divide(self, jobs: int, *, runs: bool) -> None:
        """Divide the product, once its servers are known.

        Args:
            jobs: Jobs at the same time.
            runs: Whether a job may have several segments.
        """
        numerics = self.plan.options.numerics
        if numerics is None:
            raise RuntimeError("the servers of the job are not known")
        self.division = divide(self.plan, numerics.row_block_bytes, jobs, runs=runs)

    def sum_dtypes(self) -> dict[Matrix, Dtype]:
        """Return the dtype in which the sums of a segment are received."""
        return dict.fromkeys(self.plan.sums, accumulator_of(self.plan))

    def job_id(self, number: int, again: str = "") -> str:
        """Return the id of the job of a run, for the server's log."""
        whole = self.plan.options.job_id
        own = f"{whole}/{number}{again}"
        return own if len(own) <= MAX_JOB_ID_LENGTH else whole

    def receipt(self, receipts: Mapping[int, Receipt]) -> Receipt:
        """Return the receipt of the product.

        Args:
            receipts: The receipt of each run, by the run's number.
        """
        rows, first = self.division.segment_rows, 0
        segments: list[Segment] = []
        in_order = [receipt for _, receipt in sorted(receipts.items())]
        for each in in_order:
            end = first + each.m
            segments.extend(
                Segment(
                    first_row=at,
                    rows=min(rows, end - at),
                    server_address=each.server_address,
                    server_instance=each.server_instance,
                    device=each.device,
                    attempts=each.attempts,
                )
                for at in range(first, max(end, first + 1), rows)
            )
            first = end
        return spread_receipt(
            in_order,
            segments,
            job_id=self.plan.options.job_id,
            segment_rows=rows,
            result_dtypes={
                each.label: self.plan.result_dtype(each).label
                for each in self.plan.results
            },
        )
