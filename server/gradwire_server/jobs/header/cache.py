"""What follows from a job's header, found out once for many jobs.

A training loop sends the same header, but for the job's id, with every step,
and reading one takes longer than computing a small job.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from gradwire_protocol.job_spec import Fingerprint, JobSpec
from gradwire_protocol.v1 import job_pb2
from gradwire_server.backends.base import Backend
from gradwire_server.backends.device_info import device_message
from gradwire_server.backends.row_blocks import Plan, make_plan
from gradwire_server.jobs.header.parse import check_header_size, parse_header
from gradwire_server.jobs.header.resume import check_grid


@dataclass(frozen=True, slots=True)
class Header:
    """A header, understood."""

    spec: JobSpec
    """What is asked."""
    plan: Plan
    """How it is cut."""
    backend_bytes: int
    """What its backend takes for it of the host's memory."""
    device_bytes: int
    """What it takes of a device's memory."""
    announced: tuple[job_pb2.Accepted, ...]
    """What is said of every job with this header, on each device."""


class HeaderCache:
    """Reads headers, and remembers what came of the last ones.

    Args:
        backend: What computes.
        device_limit: What the operator allows jobs of a device's memory.
        features: What this server offers.
        block_bytes: Bytes of a row block's operands.
        instance: The server's name.
    """

    def __init__(
        self,
        backend: Backend,
        device_limit: int | None,
        features: tuple[str, ...],
        block_bytes: int,
        instance: str,
    ) -> None:
        self._backend = backend
        self._device_limit = device_limit
        self._features = features
        self._block_bytes = block_bytes
        self._instance = instance
        self._remembered = functools.lru_cache(_REMEMBERED)(self._understood)

    def read(self, header: job_pb2.Job) -> Header:
        """Checks a header and cuts its job into blocks.

        Args:
            header: Loses its id, which nothing here depends on.

        Raises:
            JobError: It asks for what is wrong, unknown or impossible.
        """
        check_header_size(header)
        header.ClearField("job_id")
        encoded = header.SerializeToString()
        if len(encoded) > _SHORT:
            return self._understood(encoded)
        return self._remembered(encoded)

    def _understood(self, encoded: bytes) -> Header:
        job = job_pb2.Job.FromString(encoded)
        spec = parse_header(job, self._backend.max_columns, self._features)
        plan = make_plan(spec, self._block_bytes, self._backend.pipeline_depth)
        check_grid(spec, plan.block_rows)
        device_bytes = self._backend.device_bytes(spec, plan.slot_rows)
        echo = spec.to_message()
        return Header(
            spec=spec,
            plan=plan,
            backend_bytes=self._backend.job_bytes(spec, plan.slot_rows),
            device_bytes=device_bytes,
            announced=tuple(
                job_pb2.Accepted(
                    server_instance=self._instance,
                    block_rows=plan.block_rows,
                    window_rows=plan.window_rows,
                    device_bytes=device_bytes,
                    device=device_message(device, self._device_limit),
                    fingerprint=Fingerprint(
                        device.library, device.name, device.threads, plan.block_rows
                    ).to_message(),
                    effective_job=echo,
                )
                for device in self._backend.devices
            ),
        )


_REMEMBERED = 256

_SHORT = 512
"""Bytes of a header that is remembered, beyond all that the SDK sends: those of
strangers should not fill memory that is not counted."""
