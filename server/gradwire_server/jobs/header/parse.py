"""Parsing of a job's header, checked against the server's features."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace

from gradwire_protocol import checksum
from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.header_checks import HeaderError, path_of
from gradwire_protocol.job_spec import JobSpec
from gradwire_protocol.limits import (
    BLOCK_ROWS,
    EARLY_ROWS,
    FROZEN_TENSORS,
    MAX_JOB_ID_LENGTH,
    RESUME,
    SEGMENTS,
    SESSIONS,
    SHARED_MEMORY,
)
from gradwire_protocol.v1 import job_pb2
from gradwire_server.errors import JobError

FEATURES: tuple[str, ...] = (
    *(("checksum-crc32c",) if checksum.AVAILABLE else ()),
    RESUME,
    SESSIONS,
    BLOCK_ROWS,
    EARLY_ROWS,
    FROZEN_TENSORS,
    SEGMENTS,
)
"""Features that a job may require, in addition to those of every v1 server."""

MAX_HEADER_BYTES = 16 * 1024
"""Maximum bytes of a header. It is kept while its job waits, and returned in the echo.
With every option set, a header has a few hundred bytes."""


def is_job_id(text: str) -> bool:
    """Return whether a job may have this id: it stands in logs."""
    return len(text) <= MAX_JOB_ID_LENGTH and text.isascii() and text.isprintable()


def parse_job_id(job: job_pb2.Job) -> str:
    """Return the job's id, or a new one if the header has none.

    Raises:
        JobError: The id is too long or not printable.
    """
    given = job.job_id
    if not given:
        return f"job-{secrets.token_hex(6)}"
    if not is_job_id(given):
        raise JobError(
            Reason.JOB_ID_INVALID,
            f"job.job_id has {len(given)} characters or unprintable ones: expected "
            f"at most {MAX_JOB_ID_LENGTH} printable ASCII characters",
            field="job.job_id",
        )
    return given


def check_header_size(job: job_pb2.Job) -> None:
    """Check that a header is small enough to keep.

    Raises:
        JobError: The header has more than `MAX_HEADER_BYTES`.
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
    """Return the job's specification, with every default filled in.

    Args:
        job: The header.
        max_columns: Largest n and k that the backend accepts.
        features: The server's features.

    Raises:
        JobError: The header is invalid, or asks for an unknown or impossible option.
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
    results = dict(spec.results)
    if spec.segment_sums:  # they leave as partial sums, which are not rounded
        results |= dict.fromkeys(spec.sums, spec.accumulator)
    return replace(spec, dw_accumulator=spec.accumulator, results=results)


def check_features(required: Sequence[str], offered: Sequence[str], path: str) -> None:
    """Check that a server has all required features.

    Args:
        required: Names of features.
        offered: The server's features.
        path: Path of the field with the names.

    Raises:
        JobError: The server does not have one.
    """
    for position, feature in enumerate(required):
        if feature not in offered:
            field = f"{path}[{position}]"
            raise JobError(
                Reason.FEATURE_UNKNOWN,
                f"{field} is {feature[:64]!r}: this server offers "
                f"{', '.join(offered) or 'none'}",
                field=field,
            )


def _check_features(spec: JobSpec, features: tuple[str, ...]) -> None:
    check_features(spec.features, features, "job.required_features")
    if spec.buffers and SHARED_MEMORY not in features:
        path = path_of(next(iter(spec.buffers)))
        raise JobError(
            Reason.OPTION_UNKNOWN,
            f"{path} asks for shared memory, which this server does not allow",
            field=path,
        )
