"""Encoding of error details: `google.rpc.Status` in a trailer.

Name and content of the trailer follow gRPC's richer error model
(https://grpc.io/docs/guides/error/#richer-error-model), so the status libraries
of all languages can read it. grpcio-status is not used, because it pins a range of
protobuf versions that the base install must not require.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.message import DecodeError
from grpc import StatusCode

from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.rich_status import BadRequest, ErrorInfo, RetryInfo, Status

TRAILER = "grpc-status-details-bin"
DOMAIN = "gradwire"


@dataclass(frozen=True, slots=True)
class ErrorDetails:
    """Details of an error in addition to its status and text."""

    reason: Reason | None = None
    """The reason; None for an error from gRPC, a proxy or a newer server."""

    fields: Mapping[str, str] = field(default_factory=dict)
    """Descriptions of invalid request fields, by field path."""

    metadata: Mapping[str, str] = field(default_factory=dict)
    """The job's id (``job_id``) and further data of the reason."""

    retry_after_s: float | None = None
    """Seconds after which the same call may succeed."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The end of a call as its server wrote it, whatever a proxy made of the status."""

    status: StatusCode | None
    """The status; None if it is none of gRPC's."""

    message: str
    """The message."""

    details: ErrorDetails
    """The details."""

    from_gradwire: bool
    """Whether a gradwire server has written it: there is an ErrorInfo with its
    domain."""


def encode(
    status: StatusCode, message: str, details: ErrorDetails
) -> tuple[tuple[str, bytes], ...]:
    """Encode `details` as trailing metadata."""
    parts: list[Any] = []
    if details.reason is not None:
        parts.append(
            ErrorInfo(reason=details.reason, domain=DOMAIN, metadata=details.metadata)
        )
    if details.fields:
        parts.append(
            BadRequest(
                field_violations=[
                    BadRequest.FieldViolation(field=name, description=text)
                    for name, text in details.fields.items()
                ]
            )
        )
    if details.retry_after_s is not None:
        retry = RetryInfo()
        retry.retry_delay.FromNanoseconds(round(details.retry_after_s * 1e9))
        parts.append(retry)
    packed = Status(code=status.value[0], message=message)
    for part in parts:
        packed.details.add().Pack(part)
    return ((TRAILER, packed.SerializeToString()),)


def decode(trailer: bytes) -> ErrorDetails:
    """Decode the trailer's value; empty details if it is damaged."""
    return decode_answer(trailer).details


def decode_answer(trailer: bytes) -> Answer:
    """Decode the trailer's value with its status; empty if it is damaged."""
    try:
        packed = Status.FromString(trailer)
        details, from_gradwire = _collect(list(packed.details))
    except DecodeError:
        return Answer(None, "", ErrorDetails(), from_gradwire=False)
    status = _BY_NUMBER.get(packed.code)
    return Answer(status, packed.message, details, from_gradwire)


_BY_NUMBER = {status.value[0]: status for status in StatusCode}


def _collect(parts: list[Any]) -> tuple[ErrorDetails, bool]:
    reason: Reason | None = None
    fields: dict[str, str] = {}
    metadata: dict[str, str] = {}
    retry_after_s: float | None = None
    from_gradwire = False
    for part in parts:
        info, bad_request, retry = ErrorInfo(), BadRequest(), RetryInfo()
        if part.Unpack(info) and info.domain == DOMAIN:
            from_gradwire = True
            reason = Reason.__members__.get(info.reason)
            metadata = dict(info.metadata)
        elif part.Unpack(bad_request):
            fields = {v.field: v.description for v in bad_request.field_violations}
        elif part.Unpack(retry):
            retry_after_s = max(0.0, retry.retry_delay.ToNanoseconds() / 1e9)
    return ErrorDetails(reason, fields, metadata, retry_after_s), from_gradwire
