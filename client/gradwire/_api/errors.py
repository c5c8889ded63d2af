"""What gradwire raises.

    GradwireError
     ├── InputError (ValueError)           an argument is refused; nothing was sent
     ├── ClientStateError (RuntimeError)   the client is closed, or of another loop
     ├── ConnectError (ConnectionError)    no gradwire server answers at the address
     │    ├── TlsError                     TLS could not be agreed on with it
     │    └── ContractError                a server answers, of another contract
     ├── ProtocolError                     the server broke the contract
     ├── VerificationError                 a result is wrong, as `verify` found
     └── CallError                         a call ended with a status but OK:
          ├── RequestError                   INVALID_ARGUMENT and its kind
          ├── UnsupportedError               UNIMPLEMENTED
          ├── ExhaustedError                 RESOURCE_EXHAUSTED
          │    ├── JobTooLargeError            more than this server can ever hold
          │    ├── ServerBusyError             not now; see `retry_after_s`
          │    └── DeviceOutOfMemoryError      the device ran out in spite of all
          ├── UnavailableError               UNAVAILABLE
          │    ├── DrainingError               the server is about to stop
          │    ├── DeviceLostError             its device failed, and it stops
          │    ├── ConnectionLostError (ConnectionError)
          │    └── RowsLostError               a stream cannot go on where it was
          ├── AbortedError                   ABORTED
          │    └── ClientIdleError             this side sent or read too slowly
          ├── JobCancelledError              CANCELLED
          ├── DeadlineError (TimeoutError)   DEADLINE_EXCEEDED
          ├── DataLossError                  DATA_LOSS
          │    └── ChecksumError               a payload's checksum is wrong
          ├── AuthenticationError            UNAUTHENTICATED
          ├── NotAllowedError                PERMISSION_DENIED
          └── ServerError                    INTERNAL, UNKNOWN

What the caller's own code raises inside a call (an iterable of rows, a
progress callback) is none of these: it cancels the job and passes unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping

from grpc import StatusCode

from gradwire_protocol.error_details import ErrorDetails
from gradwire_protocol.error_reasons import Reason

_NO_DETAILS = ErrorDetails()


class GradwireError(Exception):
    """Everything that gradwire raises on its own account.

    Example:
        >>> try:
        ...     gradwire.connect("gpu-node:50051").gradients(x, w, dy)
        ... except gradwire.ServerBusyError as busy:
        ...     time.sleep(busy.retry_after_s or 1)
        ... except gradwire.GradwireError as error:
        ...     print(error, error.status, error.reason, error.job_id)
    """

    status: StatusCode | None
    """The status that the call ended with; None where no call has ended."""

    reason: Reason | None
    """The server's stable reason; None where it gave none."""

    fields: Mapping[str, str]
    """What is wrong with which field of the request, by the field's path."""

    metadata: Mapping[str, str]
    """What else the server attached to the reason, such as ``error_id``."""

    retry_after_s: float | None
    """Seconds after which the same call may succeed, where the server said."""

    job_id: str | None
    """The job's id, the one in the server's log; None outside a job."""

    details: str
    """The server's or gRPC's own text; empty where there was none."""

    attempts: int
    """How often the call was tried; see `RetryPolicy`."""

    def __init__(
        self,
        message: str,
        *,
        status: StatusCode | None = None,
        attached: ErrorDetails = _NO_DETAILS,
        job_id: str | None = None,
        details: str = "",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.reason = attached.reason
        self.fields = dict(attached.fields)
        self.metadata = dict(attached.metadata)
        self.retry_after_s = attached.retry_after_s
        self.job_id = job_id or attached.metadata.get("job_id")
        self.details = details
        self.attempts = 1


class InputError(GradwireError, ValueError):
    """An argument is refused; nothing was sent."""


class ClientStateError(GradwireError, RuntimeError):
    """The client cannot be used here: it is closed, or bound to another loop."""


class ConnectError(GradwireError, ConnectionError):
    """No gradwire server answers at the address; the text says what does."""


class TlsError(ConnectError):
    """The TLS handshake failed; the text says whom the other side is not, or why.

    What a server finds wrong with the client's certificate it does not tell:
    it closes the connection, which is a `ConnectError`.
    """


class ContractError(ConnectError):
    """What answers at the address speaks no contract that this SDK speaks."""


class ProtocolError(GradwireError):
    """The server sent what the contract does not allow; the job was given up."""


class VerificationError(GradwireError):
    """A result is not the product that it should be, as `verify` has found.

    The text names the server's address and the device; another may compute
    right. What was handed out of a stream before has been checked.
    """

    result: str = ""
    """Which: ``"y"``, ``"dx"`` or ``"dw"``."""

    row: int = 0
    """A row of it that is wrong, leading dimensions flattened."""

    column: int | None = None
    """A column in which it is; None where only sums of the row are known."""

    error: float | None = None
    """How far off it is; None where that is no number. Of sums: in multiples of
    what rounding can explain."""

    bound: float | None = None
    """How far off rounding could have brought it. Of sums: 1."""

    server_instance: str = ""
    """The server process that computed it: the name in its receipts."""


class CallError(GradwireError):
    """A call ended with a status other than OK."""


class RequestError(CallError):
    """The server found something wrong with the request (see `fields`)."""


class UnsupportedError(CallError):
    """The server does not know an option or a feature that was asked for."""


class ExhaustedError(CallError):
    """The server lacks a resource."""


class JobTooLargeError(ExhaustedError):
    """The job needs more memory than this server can ever give one."""


class ServerBusyError(ExhaustedError):
    """The server's queue is full; `retry_after_s` says when to try again."""


class DeviceOutOfMemoryError(ExhaustedError):
    """The server's device ran out of memory in the middle of the job."""


class UnavailableError(CallError):
    """The service cannot be had just now."""


class DrainingError(UnavailableError):
    """The server takes no new jobs because it is about to stop."""


class DeviceLostError(UnavailableError):
    """A device of the server failed for good: it ends, and may be restarted."""


class ConnectionLostError(UnavailableError, ConnectionError):
    """The connection broke before the job was done."""


class RowsLostError(UnavailableError):
    """A stream broke, and rows that would be needed again are held no more.

    Its cause is what ended the attempt. What it gave before stays right.
    """

    rows: range = range(0)
    """Those rows."""


class AbortedError(CallError):
    """The server ended the call."""


class ClientIdleError(AbortedError):
    """The server gave up waiting for this side to send or to read."""


class JobCancelledError(CallError):
    """The job was cancelled, by this side or on the way."""


class DeadlineError(CallError, TimeoutError):
    """The call was not done within its `timeout_s`."""


class DataLossError(CallError):
    """Data was damaged on the way."""


class ChecksumError(DataLossError):
    """The checksum of a payload, in either direction, is wrong."""


class AuthenticationError(CallError):
    """The server does not know who is calling."""


class NotAllowedError(CallError):
    """The server knows who is calling and refuses."""


class ServerError(CallError):
    """Something went wrong inside the server; its log has ``error_id``."""


BY_STATUS: dict[StatusCode, type[CallError]] = {
    StatusCode.INVALID_ARGUMENT: RequestError,
    StatusCode.FAILED_PRECONDITION: RequestError,
    StatusCode.OUT_OF_RANGE: RequestError,
    StatusCode.NOT_FOUND: RequestError,
    StatusCode.ALREADY_EXISTS: RequestError,
    StatusCode.UNIMPLEMENTED: UnsupportedError,
    StatusCode.RESOURCE_EXHAUSTED: ExhaustedError,
    StatusCode.UNAVAILABLE: UnavailableError,
    StatusCode.ABORTED: AbortedError,
    StatusCode.CANCELLED: JobCancelledError,
    StatusCode.DEADLINE_EXCEEDED: DeadlineError,
    StatusCode.DATA_LOSS: DataLossError,
    StatusCode.UNAUTHENTICATED: AuthenticationError,
    StatusCode.PERMISSION_DENIED: NotAllowedError,
    StatusCode.INTERNAL: ServerError,
    StatusCode.UNKNOWN: ServerError,
}
"""The class of every status but OK."""

BY_REASON: dict[Reason, type[CallError]] = {
    Reason.JOB_TOO_LARGE: JobTooLargeError,
    Reason.BUSY: ServerBusyError,
    Reason.DEVICE_OUT_OF_MEMORY: DeviceOutOfMemoryError,
    Reason.DRAINING: DrainingError,
    Reason.DEVICE_LOST: DeviceLostError,
    Reason.CLIENT_IDLE: ClientIdleError,
    Reason.CHECKSUM_MISMATCH: ChecksumError,
}
"""The class of the reasons that have one narrower than their status's."""
