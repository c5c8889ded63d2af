"""Jobs that go on where others were cut off.

Such a job has the row blocks of the whole job and begins with a later one, with
the sums over the rows before it: the same products, added in the same order. That
holds where the device computes the same bits, which its fingerprint says.
"""

from __future__ import annotations

from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.job_spec import Fingerprint, JobSpec
from gradwire_protocol.v1 import job_pb2
from gradwire_server.errors import JobError


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
            raise _mismatch(name, was, would_be)


def check_grid(spec: JobSpec, block_rows: int) -> None:
    """Checks that a job goes on at the beginning of a row block.

    Raises:
        JobError: It does not, or would have other row blocks here.
    """
    if spec.resume is None:
        return
    if spec.resume.fingerprint.block_rows != block_rows:
        raise _mismatch("block_rows", spec.resume.fingerprint.block_rows, block_rows)
    for name in ("first_row", "results_from_row"):
        row = getattr(spec.resume, name)
        if row % block_rows:
            path = f"job.resume.{name}"
            raise JobError(
                Reason.OPTION_INVALID,
                f"{path} is {row}: expected a multiple of {block_rows}",
                field=path,
            )


def _mismatch(name: str, was: object, would_be: object) -> JobError:
    # A client's own text is cut to what is worth reading.
    return JobError(
        Reason.RESUME_MISMATCH,
        f"job.resume.fingerprint.{name} is {repr(was)[:100]}, and is "
        f"{repr(would_be)[:100]} here: the job has to begin anew",
        field="job.resume.fingerprint",
    )
