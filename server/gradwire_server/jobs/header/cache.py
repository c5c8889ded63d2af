"""A cache of parsed headers, for many jobs.

A training loop sends the same header at every step, except for the job's id, and
parsing one takes longer than computing a small job.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from gradwire_protocol.job_spec import JobSpec
from gradwire_protocol.v1 import job_pb2
from gradwire_server.backends.base import Backend
from gradwire_server.backends.device_info import device_message, fingerprint_message
from gradwire_server.backends.row_blocks import RowBlockPlan, plan_row_blocks
from gradwire_server.jobs.header.parse import check_header_size, parse_header
from gradwire_server.jobs.header.resume import check_grid


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed header."""

    spec: JobSpec
    """The job's specification."""
    plan: RowBlockPlan
    """Its row blocks."""
    backend_bytes: int
    """Host memory that the backend and the total over segments take, in bytes."""
    device_bytes: int
    """Device memory of the job, in bytes."""
    announced: tuple[job_pb2.Accepted, ...]
    """The Accepted message of every job with this header, for each device."""


class HeaderCache:
    """Parses headers and caches the latest ones.

    Args:
        backend: The backend.
        device_limit: Operator's limit on each device's memory for jobs, in bytes.
        features: The server's features.
        row_block_bytes: Bytes of a row block's operands.
        instance: Name of the server instance.
    """

    def __init__(
        self,
        backend: Backend,
        device_limit: int | None,
        features: tuple[str, ...],
        row_block_bytes: int,
        instance: str,
    ) -> None:
        self._backend = backend
        self._keeps_on_device = not backend.devices[0].in_host_memory
        self._device_limit = device_limit
        self._features = features
        self._row_block_bytes = row_block_bytes
        self._instance = instance
        self._parse_cached = functools.lru_cache(_MAX_CACHED)(self._parse)

    def read(self, header: job_pb2.Job) -> Header:
        """Check a header and plan the row blocks of its job.

        Args:
            header: The header. Its id is cleared: nothing here depends on it.

        Raises:
            JobError: The header is invalid, or asks for an unknown or impossible
                option.
        """
        check_header_size(header)
        header.ClearField("job_id")
        encoded = header.SerializeToString()
        # Headers with kept tensors differ at every step.
        if len(encoded) > _MAX_CACHED_BYTES or header.HasField("session"):
            return self._parse(encoded)
        return self._parse_cached(encoded)

    def _parse(self, encoded: bytes) -> Header:
        job = job_pb2.Job.FromString(encoded)
        spec = parse_header(job, self._backend.max_columns, self._features)
        plan = plan_row_blocks(
            spec,
            self._row_block_bytes,
            self._backend.pipeline_depth,
            keeps_on_device=self._keeps_on_device,
        )
        check_grid(spec, plan.block_rows)
        device_bytes = self._backend.device_bytes(spec, plan.slot_rows)
        echo = spec.to_message()
        return Header(
            spec=spec,
            plan=plan,
            backend_bytes=(
                self._backend.job_bytes(spec, plan.slot_rows) + plan.total_bytes
            ),
            device_bytes=device_bytes,
            announced=tuple(
                job_pb2.Accepted(
                    server_instance=self._instance,
                    block_rows=plan.block_rows,
                    window_rows=plan.window_rows,
                    credit_blocks=plan.slots,
                    device_bytes=device_bytes,
                    device=device_message(device, self._device_limit),
                    fingerprint=fingerprint_message(
                        device, plan.block_rows, spec.segment_rows or plan.block_rows
                    ),
                    effective_job=echo,
                )
                for device in self._backend.devices
            ),
        )


_MAX_CACHED = 256

_MAX_CACHED_BYTES = 512
"""Largest header to cache, in bytes; the SDK's are smaller. Larger headers, from
strangers, should not fill memory that admission does not count."""
