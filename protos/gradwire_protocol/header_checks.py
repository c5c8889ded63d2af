"""Checks of a job's header that are the same on every server.

Fields are checked in the order of their dependencies. Each server also checks its
own features and limits.
"""

from __future__ import annotations

from collections.abc import Collection

from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.limits import (
    MAX_INT64,
    MAX_PAYLOAD_BYTES,
    SHARED_ALIGNMENT,
)
from gradwire_protocol.matrices import (
    OPERANDS,
    PARTIAL_SUMS,
    RESULTS,
    SUMS,
    Matrix,
    operands_for,
)
from gradwire_protocol.v1 import job_pb2, matrix_pb2

_WIDEST = max(dtype.itemsize for dtype in Dtype)


class HeaderError(ValueError):
    """An invalid header; the text is a sentence.

    Args:
        reason: The stable reason, as in the contract.
        message: The given and the expected value.
        field: Path of the invalid field.
    """

    def __init__(self, reason: Reason, message: str, field: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.field = field


def check_header(job: job_pb2.Job) -> None:
    """Check a header.

    Raises:
        HeaderError: The header is invalid or has unknown options.
    """
    m = job.m if job.HasField("m") else None
    _check_shape(m, job.n, job.k)
    dtype = _dtype(job.dtype, "job.dtype")
    results = _check_results(job)
    _check_operands(job, results)
    _check_accumulator(job.numerics.dw_accumulator, dtype)
    if job.checksum not in {
        matrix_pb2.CHECKSUM_UNSPECIFIED,
        matrix_pb2.CHECKSUM_CRC32C,
    }:
        raise HeaderError(
            Reason.OPTION_UNKNOWN,
            f"job.checksum is {job.checksum}: this server does not offer it",
            "job.checksum",
        )
    if not 0 <= job.max_chunk_bytes <= MAX_PAYLOAD_BYTES:
        raise HeaderError(
            Reason.OPTION_INVALID,
            f"job.max_chunk_bytes is {job.max_chunk_bytes}: expected 0 to "
            f"{MAX_PAYLOAD_BYTES}",
            "job.max_chunk_bytes",
        )
    _check_power_of_two("block_rows", job.block_rows)
    _check_power_of_two("numerics.dw_segment_rows", job.numerics.dw_segment_rows)
    _check_kept(job, m, results)
    _check_shared_memory(
        job,
        [
            matrix
            for matrix in (*operands_for(results), *results)
            if not getattr(job, matrix.label).HasField("kept")
        ],
    )
    if job.HasField("direct"):
        _check_direct(job)
    if job.HasField("checkpoints"):
        _check_checkpoints(job, results)
    if job.HasField("resume"):
        _check_resume(job.resume, m, results)
    if job.segment_sums:
        _check_segment_sums(job, results)


def _check_direct(job: job_pb2.Job) -> None:
    if job.direct.connections < 1:
        raise _invalid(
            "direct.connections",
            f"is {job.direct.connections}: expected at least 1",
        )
    if job.regions:
        raise _invalid(
            "direct", "is present, but the job's matrices are in shared memory"
        )


def path_of(matrix: Matrix) -> str:
    """Path of the field with a matrix's source or destination."""
    kind = "source" if matrix in OPERANDS else "destination"
    return f"job.{matrix.label}.{kind}"


def _check_shape(m: int | None, n: int, k: int) -> None:
    sizes = {"m": m, "n": n, "k": k}
    for name, size in sizes.items():
        if size is not None and size < 0:
            raise HeaderError(
                Reason.SHAPE_INVALID,
                f"job.{name} is {size}: expected at least 0",
                f"job.{name}",
            )
    for one, other in (("n", "k"), ("m", "n"), ("m", "k")):
        first, second = sizes[one], sizes[other]
        if first is None or second is None:
            continue
        if first * second * _WIDEST > MAX_INT64:
            raise HeaderError(
                Reason.SHAPE_OVERFLOW,
                f"job.{one} = {first} times job.{other} = {second} elements have "
                f"more bytes than 64 bits can count",
                f"job.{one}",
            )


def _dtype(number: int, path: str) -> Dtype:
    try:
        return Dtype(number)
    except ValueError:
        names = ", ".join(f"{dtype.name} ({dtype.value})" for dtype in Dtype)
        raise HeaderError(
            Reason.DTYPE_INVALID, f"{path} is {number}: expected one of {names}", path
        ) from None


def _check_results(job: job_pb2.Job) -> tuple[Matrix, ...]:
    results = []
    for result in RESULTS:
        path = f"job.{result.label}"
        if not job.HasField(result.label):
            continue
        asked: job_pb2.Result = getattr(job, result.label)
        if asked.WhichOneof("destination") is None:
            raise _unknown_kind(f"{path}.destination")
        if asked.dtype:
            _dtype(asked.dtype, f"{path}.dtype")
        results.append(result)
    if not results:
        names = ", ".join(f"job.{result.label}" for result in RESULTS)
        raise HeaderError(
            Reason.RESULTS_MISSING,
            f"the job wants no result: expected at least one of {names}",
            "job",
        )
    return tuple(results)


def _check_operands(job: job_pb2.Job, results: Collection[Matrix]) -> None:
    needed = operands_for(results)
    wanted = ", ".join(result.label for result in results)
    for operand in OPERANDS:
        path = f"job.{operand.label}"
        present = job.HasField(operand.label)
        if present and operand not in needed:
            raise HeaderError(
                Reason.OPERAND_UNEXPECTED,
                f"{path} is present, but no wanted result ({wanted}) needs it",
                path,
            )
        if not present and operand in needed:
            raise HeaderError(
                Reason.OPERAND_MISSING,
                f"{path} is absent, but the wanted results ({wanted}) need it",
                path,
            )
        if present and getattr(job, operand.label).WhichOneof("source") is None:
            raise _unknown_kind(f"{path}.source")


def _check_kept(job: job_pb2.Job, m: int | None, results: Collection[Matrix]) -> None:
    operands = operands_for(results)
    given = {matrix: getattr(job, matrix.label) for matrix in (*operands, *results)}
    numbers: dict[int, str] = {}
    for matrix, message in given.items():
        if message.HasField("kept"):
            path = f"{path_of(matrix)}.tensor"
            if matrix in results and not matrix.is_sum:
                sums = " and ".join(result.label for result in SUMS)
                raise HeaderError(
                    Reason.OPTION_INVALID,
                    f"{path_of(matrix)} is kept: only {sums} can stay in a session",
                    path_of(matrix),
                )
            _check_tensor(message.kept.tensor, path, numbers)
            if matrix in results:
                _check_part(message.kept, path_of(matrix))
        if matrix in operands and message.HasField("keep"):
            path = f"job.{matrix.label}.keep"
            if not matrix.row_wise or message.HasField("kept"):
                raise HeaderError(
                    Reason.OPTION_INVALID,
                    f"{path} is present: a job can keep x and dy that are sent to it",
                    path,
                )
            _check_tensor(message.keep.tensor, f"{path}.tensor", numbers)
    if job.HasField("session") != bool(numbers):
        raise _invalid(
            "session",
            "is absent, but the job uses kept tensors"
            if numbers
            else "is present, but the job uses no kept tensors",
        )
    if not numbers:
        return
    if m is None:
        raise HeaderError(
            Reason.SHAPE_INVALID,
            "job.m is absent: a job with kept tensors needs it",
            "job.m",
        )
    for path in ("checkpoints", "resume"):
        if job.HasField(path):
            raise _invalid(path, "is present: a job with kept tensors has none")


def _check_tensor(number: int, path: str, numbers: dict[int, str]) -> None:
    if not number:
        raise HeaderError(
            Reason.OPTION_INVALID, f"{path} is 0: expected at least 1", path
        )
    if number in numbers:
        raise HeaderError(
            Reason.OPTION_INVALID,
            f"{path} is {number}, as {numbers[number]} is: expected another number",
            path,
        )
    numbers[number] = path


def _check_part(kept: job_pb2.KeptDestination, path: str) -> None:
    part = kept.add
    if kept.HasField("add") and part.parts and part.part >= part.parts:
        raise HeaderError(
            Reason.OPTION_INVALID,
            f"{path}.add.part is {part.part}: expected less than {part.parts}, the "
            f"number of parts",
            f"{path}.add.part",
        )


def _unknown_kind(path: str) -> HeaderError:
    return HeaderError(
        Reason.OPTION_UNKNOWN,
        f"{path} is not set, or is of a kind that this server does not know: expected "
        f"inline",
        path,
    )


def _check_accumulator(number: int, dtype: Dtype) -> None:
    if number == matrix_pb2.DTYPE_UNSPECIFIED:
        return
    path = "job.numerics.dw_accumulator"
    accumulator = _dtype(number, path)
    if accumulator not in dtype.accumulators:
        raise HeaderError(
            Reason.OPTION_INVALID,
            f"{path} is {accumulator.name}: products of {dtype.name} operands are "
            f"summed in {dtype.sums_in.name} or wider",
            path,
        )


def _check_shared_memory(job: job_pb2.Job, matrices: Collection[Matrix]) -> None:
    shared = [matrix for matrix in matrices if _lies_in_a_region(job, matrix)]
    if not shared:
        if job.regions:
            raise _bad_buffer_ref(
                "job.regions", "is not empty, but no matrix lies in one"
            )
        return
    for matrix in matrices:
        if matrix not in shared:
            raise _bad_buffer_ref(
                path_of(matrix),
                f"is inline, but {shared[0].label} lies in shared memory: expected all "
                f"matrices of a job in one or the other",
            )
    if not job.HasField("m"):
        raise HeaderError(
            Reason.SHAPE_INVALID,
            "job.m is absent: a job in shared memory needs it",
            "job.m",
        )
    if job.checksum:
        raise HeaderError(
            Reason.OPTION_INVALID,
            "job.checksum is CHECKSUM_CRC32C: a job in shared memory has no payloads",
            "job.checksum",
        )
    tokens = [region.token for region in job.regions]
    if len(set(tokens)) < len(tokens):
        raise _bad_buffer_ref("job.regions", "names a region twice")
    for matrix in matrices:
        _check_buffer(job, matrix)
    for path in ("checkpoints", "resume"):
        if job.HasField(path):
            raise _invalid(path, "is present: a job in shared memory has none")


def _lies_in_a_region(job: job_pb2.Job, matrix: Matrix) -> bool:
    kind = path_of(matrix).rpartition(".")[2]
    return bool(getattr(job, matrix.label).WhichOneof(kind) == "shared")


def _check_buffer(job: job_pb2.Job, matrix: Matrix) -> None:
    given = getattr(job, matrix.label).shared
    if not 0 <= given.region < len(job.regions):
        raise _bad_buffer_ref(
            f"{path_of(matrix)}.region",
            f"is {given.region}, and job.regions has {len(job.regions)} entries",
        )
    if given.offset_bytes < 0 or given.offset_bytes % SHARED_ALIGNMENT:
        raise _bad_buffer_ref(
            f"{path_of(matrix)}.offset_bytes",
            f"is {given.offset_bytes}: expected a multiple of {SHARED_ALIGNMENT}, at "
            f"least 0",
        )


def _check_checkpoints(job: job_pb2.Job, results: Collection[Matrix]) -> None:
    if not any(matrix in results for matrix in SUMS):
        reasons = " and ".join(f"{result.label} is not wanted" for result in SUMS)
        raise _invalid("checkpoints", f"is present, but {reasons}")
    rows = job.checkpoints.rows
    if rows < 0:
        raise _invalid("checkpoints.rows", f"is {rows}: expected at least 0")


def _check_resume(
    given: job_pb2.Resume, m: int | None, results: Collection[Matrix]
) -> None:
    if not given.HasField("fingerprint"):
        raise _invalid("resume.fingerprint", "is absent: Accepted has it")
    first, results_from = given.first_row, given.results_from_row
    if first < 0 or (m is not None and first > m):
        expected = "at least 0" if m is None else f"0 to {m}"
        raise _invalid("resume.first_row", f"is {first}: expected {expected}")
    if results_from < first:
        raise _invalid(
            "resume.results_from_row", f"is {results_from}: expected at least {first}"
        )
    for matrix, result in PARTIAL_SUMS.items():
        needed = result in results and bool(first)
        path = f"job.resume.{matrix.label}"
        if given.HasField(matrix.label) != needed:
            name = result.label
            raise HeaderError(
                Reason.OPERAND_MISSING if needed else Reason.OPERAND_UNEXPECTED,
                f"{path} is absent, but {name} is wanted and first_row is not 0"
                if needed
                else f"{path} is present, but {name} is not wanted or first_row is 0",
                path,
            )
        source = getattr(given, matrix.label)
        if needed and source.WhichOneof("source") != "inline":
            raise _unknown_kind(f"{path}.source")


def _check_power_of_two(path: str, number: int) -> None:
    if number < 0 or number & (number - 1):
        raise _invalid(path, f"is {number}: expected a power of two, or 0")


def _check_segment_sums(job: job_pb2.Job, results: Collection[Matrix]) -> None:
    if not any(matrix in results for matrix in SUMS):
        reasons = " and ".join(f"{result.label} is not wanted" for result in SUMS)
        raise _invalid("segment_sums", f"is true, but {reasons}")
    if not job.numerics.dw_segment_rows:
        raise _invalid(
            "numerics.dw_segment_rows",
            "is 0: a job with segment_sums needs it, a power of two",
        )
    for path in ("checkpoints", "resume", "session"):
        if job.HasField(path):
            raise _invalid(path, "is present: a job with segment_sums has none")
    if job.regions:
        raise _invalid(
            "segment_sums", "is true, but the job's matrices are in shared memory"
        )


def _invalid(path: str, what: str) -> HeaderError:
    return HeaderError(Reason.OPTION_INVALID, f"job.{path} {what}", f"job.{path}")


def _bad_buffer_ref(path: str, what: str) -> HeaderError:
    return HeaderError(Reason.BUFFER_REF_INVALID, f"{path} {what}", path)
