"""Jobs that can be cut off: sums of dW in between, and going on where one was.

A job that goes on has the row blocks of the whole job and begins with a later
one, with dW's sum over the rows before it: the same products, added in the
same order. That holds where the device computes the same bits, which its
fingerprint says.
"""

from __future__ import annotations

from dataclasses import replace

from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.matrices import Matrix
from gradwire_protocol.v1 import job_pb2
from gradwire_server.errors import JobError
from gradwire_server.jobs.header.parse import Fingerprint, JobSpec, Resume


def read_resuming(job: job_pb2.Job, spec: JobSpec) -> JobSpec:
    """The job with what its header says of checkpoints and of going on.

    Args:
        job: The header.
        spec: What was read of it so far, its places too.

    Raises:
        JobError: It is wrong.
    """
    for field in ("checkpoints", "resume"):
        if job.HasField(field) and spec.places:
            raise _invalid(field, "is present: a job in shared memory has none")
    if job.HasField("checkpoints"):
        spec = replace(spec, checkpoint_rows=_read_checkpoints(job.checkpoints, spec))
    if job.HasField("resume"):
        spec = replace(spec, resume=_read_resume(job.resume, spec))
    return spec


def require_same_bits(spec: JobSpec, here: job_pb2.NumericsFingerprint) -> None:
    """Checks that a job goes on where the same bits come out.

    Args:
        spec: What was asked.
        here: The fingerprint of the device on which it would run.

    Raises:
        JobError: Other bits come out here.
    """
    if spec.resume is None:
        return
    before = spec.resume.fingerprint
    for name in Fingerprint._fields:
        was, would_be = getattr(before, name), getattr(here, name)
        if was != would_be:
            raise JobError(
                Reason.RESUME_MISMATCH,
                f"job.resume.fingerprint.{name} is {_shown(was)}, and is "
                f"{_shown(would_be)} here: the job has to begin anew",
                field="job.resume.fingerprint",
            )


def check_grid(spec: JobSpec, block_rows: int) -> None:
    """Checks that a job goes on at the beginning of a row block.

    Raises:
        JobError: It does not, or would have other row blocks here.
    """
    if spec.resume is None:
        return
    if spec.resume.fingerprint.block_rows != block_rows:
        raise JobError(
            Reason.RESUME_MISMATCH,
            f"job.resume.fingerprint.block_rows is "
            f"{spec.resume.fingerprint.block_rows}, and is {block_rows} here: the job "
            f"has to begin anew",
            field="job.resume.fingerprint",
        )
    for field in ("first_row", "results_from_row"):
        row = getattr(spec.resume, field)
        if row % block_rows:
            raise _invalid(
                f"resume.{field}", f"is {row}: expected a multiple of {block_rows}"
            )


def _read_checkpoints(given: job_pb2.Checkpoints, spec: JobSpec) -> int:
    if Matrix.DW not in spec.results:
        raise _invalid("checkpoints", "is present, but dw is not wanted")
    if given.rows < 0:
        raise _invalid("checkpoints.rows", f"is {given.rows}: expected at least 0")
    return given.rows


def _read_resume(given: job_pb2.Resume, spec: JobSpec) -> Resume:
    if not given.HasField("fingerprint"):
        raise _invalid("resume.fingerprint", "is absent: Accepted has it")
    first, results = given.first_row, given.results_from_row
    if first < 0 or (spec.m is not None and first > spec.m):
        expected = "at least 0" if spec.m is None else f"0 to {spec.m}"
        raise _invalid("resume.first_row", f"is {first}: expected {expected}")
    sums = Matrix.DW in spec.results
    if results < first:
        raise _invalid(
            "resume.results_from_row", f"is {results}: expected at least {first}"
        )
    if given.HasField("dw_sum") != bool(sums and first):
        raise JobError(
            Reason.OPERAND_MISSING if sums and first else Reason.OPERAND_UNEXPECTED,
            "job.resume.dw_sum is absent, but dw is wanted and first_row is not 0"
            if sums and first
            else "job.resume.dw_sum is present, but dw is not wanted or first_row is 0",
            field="job.resume.dw_sum",
        )
    if sums and first and given.dw_sum.WhichOneof("source") != "inline":
        raise JobError(
            Reason.OPTION_UNKNOWN,
            "job.resume.dw_sum.source is not set, or is of a kind that this server "
            "does not know: expected inline",
            field="job.resume.dw_sum.source",
        )
    fingerprint = given.fingerprint
    return Resume(
        first_row=first,
        results_from_row=results,
        fingerprint=Fingerprint(
            fingerprint.library,
            fingerprint.device,
            fingerprint.threads,
            fingerprint.block_rows,
        ),
    )


def _shown(value: object) -> str:
    """A client's own text, cut to what is worth reading."""
    return repr(value)[:100]


def _invalid(path: str, what: str) -> JobError:
    field = f"job.{path}"
    return JobError(Reason.OPTION_INVALID, f"{field} {what}", field=field)
