"""A job's header, checked against what this server offers."""

from __future__ import annotations

import secrets
from dataclasses import replace

from gradwire_protocol import checksum
from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.header_checks import HeaderError, path_of
from gradwire_protocol.job_spec import JobSpec
from gradwire_protocol.limits import MAX_JOB_ID_LENGTH, RESUME, SHARED_MEMORY
from gradwire_protocol.v1 import job_pb2
from gradwire_server.errors import JobError

FEATURES: tuple[str, ...] = (
    *(("checksum-crc32c",) if checksum.AVAILABLE else ()),
    RESUME,
)
"""Names that a job may require, beyond what every server of v1 has."""

MAX_HEADER_BYTES = 16 * 1024
"""Bytes of a header, which is kept while its job waits and comes back in the
echo; one with every option set has a few hundred."""


def parse_job_id(job: job_pb2.Job) -> str:
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


def check_header_size(job: job_pb2.Job) -> None:
    """Checks that a header does not fill memory.

    Raises:
        JobError: It has more than `MAX_HEADER_BYTES`.
    """
    size = job.ByteSize()
    if size > MAX_HEADER_BYTES:
        raise JobError(
            Reason.OPTION_INVALID,
            f"job has {size} bytes: a header has at most {MAX_HEADER_BYTES}",
            field="job",
        )


def parse_header(
    job: job_pb2.Job,
    max_columns: int,
    features: tuple[str, ...] = FEATURES,
) -> JobSpec:
    """What a header asks for, with every default filled in.

    Args:
        job: The header.
        max_columns: Largest n and k that the backend takes.
        features: What this server offers.

    Raises:
        JobError: The header asks for what is wrong, unknown or impossible.
    """
    try:
        spec = JobSpec.from_message(job)
    except HeaderError as error:
        raise JobError(error.reason, str(error), field=error.field) from None
    for name, size in (("n", spec.n), ("k", spec.k)):
        if size > max_columns:
            raise JobError(
                Reason.SHAPE_INVALID,
                f"job.{name} is {size}: this server takes at most {max_columns}",
                field=f"job.{name}",
            )
    if spec.checksum and not checksum.AVAILABLE:
        raise JobError(
            Reason.OPTION_UNKNOWN,
            f"job.checksum is {job.checksum}: this server does not offer it",
            field="job.checksum",
        )
    _check_features(spec, features)
    return replace(spec, dw_accumulator=spec.accumulator)


def _check_features(spec: JobSpec, features: tuple[str, ...]) -> None:
    for position, feature in enumerate(spec.features):
        if feature not in features:
            offered = ", ".join(features) or "none"
            path = f"job.required_features[{position}]"
            raise JobError(
                Reason.FEATURE_UNKNOWN,
                f"{path} is {feature[:64]!r}: this server offers {offered}",
                field=path,
            )
    if spec.buffers and SHARED_MEMORY not in features:
        path = path_of(next(iter(spec.buffers)))
        raise JobError(
            Reason.OPTION_UNKNOWN,
            f"{path} asks for shared memory, which this server does not allow",
            field=path,
        )
