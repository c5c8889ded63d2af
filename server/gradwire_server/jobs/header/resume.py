"""Checks of resumed jobs.

A resumed job has the row blocks of the whole job. It begins at a later block, with the
sum over the earlier rows, and adds the same products in the same order. The result is
the same if the device computes the same bits, as its fingerprint tells.
"""

from __future__ import annotations

from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.job_spec import Fingerprint, JobSpec
from gradwire_protocol.v1 import job_pb2
from gradwire_server.errors import JobError


def require_same_bits(spec: JobSpec, here: job_pb2.NumericsFingerprint) -> None:
    """Check that a resumed job gets the same bits on this device.

    Args:
        spec: The job's specification.
        here: Fingerprint of the job's device.

    Raises:
        JobError: The fingerprints differ.
    """
    if spec.resume is None:
        return
    before = spec.resume.fingerprint
    for name in Fingerprint._fields:
        was, would_be = getattr(before, name), getattr(here, name)
        if was != would_be:
            raise _mismatch(name, was, would_be)


def check_grid(spec: JobSpec, block_rows: int) -> None:
    """Check that a job resumes at the beginning of a row block.

    With sums and segments, it is the beginning of a segment, too.

    Raises:
        JobError: It does not, or the row blocks here have another size.
    """
    if spec.resume is None:
        return
    segment_rows = spec.segment_rows or block_rows
    here = {"block_rows": block_rows, "segment_rows": segment_rows}
    for name, rows in here.items():
        before = getattr(spec.resume.fingerprint, name)
        if before != rows:
            raise _mismatch(name, before, rows)
    for name, unit in (
        # The sum over the earlier rows is that of whole segments.
        ("first_row", segment_rows if spec.sums else block_rows),
        ("results_from_row", block_rows),
    ):
        row = getattr(spec.resume, name)
        if row % unit:
            path = f"job.resume.{name}"
            raise JobError(
                Reason.OPTION_INVALID,
                f"{path} is {row}: expected a multiple of {unit}",
                field=path,
            )


def _mismatch(name: str, was: object, would_be: object) -> JobError:
    # Truncated, because the client chose the text.
    return JobError(
        Reason.RESUME_MISMATCH,
        f"job.resume.fingerprint.{name} is {repr(was)[:100]}, and is "
        f"{repr(would_be)[:100]} here: the job has to begin anew",
        field="job.resume.fingerprint",
    )
