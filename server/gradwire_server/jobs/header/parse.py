"""What a client asks for: a job's header, checked and with its defaults."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from gradwire_protocol import checksum
from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.limits import (
    DEFAULT_BLOCK_BYTES,
    MAX_INT64,
    MAX_JOB_ID_LENGTH,
    MAX_PAYLOAD_BYTES,
    RESUME,
)
from gradwire_protocol.matrices import OPERANDS, RESULTS, Matrix, operands_for
from gradwire_protocol.v1 import job_pb2, matrix_pb2
from gradwire_server.errors import JobError

FEATURES: tuple[str, ...] = (
    *(("checksum-crc32c",) if checksum.AVAILABLE else ()),
    RESUME,
)
"""Names that a job may require, beyond what every server of v1 has."""

MAX_HEADER_BYTES = 16 * 1024
"""Bytes of a header, which is kept while its job waits and comes back in the
echo; one with every option set has a few hundred."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a matrix lies in shared memory."""

    region: int
    """Index of its region in `JobSpec.regions`."""
    offset: int
    """Where it begins, in bytes."""


class Fingerprint(NamedTuple):
    """What results' last bits depend on, as `gradwire.v1.NumericsFingerprint`."""

    library: str
    device: str
    threads: int
    block_rows: int


@dataclass(frozen=True, slots=True)
class Resume:
    """Where a job goes on that was cut off."""

    first_row: int
    """The first row that is sent."""
    results_from_row: int
    """The first row of which Y and dX are wanted."""
    fingerprint: Fingerprint
    """Of the device on which it was cut off."""


_WIDEST = max(dtype.itemsize for dtype in Dtype)


@dataclass(frozen=True)
class JobSpec:
    """What a job's header asks for, as this server understood it."""

    m: int | None
    """Rows of X and dY; None while it is open."""
    n: int
    k: int
    dtype: Dtype
    results: dict[Matrix, Dtype]
    """The wanted results and their dtypes, in the order Y, dX, dW."""
    accumulator: Dtype
    """In which dW is summed over row blocks."""
    allow_tf32: bool
    checksum: bool
    max_block_bytes: int
    features: tuple[str, ...]
    regions: tuple[str, ...] = field(default=(), repr=False)
    """Tokens of the regions in which all of its matrices lie; secrets."""
    places: dict[Matrix, Place] = field(default_factory=dict)
    """Where in them; empty where the matrices travel in messages."""
    checkpoint_rows: int | None = None
    """How many rows there are at least between two sums of dW that the client is
    sent; 0: one at most, when the job is ended; None: it takes none."""
    resume: Resume | None = None
    """Where the job goes on; None: it begins at its beginning."""

    @property
    def first_row(self) -> int:
        """The first row that is sent."""
        return self.resume.first_row if self.resume else 0

    @property
    def results_from_row(self) -> int:
        """The first row of which Y and dX are wanted."""
        return self.resume.results_from_row if self.resume else 0

    @property
    def brings_dw_sum(self) -> bool:
        """Whether the client sends dW's sum over the rows before the first."""
        return Matrix.DW in self.results and self.first_row > 0

    @cached_property
    def operands(self) -> tuple[Matrix, ...]:
        """The operands that the client sends, in the order X, W, dY."""
        return operands_for(self.results)

    def row_length(self, matrix: Matrix) -> int:
        """Columns of `matrix`, in elements."""
        return matrix.row_length(self.n, self.k)

    def dtype_of(self, matrix: Matrix) -> Dtype:
        """Element type of `matrix` on the wire."""
        if matrix is Matrix.DW_SUM:
            return self.accumulator
        return self.results.get(matrix, self.dtype)

    def whole_bytes(self, matrix: Matrix) -> int:
        """Bytes of `matrix`, once m is known."""
        return self._whole_bytes[matrix]

    def share_memory(self, one: Matrix, other: Matrix) -> bool:
        """Whether two matrices of a job in shared memory have a byte in common."""
        if not self.places:
            return False
        first, second = self.places[one], self.places[other]
        return first.region == second.region and (
            min(
                first.offset + self.whole_bytes(one),
                second.offset + self.whole_bytes(other),
            )
            > max(first.offset, second.offset)
        )

    @cached_property
    def operands_bytes(self) -> int:
        """Bytes of all operands, once m is known."""
        return sum(map(self.whole_bytes, self.operands))

    @cached_property
    def results_bytes(self) -> int:
        """Bytes of all results, once m is known."""
        return sum(map(self.whole_bytes, self.results))

    @cached_property
    def _whole_bytes(self) -> dict[Matrix, int]:
        sizes = {}
        for matrix in Matrix:
            whole = {Matrix.W, Matrix.DW, Matrix.DW_SUM}
            rows = self.n if matrix in whole else self.m or 0
            itemsize = self.dtype_of(matrix).itemsize
            sizes[matrix] = rows * self.row_length(matrix) * itemsize
        return sizes

    @cached_property
    def operations(self) -> int:
        """Multiplications and additions of the job, once m is known."""
        return 2 * len(self.results) * (self.m or 0) * self.n * self.k

    def echo(self) -> job_pb2.Job:
        """The header with every default filled in, without the job's id.

        It is built from what was understood, not copied from what came: an
        option of a newer contract must not come back as if it were in effect.
        """
        job = job_pb2.Job(
            m=self.m,
            n=self.n,
            k=self.k,
            dtype=self.dtype.proto_name,
            numerics=job_pb2.Numerics(
                dw_accumulator=self.accumulator.proto_name, allow_tf32=self.allow_tf32
            ),
            checksum=(
                matrix_pb2.CHECKSUM_CRC32C
                if self.checksum
                else matrix_pb2.CHECKSUM_UNSPECIFIED
            ),
            max_block_bytes=self.max_block_bytes,
            required_features=self.features,
        )
        job.regions.extend(job_pb2.SharedRegion(token=name) for name in self.regions)
        for result, dtype in self.results.items():
            getattr(job, result.label).dtype = dtype.value
        for matrix in (*self.operands, *self.results):
            message = getattr(job, matrix.label)
            if self.places:
                place = self.places[matrix]
                message.shared.region = place.region
                message.shared.offset_bytes = place.offset
            else:
                message.inline.SetInParent()
        if self.checkpoint_rows is not None:
            job.checkpoints.rows = self.checkpoint_rows
            job.checkpoints.SetInParent()
        if self.resume is not None:
            job.resume.first_row = self.resume.first_row
            job.resume.results_from_row = self.resume.results_from_row
            for name, value in self.resume.fingerprint._asdict().items():
                setattr(job.resume.fingerprint, name, value)
            job.resume.fingerprint.SetInParent()
            if self.brings_dw_sum:
                job.resume.dw_sum.inline.SetInParent()
        return job


def job_name(job: job_pb2.Job) -> str:
    """The id by which a job is known: its own, or a fresh one.

    Raises:
        JobError: The id is too long or not printable.
    """
    given = job.job_id
    if not given:
        return f"job-{secrets.token_hex(6)}"
    if len(given) > MAX_JOB_ID_LENGTH or not (given.isascii() and given.isprintable()):
        raise JobError(
            Reason.JOB_ID_INVALID,
            f"job.job_id has {len(given)} characters or unprintable ones: expected "
            f"at most {MAX_JOB_ID_LENGTH} printable ASCII characters",
            field="job.job_id",
        )
    return given


def check_size(job: job_pb2.Job) -> None:
    """Checks that a header is none that fills memory.

    Raises:
        JobError: It is.
    """
    size = job.ByteSize()
    if size > MAX_HEADER_BYTES:
        raise JobError(
            Reason.OPTION_INVALID,
            f"job has {size} bytes: a header has at most {MAX_HEADER_BYTES}",
            field="job",
        )


def read_job(
    job: job_pb2.Job,
    max_columns: int,
    features: tuple[str, ...] = FEATURES,
) -> JobSpec:
    """Checks a header, in the order in which its fields depend on each other.

    Args:
        job: The header.
        max_columns: Largest n and k that the backend takes.
        features: What this server offers.

    Raises:
        JobError: The header asks for what is wrong, unknown or impossible.
    """
    m = job.m if job.HasField("m") else None
    _check_shape(m, job.n, job.k, max_columns)
    dtype = _dtype(job.dtype, "job.dtype")
    results = _read_results(job, dtype)
    _check_operands(job, results)
    numerics = job.numerics
    return JobSpec(
        m=m,
        n=job.n,
        k=job.k,
        dtype=dtype,
        results=results,
        accumulator=_read_accumulator(numerics.dw_accumulator, dtype),
        allow_tf32=numerics.allow_tf32,
        checksum=_read_checksum(job.checksum),
        max_block_bytes=_read_max_block_bytes(job.max_block_bytes),
        features=_read_features(job, features),
    )


def _check_shape(m: int | None, n: int, k: int, max_columns: int) -> None:
    sizes = {"m": m, "n": n, "k": k}
    for name, size in sizes.items():
        if size is not None and size < 0:
            raise JobError(
                Reason.SHAPE_INVALID,
                f"job.{name} is {size}: expected at least 0",
                field=f"job.{name}",
            )
    for one, other in (("n", "k"), ("m", "n"), ("m", "k")):
        first, second = sizes[one], sizes[other]
        if first is None or second is None:
            continue
        if first * second * _WIDEST > MAX_INT64:
            raise JobError(
                Reason.SHAPE_OVERFLOW,
                f"job.{one} = {first} times job.{other} = {second} elements have "
                f"more bytes than 64 bits can count",
                field=f"job.{one}",
            )
    for name in ("n", "k"):
        size = sizes[name]
        if size is not None and size > max_columns:
            raise JobError(
                Reason.SHAPE_INVALID,
                f"job.{name} is {size}: this server takes at most {max_columns}",
                field=f"job.{name}",
            )


def _dtype(number: int, field: str, default: Dtype | None = None) -> Dtype:
    if number == matrix_pb2.DTYPE_UNSPECIFIED and default is not None:
        return default
    try:
        return Dtype(number)
    except ValueError:
        names = ", ".join(f"{dtype.name} ({dtype.value})" for dtype in Dtype)
        raise JobError(
            Reason.DTYPE_INVALID,
            f"{field} is {number}: expected one of {names}",
            field=field,
        ) from None


def _read_results(job: job_pb2.Job, dtype: Dtype) -> dict[Matrix, Dtype]:
    results: dict[Matrix, Dtype] = {}
    for result in RESULTS:
        field = f"job.{result.label}"
        if not job.HasField(result.label):
            continue
        asked: job_pb2.Result = getattr(job, result.label)
        if asked.WhichOneof("destination") is None:
            raise JobError(
                Reason.OPTION_UNKNOWN,
                f"{field}.destination is not set, or is of a kind that this server "
                f"does not know: expected inline",
                field=f"{field}.destination",
            )
        results[result] = _dtype(asked.dtype, f"{field}.dtype", default=dtype)
    if not results:
        raise JobError(
            Reason.RESULTS_MISSING,
            "the job wants no result: expected at least one of job.y, job.dx, job.dw",
            field="job",
        )
    return results


def _check_operands(job: job_pb2.Job, results: dict[Matrix, Dtype]) -> None:
    needed = operands_for(results)
    wanted = ", ".join(result.label for result in results)
    for operand in OPERANDS:
        field = f"job.{operand.label}"
        present = job.HasField(operand.label)
        if present and operand not in needed:
            raise JobError(
                Reason.OPERAND_UNEXPECTED,
                f"{field} is present, but no wanted result ({wanted}) needs it",
                field=field,
            )
        if not present and operand in needed:
            raise JobError(
                Reason.OPERAND_MISSING,
                f"{field} is absent, but the wanted results ({wanted}) need it",
                field=field,
            )
        if present and getattr(job, operand.label).WhichOneof("source") is None:
            raise JobError(
                Reason.OPTION_UNKNOWN,
                f"{field}.source is not set, or is of a kind that this server does "
                f"not know: expected inline",
                field=f"{field}.source",
            )


def _read_accumulator(number: int, dtype: Dtype) -> Dtype:
    field = "job.numerics.dw_accumulator"
    accumulator = _dtype(number, field, default=dtype.sums_in)
    if accumulator.itemsize < dtype.sums_in.itemsize:
        raise JobError(
            Reason.OPTION_INVALID,
            f"{field} is {accumulator.name}: products of {dtype.name} operands are "
            f"summed in {dtype.sums_in.name} or wider",
            field=field,
        )
    return accumulator


def _read_checksum(number: int) -> bool:
    if number == matrix_pb2.CHECKSUM_UNSPECIFIED:
        return False
    if number != matrix_pb2.CHECKSUM_CRC32C or not checksum.AVAILABLE:
        raise JobError(
            Reason.OPTION_UNKNOWN,
            f"job.checksum is {number}: this server does not offer it",
            field="job.checksum",
        )
    return True


def _read_max_block_bytes(given: int) -> int:
    if not 0 <= given <= MAX_PAYLOAD_BYTES:
        raise JobError(
            Reason.OPTION_INVALID,
            f"job.max_block_bytes is {given}: expected 0 to {MAX_PAYLOAD_BYTES}",
            field="job.max_block_bytes",
        )
    return given or DEFAULT_BLOCK_BYTES


def _read_features(job: job_pb2.Job, features: tuple[str, ...]) -> tuple[str, ...]:
    for position, feature in enumerate(job.required_features):
        if feature not in features:
            offered = ", ".join(features) or "none"
            raise JobError(
                Reason.FEATURE_UNKNOWN,
                f"job.required_features[{position}] is {feature[:64]!r}: this server "
                f"offers {offered}",
                field=f"job.required_features[{position}]",
            )
    return tuple(dict.fromkeys(job.required_features))
