"""A client's jobs, made of the arguments of its methods."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gradwire._api.options import Metadata, MetadataPairs, Options, parse_metadata
from gradwire._api.verify import Verify
from gradwire._arrays.buffer_pool import ResultPool
from gradwire._arrays.device_copy import HostCopies
from gradwire._core.job_plan import Plan, plan_arrays
from gradwire._core.outputs import ArrayOutputs, given_outputs, named_outputs
from gradwire._core.unary import fits_one_message
from gradwire._resilience.array_job import ArrayJob
from gradwire._resilience.replay_buffer import ReplayBuffer
from gradwire._resilience.retry import RetryPolicy
from gradwire._resilience.row_reader import RowReader
from gradwire._resilience.stream_job import StreamJob
from gradwire_protocol import limits
from gradwire_protocol.limits import RESUME
from gradwire_protocol.matrices import Matrix

MIN_ROWS_PER_CHECKPOINT_RATIO = 16
"""Checkpoints that the caller did not ask for are spaced so that the rows between
two have at least so many times a checkpoint's bytes."""

MIN_BYTES_PER_CHECKPOINT = 16 * limits.MIB
"""And at least so many bytes."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """How jobs travel. Results do not depend on it, and a test says so."""

    chunk_bytes: int = limits.DEFAULT_CHUNK_BYTES
    """Largest payload of a stream's message, in both directions."""

    unary: bool | None = None
    """Whether jobs go through Compute; None: the small ones do."""


class JobFactory:
    """Makes a client's jobs.

    Args:
        policy: When calls are made again.
        verify: How results are checked where a call does not say; None: not.
        timeout_s: Seconds for calls that name none.
        metadata: Sent with every call.
        require_private: Checks that metadata holds no secret that others could
            read on its way.

    Attributes:
        features: What the server offers, once it has said.
        memory: Where results' arrays come from.
        timeout_s: See above.
        metadata: See above, as pairs.
        tuning: How jobs travel.
    """

    def __init__(
        self,
        policy: RetryPolicy,
        verify: Verify | None,
        timeout_s: float | None,
        metadata: Metadata,
        require_private: Callable[[MetadataPairs], None],
    ) -> None:
        self._policy = policy
        self._verify = verify
        self._require_private = require_private
        self.timeout_s = timeout_s
        self.metadata = parse_metadata(metadata)
        require_private(self.metadata)
        self.features: frozenset[str] = frozenset()
        self.memory = ResultPool()
        self.tuning = Tuning()

    def with_defaults(self, options: Options) -> Options:
        """The options of a call, with the client's where it does not say."""
        self._require_private(options.metadata)
        if self.timeout_s is None and not self.metadata and self._verify is None:
            return options
        return replace(
            options,
            verify=self._verify if options.verify is None else options.verify,
            timeout_s=options.timeout_s or self.timeout_s,
            metadata=self.metadata + options.metadata,
        )

    def array_job(
        self,
        given: Mapping[Matrix, object],
        out: Any,
        returns: tuple[Matrix, ...],
        options: Options,
    ) -> ArrayJob:
        """A job from the arguments of a method that returns `returns`."""
        copies = HostCopies()
        plan, operands = plan_arrays(given, self.with_defaults(options), copies)
        if plan.chunk_bytes != self.tuning.chunk_bytes:
            plan = replace(plan, chunk_bytes=self.tuning.chunk_bytes)
        own = given_outputs(plan, operands, named_outputs(out, returns))
        unary = self.tuning.unary
        if unary is None:
            unary = fits_one_message(plan)
        return ArrayJob(
            plan,
            operands,
            ArrayOutputs(plan, operands, own, self.memory),
            unary=unary,
            copies=copies,
            checkpoint_rows=self._checkpoint_rows(plan.options),
        )

    def stream_job(self, reader: RowReader, rows: ReplayBuffer) -> StreamJob:
        """A stream's job, now that its first item is known, if it has any."""
        plan = replace(reader.plan(rows.first), chunk_bytes=self.tuning.chunk_bytes)
        checkpoint_rows = self._checkpoint_rows(plan.options)
        if checkpoint_rows == 0 and plan.options.checkpoint_rows is None:
            checkpoint_rows = self._checkpoint_rows_of_stream(plan, rows)
        return StreamJob(
            plan, reader.w, rows, reader.copies, checkpoint_rows, check=reader.check
        )

    def replay_buffer(self, reader: RowReader, rows: object) -> ReplayBuffer:
        """Room for a stream's rows, as far as they may be needed again."""
        if self._policy.attempts == 1:
            return ReplayBuffer(reader)
        again = rows if isinstance(rows, Sequence) else None
        return ReplayBuffer(reader, self._policy.held_bytes, again)

    def after_fork(self) -> None:
        """Begin anew in a child: the parent's arrays come back to the parent."""
        self.memory = ResultPool()

    def _checkpoint_rows_of_stream(self, plan: Plan, rows: ReplayBuffer) -> int:
        """How often a stream asks for checkpoints of its own accord; 0: never.

        So often that the rows behind the last one are held, with those that are
        on their way, if they cannot be had again; but not so often that the
        checkpoints are much beside the rows.
        """
        row_bytes = plan.upload_bytes(1) - plan.upload_bytes(0)
        dtype = plan.options.dw_accumulator or plan.dtype.sums_in
        elements = sum(math.prod(plan.shape(matrix, 0)) for matrix in plan.sums)
        sum_bytes = elements * dtype.itemsize
        apart = max(MIN_BYTES_PER_CHECKPOINT, MIN_ROWS_PER_CHECKPOINT_RATIO * sum_bytes)
        max_apart = self._policy.held_bytes // 4
        if rows.repeatable or not row_bytes or apart > max_apart:
            return 0
        return max(1, apart // row_bytes)

    def _checkpoint_rows(self, options: Options) -> int | None:
        """How often a job asks for checkpoints; None: never.

        By default for the one alone that a server sends which stops: it costs
        nothing before.
        """
        if self._policy.attempts == 1:
            return None
        if options.checkpoint_rows is not None:
            return options.checkpoint_rows
        return 0 if RESUME in self.features else None
