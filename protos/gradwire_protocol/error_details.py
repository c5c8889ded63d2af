"""How the details of an error travel: `google.rpc.Status` in a trailer.

The trailer's name and content are those of gRPC's richer error model
(https://grpc.io/docs/guides/error/#richer-error-model), so that any
language's status library reads them. They are written here because
grpcio-status pins a range of protobuf that the base install must not have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc import StatusCode

from gradwire_protocol.error_reasons import Reason

TRAILER = "grpc-status-details-bin"
DOMAIN = "gradwire"


@dataclass(frozen=True, slots=True)
class ErrorDetails:
    """What an error says beside its status and its text."""

    reason: Reason | None = None
    """Why; None for an error that gRPC, a proxy or a newer server made."""

    fields: Mapping[str, str] = field(default_factory=dict)
    """What is wrong with which field of the request, by the field's path."""

    metadata: Mapping[str, str] = field(default_factory=dict)
    """The job's id (``job_id``) and what else the reason comes with."""

    retry_after_s: float | None = None
    """Seconds after which the same call may succeed."""


def encode(
    status: StatusCode, message: str, details: ErrorDetails
) -> tuple[tuple[str, bytes], ...]:
    """The trailing metadata that carries `details`."""
    parts: list[ErrorInfo | BadRequest | RetryInfo] = []
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
        delay = Duration()
        delay.FromNanoseconds(round(details.retry_after_s * 1e9))
        parts.append(RetryInfo(retry_delay=delay))
    packed = Status(code=status.value[0], message=message)
    for part in parts:
        packed.details.add().Pack(part)
    return ((TRAILER, packed.SerializeToString()),)


def decode(trailer: bytes) -> ErrorDetails:
    """The details in the value of the trailer; empty ones if it is damaged."""
    try:
        packed = Status.FromString(trailer)
        return _collect(list(packed.details))
    except DecodeError:
        return ErrorDetails()


def _collect(parts: list[AnyMessage]) -> ErrorDetails:
    reason: Reason | None = None
    fields: dict[str, str] = {}
    metadata: dict[str, str] = {}
    retry_after_s: float | None = None
    for part in parts:
        info, bad_request, retry = ErrorInfo(), BadRequest(), RetryInfo()
        if part.Unpack(info) and info.domain == DOMAIN:
            reason = Reason.__members__.get(info.reason)
            metadata = dict(info.metadata)
        elif part.Unpack(bad_request):
            fields = {v.field: v.description for v in bad_request.field_violations}
        elif part.Unpack(retry):
            retry_after_s = max(0.0, retry.retry_delay.ToNanoseconds() / 1e9)
    return ErrorDetails(reason, fields, metadata, retry_after_s)
