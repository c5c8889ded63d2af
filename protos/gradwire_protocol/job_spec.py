"""Conversion between `JobSpec` and a job's header.

`JobSpec.to_message` writes a header, and `JobSpec.from_message` reads one. Client
and server use both: for the client's request, and for the server's echo of the
job as understood (`Accepted.effective_job`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.header_checks import HeaderError, check_header, path_of
from gradwire_protocol.limits import DEFAULT_CHUNK_BYTES
from gradwire_protocol.matrices import (
    OPERANDS,
    PARTIAL_SUMS,
    RESULTS,
    Matrix,
    operands_for,
)
from gradwire_protocol.v1 import job_pb2, matrix_pb2


@dataclass(frozen=True, slots=True)
class BufferRef:
    """Location of a matrix in shared memory."""

    region: int
    """Index of the region in `JobSpec.regions`."""
    offset: int
    """Offset of the matrix in bytes."""


class Fingerprint(NamedTuple):
    """Fingerprint of the last bits, as in `gradwire.v1.NumericsFingerprint`."""

    library: str
    device: str
    threads: int
    block_rows: int
    segment_rows: int

    @classmethod
    def from_message(cls, message: job_pb2.NumericsFingerprint) -> Fingerprint:
        """Read the fingerprint from a message."""
        return cls(*(getattr(message, name) for name in cls._fields))

    def to_message(self) -> job_pb2.NumericsFingerprint:
        """Write the fingerprint to a message."""
        return job_pb2.NumericsFingerprint(**self._asdict())


@dataclass(frozen=True, slots=True)
class Resume:
    """Where an interrupted job continues."""

    first_row: int
    """The first row sent."""
    results_from_row: int
    """The first row with row-wise results wanted."""
    fingerprint: Fingerprint
    """Fingerprint of the interrupted job's device."""


@dataclass(frozen=True, slots=True)
class KeptOperand:
    """A tensor of the job's session that is an operand."""

    tensor: int
    """Number of the tensor."""
    last_use: bool = False
    """Whether the session drops it when the job has succeeded."""


@dataclass(frozen=True, slots=True)
class Contribution:
    """A part of a kept gradient."""

    step: int
    """Steps of the session so far."""
    part: int
    """Number of the part, from 0."""
    parts: int = 0
    """Number of parts between two steps; 0: not known yet."""


@dataclass(frozen=True, slots=True)
class KeptResult:
    """A gradient of the job's session that receives a result."""

    tensor: int
    """Number of the gradient."""
    add: Contribution | None = None
    """The part that is added; None: the result replaces the gradient."""


@dataclass(frozen=True)
class JobSpec:
    """The contents of a job's header."""

    m: int | None
    """Rows of X and dY; None while unknown."""
    n: int
    """Columns of X, rows of W."""
    k: int
    """Columns of W and of dY."""
    dtype: Dtype
    """Element type of the operands."""
    results: Mapping[Matrix, Dtype]
    """The wanted results and their element types, in the order of `RESULTS`."""
    dw_accumulator: Dtype | None = None
    """Dtype of sums over row blocks; None: the default of `dtype`."""
    allow_tf32: bool = False
    checksum: bool = False
    """Whether every payload carries a CRC-32C."""
    max_chunk_bytes: int = DEFAULT_CHUNK_BYTES
    """Largest payload of a message from the server."""
    features: tuple[str, ...] = ()
    """Features required by the job."""
    regions: tuple[str, ...] = field(default=(), repr=False)
    """Tokens of the shared-memory regions; secrets."""
    buffers: Mapping[Matrix, BufferRef] = field(default_factory=dict)
    """Locations of the matrices in the regions; empty for matrices in messages."""
    checkpoint_rows: int | None = None
    """Minimum rows between two checkpoints; 0: at most one, when the server ends the
    job; None: no checkpoints."""
    resume: Resume | None = None
    """Where the job continues; None: at its beginning."""
    session: str = field(default="", repr=False)
    """The session with the kept tensors, a secret; empty: none are kept."""
    session_step: int | None = None
    """Required number of steps of the session so far; None: any."""
    kept: Mapping[Matrix, KeptOperand] = field(default_factory=dict)
    """Operands that are tensors of the session; they are not sent."""
    keep: Mapping[Matrix, int] = field(default_factory=dict)
    """Sent operands that the session keeps, and the numbers of the tensors."""
    into: Mapping[Matrix, KeptResult] = field(default_factory=dict)
    """Results that stay in gradients of the session; they are not sent."""
    block_rows: int | None = None
    """Most rows of a row block, a power of two; None: as many as the server chooses."""
    segment_rows: int | None = None
    """Rows of a segment, a power of two, whose row blocks are summed from zero before
    the segments are; None: no segments."""
    segment_sums: bool = False
    """Whether the server sends the sums of each segment in the place of `sums`."""
    direct: int = 0
    """Most direct connections that the client opens for the elements; 0: none."""

    @property
    def accumulator(self) -> Dtype:
        """Dtype of sums over row blocks."""
        return self.dw_accumulator or self.dtype.default_accumulator

    @property
    def first_row(self) -> int:
        """The first row sent."""
        return self.resume.first_row if self.resume else 0

    @property
    def results_from_row(self) -> int:
        """The first row with row-wise results wanted."""
        return self.resume.results_from_row if self.resume else 0

    @cached_property
    def sums(self) -> tuple[Matrix, ...]:
        """The wanted results that are summed over row blocks."""
        return tuple(result for result in self.results if result.is_sum)

    @property
    def brings_sums(self) -> bool:
        """Whether the client sends the `sums` over the rows before `first_row`."""
        return bool(self.sums) and self.first_row > 0

    @cached_property
    def operands(self) -> tuple[Matrix, ...]:
        """The operands of the wanted results, in the order X, W, dY."""
        return operands_for(self.results)

    @cached_property
    def sent_operands(self) -> tuple[Matrix, ...]:
        """The operands that the client sends, in messages or in shared memory."""
        return tuple(each for each in self.operands if each not in self.kept)

    @cached_property
    def sent_results(self) -> tuple[Matrix, ...]:
        """The results that the server sends, in messages or in shared memory."""
        return tuple(
            each
            for each in self.results
            if each not in self.into and not (self.segment_sums and each.is_sum)
        )

    def is_kept(self, matrix: Matrix) -> bool:
        """Whether a matrix is in the session's memory while the job runs."""
        return matrix in self.kept or matrix in self.keep or matrix in self.into

    def row_length(self, matrix: Matrix) -> int:
        """Columns of a matrix, in elements."""
        return matrix.row_length(self.n, self.k)

    def dtype_of(self, matrix: Matrix) -> Dtype:
        """Element type of a matrix on the wire."""
        if matrix in PARTIAL_SUMS:
            return self.accumulator
        return self.results.get(matrix, self.dtype)

    def size_bytes(self, matrix: Matrix) -> int:
        """Bytes of a matrix, once m is known."""
        return self._sizes_bytes[matrix]

    @cached_property
    def operands_bytes(self) -> int:
        """Bytes of all sent operands, once m is known."""
        return sum(map(self.size_bytes, self.sent_operands))

    @cached_property
    def results_bytes(self) -> int:
        """Bytes of all sent results, once m is known."""
        return sum(map(self.size_bytes, self.sent_results))

    @cached_property
    def _sizes_bytes(self) -> dict[Matrix, int]:
        sizes = {}
        for matrix in Matrix:
            rows, columns = matrix.shape(self.m or 0, self.n, self.k)
            sizes[matrix] = rows * columns * self.dtype_of(matrix).itemsize
        return sizes

    @cached_property
    def operations(self) -> int:
        """Multiplications and additions of the job, once m is known."""
        return self.row_operations * (self.m or 0)

    @cached_property
    def row_operations(self) -> int:
        """Multiplications and additions of the job for each of its rows."""
        return sum(result.row_operations(self.n, self.k) for result in self.results)

    def share_memory(self, one: Matrix, other: Matrix) -> bool:
        """Whether two matrices of a shared-memory job overlap."""
        if one not in self.buffers or other not in self.buffers:
            return False
        first, second = self.buffers[one], self.buffers[other]
        return first.region == second.region and (
            min(
                first.offset + self.size_bytes(one),
                second.offset + self.size_bytes(other),
            )
            > max(first.offset, second.offset)
        )

    def to_message(self, job_id: str = "") -> job_pb2.Job:
        """Write the header, with all known options explicit."""
        job = job_pb2.Job(
            job_id=job_id,
            m=self.m,
            n=self.n,
            k=self.k,
            dtype=self.dtype.proto_name,
            numerics=job_pb2.Numerics(
                dw_accumulator=(
                    self.dw_accumulator.proto_name if self.dw_accumulator else None
                ),
                allow_tf32=self.allow_tf32,
                dw_segment_rows=self.segment_rows,
            ),
            checksum=(
                matrix_pb2.CHECKSUM_CRC32C
                if self.checksum
                else matrix_pb2.CHECKSUM_UNSPECIFIED
            ),
            max_chunk_bytes=self.max_chunk_bytes,
            required_features=self.features,
            block_rows=self.block_rows,
            segment_sums=self.segment_sums,
        )
        job.regions.extend(job_pb2.SharedRegion(token=name) for name in self.regions)
        for result, dtype in self.results.items():
            getattr(job, result.label).dtype = int(dtype)
        for matrix in (*self.operands, *self.results):
            message = getattr(job, matrix.label)
            if matrix in self.kept:
                kept = self.kept[matrix]
                message.kept.tensor = kept.tensor
                message.kept.last_use = kept.last_use
            elif matrix in self.into:
                _write_destination(message.kept, self.into[matrix])
            elif self.buffers:
                buffer = self.buffers[matrix]
                message.shared.region = buffer.region
                message.shared.offset_bytes = buffer.offset
                message.shared.SetInParent()  # also if both are zero
            else:
                message.inline.SetInParent()
            if matrix in self.keep:
                message.keep.tensor = self.keep[matrix]
        if self.session:
            job.session.session = self.session
            if self.session_step is not None:
                job.session.step = self.session_step
        if self.direct:
            job.direct.connections = self.direct
        self._write_resume(job)
        return job

    def _write_resume(self, job: job_pb2.Job) -> None:
        if self.checkpoint_rows is not None:
            job.checkpoints.rows = self.checkpoint_rows
            job.checkpoints.SetInParent()
        if self.resume is not None:
            job.resume.fingerprint.CopyFrom(self.resume.fingerprint.to_message())
            job.resume.first_row = self.resume.first_row
            job.resume.results_from_row = self.resume.results_from_row
            for result in self.sums if self.brings_sums else ():
                getattr(job.resume, result.partial.label).inline.SetInParent()

    @classmethod
    def from_message(cls, job: job_pb2.Job) -> JobSpec:
        """Check and read a header.

        The checks are the same on every server. Each server also checks its own
        features and limits.

        Raises:
            HeaderError: The header is invalid or has unknown options.
        """
        check_header(job)
        dtype = Dtype(job.dtype)
        results = {
            result: Dtype(getattr(job, result.label).dtype or dtype)
            for result in RESULTS
            if job.HasField(result.label)
        }
        accumulator = job.numerics.dw_accumulator
        spec = cls(
            m=job.m if job.HasField("m") else None,
            n=job.n,
            k=job.k,
            dtype=dtype,
            results=results,
            dw_accumulator=Dtype(accumulator) if accumulator else None,
            allow_tf32=job.numerics.allow_tf32,
            checksum=job.checksum == matrix_pb2.CHECKSUM_CRC32C,
            max_chunk_bytes=job.max_chunk_bytes or DEFAULT_CHUNK_BYTES,
            features=tuple(dict.fromkeys(job.required_features)),
            regions=tuple(region.token for region in job.regions),
            buffers=_read_buffers(job),
            checkpoint_rows=_read_checkpoint_rows(job),
            resume=_read_resume(job),
            session=job.session.session,
            session_step=job.session.step if job.session.HasField("step") else None,
            kept=_read_kept(job),
            keep=_read_keep(job),
            into=_read_into(job),
            block_rows=job.block_rows or None,
            segment_rows=job.numerics.dw_segment_rows or None,
            segment_sums=job.segment_sums,
            direct=job.direct.connections,
        )
        spec._check_overlap()
        return spec

    def _check_overlap(self) -> None:
        taken = list(self.operands)
        for result in self.results:
            for other in taken:
                if self.share_memory(result, other):
                    path = f"{path_of(result)}.offset_bytes"
                    raise HeaderError(
                        Reason.BUFFER_REF_INVALID,
                        f"{path} is {self.buffers[result].offset}, where "
                        f"{result.label} would share bytes with {other.label}",
                        path,
                    )
            taken.append(result)


def _read_buffers(job: job_pb2.Job) -> dict[Matrix, BufferRef]:
    buffers = {}
    for matrix in (*OPERANDS, *RESULTS) if job.regions else ():
        if getattr(job, matrix.label).HasField("shared"):
            shared = getattr(job, matrix.label).shared
            buffers[matrix] = BufferRef(shared.region, shared.offset_bytes)
    return buffers


def _read_checkpoint_rows(job: job_pb2.Job) -> int | None:
    return job.checkpoints.rows if job.HasField("checkpoints") else None


def _read_resume(job: job_pb2.Job) -> Resume | None:
    if not job.HasField("resume"):
        return None
    fingerprint = Fingerprint.from_message(job.resume.fingerprint)
    return Resume(job.resume.first_row, job.resume.results_from_row, fingerprint)


def _read_kept(job: job_pb2.Job) -> dict[Matrix, KeptOperand]:
    return {
        operand: KeptOperand(given.kept.tensor, given.kept.last_use)
        for operand in OPERANDS
        if (given := getattr(job, operand.label)).HasField("kept")
    }


def _read_keep(job: job_pb2.Job) -> dict[Matrix, int]:
    return {
        operand: given.keep.tensor
        for operand in OPERANDS
        if (given := getattr(job, operand.label)).HasField("keep")
    }


def _read_into(job: job_pb2.Job) -> dict[Matrix, KeptResult]:
    into = {}
    for result in RESULTS:
        given = getattr(job, result.label)
        if given.HasField("kept"):
            part = given.kept.add
            add = Contribution(part.step, part.part, part.parts)
            into[result] = KeptResult(
                given.kept.tensor, add if given.kept.HasField("add") else None
            )
    return into


def _write_destination(message: job_pb2.KeptDestination, kept: KeptResult) -> None:
    message.tensor = kept.tensor
    if kept.add is not None:
        message.add.step = kept.add.step
        message.add.part = kept.add.part
        message.add.parts = kept.add.parts
        message.add.SetInParent()
