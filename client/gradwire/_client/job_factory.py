"""Creation of a client's jobs from the arguments of its methods."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gradwire._api.errors import InputError
from gradwire._api.options import (
    BlockRows,
    Metadata,
    MetadataPairs,
    Options,
    parse_metadata,
)
from gradwire._api.types import ServerLimits
from gradwire._api.verify import Verify
from gradwire._arrays.buffer_pool import ResultPool
from gradwire._arrays.device_copy import HostCopies
from gradwire._arrays.operand import Operand
from gradwire._arrays.result_library import library_of
from gradwire._client.batch_job import BatchJob
from gradwire._client.spread_job import SpreadJob
from gradwire._core.broadcast import Broadcast, needs_broadcast
from gradwire._core.job_plan import (
    Plan,
    common_dtype,
    plan_arrays,
    plan_kept,
    read_operands,
    with_block_rows,
)
from gradwire._core.kept import Keeping
from gradwire._core.outputs import (
    ArrayOutputs,
    Output,
    given_outputs,
    named_outputs,
    output_shapes,
)
from gradwire._core.segments import accumulator_of
from gradwire._core.unary import suits_one_message
from gradwire._resilience.array_job import ArrayJob
from gradwire._resilience.replay_buffer import ReplayBuffer
from gradwire._resilience.retry import RetryPolicy
from gradwire._resilience.row_reader import RowReader
from gradwire._resilience.segments_job import Segments, SegmentsJob
from gradwire._resilience.stream_job import StreamJob
from gradwire_protocol import limits
from gradwire_protocol.limits import AFFINITY, EARLY_ROWS, RESUME
from gradwire_protocol.matrices import Matrix, operands_for

MIN_ROWS_PER_CHECKPOINT_RATIO = 8
"""Unrequested checkpoints are spaced so that the rows between two have at least this
many times the bytes of a checkpoint."""

MIN_BYTES_PER_CHECKPOINT = 16 * limits.MIB
"""Minimum bytes of the rows between two unrequested checkpoints."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """How jobs are sent. It does not affect results, as a test checks."""

    chunk_bytes: int = limits.DEFAULT_CHUNK_BYTES
    """Largest payload of a chunk, in both directions."""

    unary: bool | None = None
    """Whether jobs use the method Compute; None: where it suits them."""


class JobFactory:
    """Makes a client's jobs.

    Args:
        policy: When calls are retried.
        verify: Default check of results; None: no check.
        timeout_s: Default timeout, in seconds.
        metadata: Metadata of every call.
        require_private: Checks that metadata sent in plaintext holds no secret.
        block_rows: Default of the most rows of a row block.

    Attributes:
        features: Features of the server, once it has answered.
        limits: Limits of each server that has answered.
        memory: Allocates arrays for results.
        timeout_s: As above.
        metadata: As above, as pairs.
        tuning: How jobs are sent.
    """

    def __init__(
        self,
        policy: RetryPolicy,
        verify: Verify | None,
        timeout_s: float | None,
        metadata: Metadata,
        require_private: Callable[[MetadataPairs], None],
        *,
        block_rows: BlockRows | None = None,
    ) -> None:
        self._policy = policy
        self._verify = verify
        self._require_private = require_private
        self._block_rows = block_rows
        self.timeout_s = timeout_s
        self.metadata = parse_metadata(metadata)
        require_private(self.metadata)
        self.features: frozenset[str] = frozenset()
        self.limits: tuple[ServerLimits, ...] = ()
        self.memory = ResultPool()
        self.tuning = Tuning()

    def metadata_of(self, affinity: str) -> MetadataPairs:
        """Return the metadata of a call.

        Args:
            affinity: What the call has in common with others that should reach the
                same server, unless the caller's metadata says that; empty: nothing.
        """
        return with_affinity(self.metadata, affinity)

    def with_defaults(self, options: Options, affinity: str = "") -> Options:
        """Return a call's options, completed with the client's defaults.

        Args:
            options: The options.
            affinity: As for `metadata_of`; empty: the job's id.
        """
        self._require_private(options.metadata)
        return replace(
            options,
            verify=self._verify if options.verify is None else options.verify,
            timeout_s=options.timeout_s or self.timeout_s,
            metadata=with_affinity(
                self.metadata + options.metadata, affinity or options.job_id
            ),
            block_rows=(
                self._block_rows if options.block_rows is None else options.block_rows
            ),
        )

    def array_job(
        self,
        given: Mapping[Matrix, object],
        out: Any,
        returns: tuple[Matrix, ...],
        options: Options,
    ) -> ArrayJob | BatchJob | SpreadJob:
        """Create a job from the arguments of a method that returns `returns`.

        Operands with batch dimensions in W, and vectors, give several jobs.

        Raises:
            InputError: An argument is invalid.
        """
        copies, options = HostCopies(), self.with_defaults(options)
        sources = read_operands(given, options, copies)
        needed = operands_for(options.results)
        library = library_of(given[matrix] for matrix in needed)
        if not needs_broadcast(sources):
            plan, operands = plan_arrays(sources, options)
            results = output_shapes(plan, operands)
            own = given_outputs(plan, operands, named_outputs(out, returns), results)
            outputs = ArrayOutputs(plan, results, own, self.memory, library)
            if options.spread:
                return SpreadJob(
                    plan,
                    operands,
                    outputs,
                    make=self._part,
                    make_of_segments=self._segments_job,
                    copies=copies,
                )
            return self._job(plan, operands, outputs, copies)
        if options.spread:
            raise InputError(
                "spread is on, but w has batch dimensions, or an operand is a vector:"
                " leave it out; the jobs of a batch go to all servers anyway"
            )
        dtype = common_dtype(sources, options)
        shapes = {matrix: source.array.shape for matrix, source in sources.items()}
        division = Broadcast.of(shapes)
        sources = {matrix: sources[matrix] for matrix in needed}
        # Of one job; for the whole product only the results and their dtypes count.
        plan = Plan(division.rows, division.n, division.columns, dtype, options)
        if not division.count:
            plan = Plan(0, division.n, 0, dtype, options)
        plan = with_block_rows(plan)
        named = named_outputs(out, returns)
        own = given_outputs(plan, sources, named, division.shapes)
        outputs = ArrayOutputs(plan, division.shapes, own, self.memory, library)
        return BatchJob(
            division, sources, plan, outputs, make=self._part, copies=copies
        )

    def session_job(
        self,
        given: Mapping[Matrix, object],
        out: Any,
        returns: tuple[Matrix, ...],
        options: Options,
        kept: Keeping,
    ) -> ArrayJob:
        """Create a job with operands or results that stay in a session.

        Args:
            given: The caller's operands, arrays and kept tensors.
            out: The caller's arrays for results.
            returns: The results that the method returns.
            options: The options of the call.
            kept: The operands and results that stay.

        Raises:
            InputError: An argument is invalid.
        """
        copies, options = HostCopies(), self.with_defaults(options, kept.affinity)
        if options.verify:
            raise InputError(
                "verify is on, but the client does not have the elements of kept"
                " tensors: leave it out, also of connect, for clients with sessions"
            )
        sources = read_operands(given, options, copies, kept=True)
        plan, operands = plan_kept(sources, options, kept)
        results = output_shapes(plan, operands)
        own = given_outputs(plan, operands, named_outputs(out, returns), results)
        library = library_of(given[matrix] for matrix in plan.operands)
        outputs = ArrayOutputs(plan, results, own, self.memory, library)
        sent = {matrix: operands[matrix] for matrix in plan.operands}
        return self._job(plan, sent, outputs, copies)

    def _part(
        self,
        plan: Plan,
        operands: Mapping[Matrix, Operand],
        given: Mapping[Matrix, Output],
    ) -> ArrayJob:
        """Create one job of a batch."""
        shapes = output_shapes(plan, operands)
        outputs = ArrayOutputs(plan, shapes, given, self.memory)
        return self._job(plan, operands, outputs, HostCopies())

    def _segments_job(
        self,
        plan: Plan,
        operands: Mapping[Matrix, Operand],
        segments: Segments,
        whole: Plan,
        segment_rows: int,
    ) -> SegmentsJob:
        """Create a job that takes segments of a spread product."""
        return SegmentsJob(
            replace(plan, chunk_bytes=self.tuning.chunk_bytes),
            operands,
            ArrayOutputs(plan, {}, {}, self.memory),
            whole=whole,
            segments=segments,
            segment_rows=segment_rows,
            copies=HostCopies(),
            memory=self.memory,
            early_bytes=self._early_bytes(plan),
        )

    def _job(
        self,
        plan: Plan,
        operands: Mapping[Matrix, Operand],
        outputs: ArrayOutputs,
        copies: HostCopies,
    ) -> ArrayJob:
        if plan.chunk_bytes != self.tuning.chunk_bytes:
            plan = replace(plan, chunk_bytes=self.tuning.chunk_bytes)
        unary = self.tuning.unary
        if unary is None:
            unary = suits_one_message(plan)
        return ArrayJob(
            plan,
            operands,
            outputs,
            unary=unary,
            copies=copies,
            checkpoint_rows=(
                None if plan.kept else self._checkpoint_rows(plan.options)
            ),
            early_bytes=self._early_bytes(plan),
        )

    def stream_job(self, reader: RowReader, rows: ReplayBuffer) -> StreamJob:
        """Create a stream's job, once its first item (if any) is known."""
        plan = replace(reader.plan(rows.first), chunk_bytes=self.tuning.chunk_bytes)
        checkpoint_rows = self._checkpoint_rows(plan.options)
        if checkpoint_rows == 0 and plan.options.checkpoint_rows is None:
            checkpoint_rows = self._checkpoint_rows_of_stream(plan, rows)
        early_bytes = self._early_bytes(plan)
        if not rows.repeatable and self._policy.attempts > 1:
            # If the server refuses the job, these rows must be there for another try.
            early_bytes = min(early_bytes, self._policy.held_bytes // 2)
        return StreamJob(
            plan,
            reader.w,
            rows,
            reader.copies,
            checkpoint_rows,
            check=reader.check,
            library=reader.library,
            early_bytes=early_bytes,
        )

    @property
    def held_bytes(self) -> int:
        """Most bytes of rows that a stream holds."""
        return self._policy.held_bytes

    def replay_buffer(
        self, reader: RowReader, rows: object, again: Sequence[object] | None = None
    ) -> ReplayBuffer:
        """Create the buffer of a stream's rows that may have to be sent again.

        Args:
            reader: Converts items to operands.
            rows: The items.
            again: The same items as a sequence, if `rows` is none.
        """
        if again is None and self._policy.attempts == 1:
            return ReplayBuffer(reader)
        if isinstance(rows, Sequence):
            again = rows
        return ReplayBuffer(reader, self._policy.held_bytes, again)

    def after_fork(self) -> None:
        """Use a new pool in the child of a fork."""
        self.memory = ResultPool()

    def _checkpoint_rows_of_stream(self, plan: Plan, rows: ReplayBuffer) -> int:
        """Return the rows between unrequested checkpoints of a stream; 0: none.

        Rows that the iterable cannot give again are buffered. Checkpoints are
        frequent enough that the rows since the last one fit in the buffer, with the
        rows in transit. They are rare enough to be small beside the rows.
        """
        row_bytes = plan.upload_bytes(1) - plan.upload_bytes(0)
        dtype = accumulator_of(plan)
        elements = sum(math.prod(plan.shape(matrix, 0)) for matrix in plan.sums)
        sum_bytes = elements * dtype.itemsize
        apart = max(MIN_BYTES_PER_CHECKPOINT, MIN_ROWS_PER_CHECKPOINT_RATIO * sum_bytes)
        max_apart = self._policy.held_bytes // 4
        if rows.repeatable or not row_bytes or apart > max_apart:
            return 0
        return max(1, apart // row_bytes)

    def _early_bytes(self, plan: Plan) -> int:
        """Return the bytes of operands to send before a server accepts a job.

        0 if a server does not take any, or would refuse the job in any case.
        """
        if not self.limits or EARLY_ROWS not in self.features:
            return 0
        columns, w_bytes = max(plan.n, plan.k), plan.upload_bytes(0)
        for each in self.limits:
            if columns > each.max_columns or w_bytes > each.memory_bytes:
                return 0
        return min(each.early_bytes for each in self.limits)

    def _checkpoint_rows(self, options: Options) -> int | None:
        """Return the rows between a job's checkpoints; None: no checkpoints.

        The default is 0: the server sends one checkpoint, when it stops. That costs
        nothing before.
        """
        if self._policy.attempts == 1:
            return None
        if options.checkpoint_rows is not None:
            return options.checkpoint_rows
        return 0 if RESUME in self.features else None


def with_affinity(pairs: MetadataPairs, affinity: str) -> MetadataPairs:
    """Return metadata with its affinity, unless the caller has set one."""
    if not affinity or any(key == AFFINITY for key, _ in pairs):
        return pairs
    return (*pairs, (AFFINITY, affinity))
