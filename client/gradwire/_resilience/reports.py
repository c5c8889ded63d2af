"""Reports to a server of failures that only its clients can find."""

from __future__ import annotations

from gradwire._api.errors import ChecksumError, GradwireError, VerificationError
from gradwire._api.options import MetadataPairs
from gradwire_protocol.limits import DAMAGED, REPORT_JOB_KEY, REPORT_KEY, WRONG

REPORT_S = 1.0
"""Longest time that a call which fails anyway waits for its report, in seconds."""


def report_of(error: GradwireError) -> MetadataPairs | None:
    """Return the metadata that reports a failure; None if the server knows of it.

    The server's operator can do something about wrong results, and may not hear of
    them otherwise. The report has the kind of the failure and the job's id.
    """
    if isinstance(error, VerificationError):
        what = WRONG
    elif isinstance(error, ChecksumError) and not error.metadata:
        what = DAMAGED  # the server's own errors have metadata
    else:
        return None
    job = ((REPORT_JOB_KEY, error.job_id),) if error.job_id else ()
    return ((REPORT_KEY, what), *job)
