"""Compute requests: a whole job in one message."""

from __future__ import annotations

from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.job_spec import JobSpec
from gradwire_protocol.limits import MAX_COMPUTE_BYTES
from gradwire_protocol.matrices import OPERANDS, Matrix
from gradwire_protocol.v1 import gradient_service_pb2 as pb2
from gradwire_server.errors import JobError


def whole_operands(
    spec: JobSpec, message: pb2.ComputeRequest
) -> dict[Matrix, memoryview]:
    """Check a Compute request and return its operands.

    Raises:
        JobError: The request is invalid, or needs ComputeStream.
    """
    if spec.m is None:
        raise JobError(
            Reason.SHAPE_INVALID,
            "job.m is absent: Compute needs it; ComputeStream does not",
            field="job.m",
        )
    if spec.buffers:
        raise JobError(
            Reason.OPTION_INVALID,
            "job.regions is not empty: Compute takes matrices inline; ComputeStream "
            "takes them in shared memory too",
            field="job.regions",
        )
    if spec.checksum:
        raise JobError(
            Reason.OPTION_INVALID,
            "job.checksum is CHECKSUM_CRC32C: Compute has none; ComputeStream does",
            field="job.checksum",
        )
    for name, present in (
        ("resume", spec.resume is not None),
        ("checkpoints", spec.checkpoint_rows is not None),
        ("direct", spec.direct > 0),
    ):
        if present:
            raise JobError(
                Reason.OPTION_INVALID,
                f"job.{name} is present: Compute has none; ComputeStream does",
                field=f"job.{name}",
            )
    if spec.segment_sums:
        raise JobError(
            Reason.OPTION_INVALID,
            "job.segment_sums is true: Compute has none; ComputeStream does",
            field="job.segment_sums",
        )
    for name, size in (
        ("request", spec.operands_bytes),
        ("response", spec.results_bytes),
    ):
        if size > MAX_COMPUTE_BYTES:
            raise JobError(
                Reason.STREAM_REQUIRED,
                f"the {name} would hold {size} bytes of elements: Compute takes at "
                f"most {MAX_COMPUTE_BYTES}; use ComputeStream",
                field="job",
            )
    operands: dict[Matrix, memoryview] = {}
    for operand in OPERANDS:
        data: bytes = getattr(message, operand.label)
        sent = operand in spec.sent_operands
        expected = spec.size_bytes(operand) if sent else 0
        if len(data) != expected:
            short = len(data) < expected
            raise JobError(
                Reason.PAYLOAD_MISSING if short else Reason.PAYLOAD_EXCESS,
                f"{operand.label} has {len(data)} bytes: expected {expected}",
                field=operand.label,
            )
        if sent:
            operands[operand] = memoryview(data)
    return operands


def message_bytes(spec: JobSpec) -> int:
    """Return the bytes that a Compute call holds.

    Operands count twice (message and field), results three times (array, field and
    message).
    """
    return 2 * spec.operands_bytes + 3 * spec.results_bytes
