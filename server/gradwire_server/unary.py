"""Compute: a whole job in one message, on the same blocks as a stream."""

from __future__ import annotations

from gradwire.v1 import gradient_service_pb2 as pb2
from gradwire.wire import framing
from gradwire.wire.limits import MAX_COMPUTE_BYTES
from gradwire.wire.matrices import OPERANDS, ROW_OPERANDS, Matrix
from gradwire.wire.reasons import Reason
from gradwire_server.errors import JobError
from gradwire_server.job import RunningJob
from gradwire_server.spec import JobSpec


def whole_bytes(spec: JobSpec, matrix: Matrix) -> int:
    """Bytes of a matrix of a job whose m is known."""
    rows = spec.n if matrix in {Matrix.W, Matrix.DW} else spec.m or 0
    return rows * spec.row_length(matrix) * spec.dtype_of(matrix).itemsize


def whole_operands(
    spec: JobSpec, message: pb2.ComputeRequest
) -> dict[Matrix, memoryview]:
    """The operands of a Compute request, if it is one that can be answered."""
    if spec.m is None:
        raise JobError(
            Reason.SHAPE_INVALID,
            "job.m is absent: Compute needs it; ComputeStream does not",
            field="job.m",
        )
    if spec.checksum:
        raise JobError(
            Reason.OPTION_INVALID,
            "job.checksum is CHECKSUM_CRC32C: Compute has none; ComputeStream does",
            field="job.checksum",
        )
    for name, matrices in (("request", spec.operands), ("response", spec.results)):
        size = sum(whole_bytes(spec, matrix) for matrix in matrices)
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
        expected = whole_bytes(spec, operand) if operand in spec.operands else 0
        if len(data) != expected:
            short = len(data) < expected
            raise JobError(
                Reason.PAYLOAD_MISSING if short else Reason.PAYLOAD_EXCESS,
                f"{operand.label} has {len(data)} bytes: expected {expected}",
                field=operand.label,
            )
        if operand in spec.operands:
            operands[operand] = memoryview(data)
    return operands


async def feed(
    job: RunningJob, spec: JobSpec, operands: dict[Matrix, memoryview]
) -> None:
    """Gives a job whole operands, in the order that a stream would have."""
    m = spec.m or 0
    if Matrix.W in operands:
        await job.take(framing.Block(Matrix.W, 0, operands[Matrix.W]))
    rows = {op: data for op, data in operands.items() if op in ROW_OPERANDS and data}
    block_rows = job.plan.block_rows
    for first_row in range(0, m if rows else 0, block_rows):
        for operand, data in rows.items():
            length = spec.row_length(operand)
            first, last = (
                row * length * spec.dtype.itemsize
                for row in (first_row, min(first_row + block_rows, m))
            )
            await job.take(framing.Block(operand, first_row * length, data[first:last]))
    await job.end(m)


async def collect(job: RunningJob, results: dict[Matrix, bytearray]) -> None:
    """Appends a job's results to `results`."""
    async for run in job.results():
        results[run.matrix] += run.payload


async def not_told(_: int) -> None:
    """A unary call cannot say that it waits."""


def message_bytes(spec: JobSpec) -> int:
    """What request and response hold: once as messages, once as their parts."""
    matrices = (*spec.operands, *spec.results)
    return 2 * sum(whole_bytes(spec, matrix) for matrix in matrices)
