"""The stable reasons of failed calls, each with its gRPC status."""

from __future__ import annotations

import enum

from grpc import StatusCode


class Reason(enum.StrEnum):
    """`google.rpc.ErrorInfo.reason` of a gradwire error."""

    @staticmethod
    def _generate_next_value_(name: str, *_: object) -> str:
        return name

    # INVALID_ARGUMENT
    MESSAGE_MALFORMED = enum.auto()
    MESSAGE_UNEXPECTED = enum.auto()
    JOB_ID_INVALID = enum.auto()
    SHAPE_INVALID = enum.auto()
    SHAPE_OVERFLOW = enum.auto()
    DTYPE_INVALID = enum.auto()
    RESULTS_MISSING = enum.auto()
    OPERAND_MISSING = enum.auto()
    OPERAND_UNEXPECTED = enum.auto()
    OPTION_INVALID = enum.auto()
    MATRIX_INVALID = enum.auto()
    INDEX_INVALID = enum.auto()
    PAYLOAD_INVALID = enum.auto()
    PAYLOAD_EXCESS = enum.auto()
    PAYLOAD_MISSING = enum.auto()
    ORDER_INVALID = enum.auto()
    LEAD_EXCEEDED = enum.auto()
    M_MISMATCH = enum.auto()
    END_MISSING = enum.auto()
    STREAM_REQUIRED = enum.auto()
    BUFFER_REF_INVALID = enum.auto()
    # FAILED_PRECONDITION
    REGION_UNKNOWN = enum.auto()
    RESUME_MISMATCH = enum.auto()
    SESSION_UNKNOWN = enum.auto()
    SESSION_EXPIRED = enum.auto()
    SESSION_FULL = enum.auto()
    TENSOR_UNKNOWN = enum.auto()
    TENSOR_MISMATCH = enum.auto()
    STEP_CONFLICT = enum.auto()
    GRADIENT_INCOMPLETE = enum.auto()
    STATE_UNKNOWN = enum.auto()
    STATE_INVALID = enum.auto()
    # UNIMPLEMENTED
    OPTION_UNKNOWN = enum.auto()
    FEATURE_UNKNOWN = enum.auto()
    CONTRACT_UNKNOWN = enum.auto()
    # RESOURCE_EXHAUSTED
    JOB_TOO_LARGE = enum.auto()
    BUSY = enum.auto()
    DEVICE_OUT_OF_MEMORY = enum.auto()
    STATE_NOT_SAVED = enum.auto()
    # other statuses, one or two reasons each
    DRAINING = enum.auto()
    DEVICE_LOST = enum.auto()
    CONNECTION_LOST = enum.auto()
    CLIENT_IDLE = enum.auto()
    JOB_CANCELLED = enum.auto()
    DEADLINE_PASSED = enum.auto()
    CHECKSUM_MISMATCH = enum.auto()
    CREDENTIALS_INVALID = enum.auto()
    NOT_ALLOWED = enum.auto()
    UNFORESEEN = enum.auto()

    @property
    def status(self) -> StatusCode:
        """The gRPC status of calls with this reason."""
        return _OTHER_STATUS.get(self, StatusCode.INVALID_ARGUMENT)


_OTHER_STATUS = {
    Reason.REGION_UNKNOWN: StatusCode.FAILED_PRECONDITION,
    Reason.RESUME_MISMATCH: StatusCode.FAILED_PRECONDITION,
    Reason.SESSION_UNKNOWN: StatusCode.FAILED_PRECONDITION,
    Reason.SESSION_EXPIRED: StatusCode.FAILED_PRECONDITION,
    Reason.SESSION_FULL: StatusCode.FAILED_PRECONDITION,
    Reason.TENSOR_UNKNOWN: StatusCode.FAILED_PRECONDITION,
    Reason.TENSOR_MISMATCH: StatusCode.FAILED_PRECONDITION,
    Reason.STEP_CONFLICT: StatusCode.FAILED_PRECONDITION,
    Reason.GRADIENT_INCOMPLETE: StatusCode.FAILED_PRECONDITION,
    Reason.STATE_UNKNOWN: StatusCode.FAILED_PRECONDITION,
    Reason.STATE_INVALID: StatusCode.FAILED_PRECONDITION,
    Reason.OPTION_UNKNOWN: StatusCode.UNIMPLEMENTED,
    Reason.FEATURE_UNKNOWN: StatusCode.UNIMPLEMENTED,
    Reason.CONTRACT_UNKNOWN: StatusCode.UNIMPLEMENTED,
    Reason.JOB_TOO_LARGE: StatusCode.RESOURCE_EXHAUSTED,
    Reason.BUSY: StatusCode.RESOURCE_EXHAUSTED,
    Reason.DEVICE_OUT_OF_MEMORY: StatusCode.RESOURCE_EXHAUSTED,
    Reason.STATE_NOT_SAVED: StatusCode.RESOURCE_EXHAUSTED,
    Reason.DRAINING: StatusCode.UNAVAILABLE,
    Reason.DEVICE_LOST: StatusCode.UNAVAILABLE,
    Reason.CONNECTION_LOST: StatusCode.UNAVAILABLE,
    Reason.CLIENT_IDLE: StatusCode.ABORTED,
    Reason.JOB_CANCELLED: StatusCode.CANCELLED,
    Reason.DEADLINE_PASSED: StatusCode.DEADLINE_EXCEEDED,
    Reason.CHECKSUM_MISMATCH: StatusCode.DATA_LOSS,
    Reason.CREDENTIALS_INVALID: StatusCode.UNAUTHENTICATED,
    Reason.NOT_ALLOWED: StatusCode.PERMISSION_DENIED,
    Reason.UNFORESEEN: StatusCode.INTERNAL,
}
