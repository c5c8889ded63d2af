"""The exceptions of gradwire.

    GradwireError
     ├── InputError (ValueError)           an argument is invalid; nothing was sent
     ├── ClientStateError (RuntimeError)   the client is closed, or of another loop
     ├── ConnectError (ConnectionError)    no gradwire server answers at the address
     │    ├── TlsError                     the TLS handshake failed
     │    └── ContractError                the server has no known contract
     ├── ProtocolError                     the server broke the contract
     ├── VerificationError                 `verify` found a wrong result
     ├── NumericsError                     a server's results would have other last bits
     └── CallError                         a call ended with a status other than OK:
          ├── RequestError                   INVALID_ARGUMENT and similar statuses
          │    ├── SessionLostError            the session is gone, with its tensors
          │    ├── SessionFullError            the session's `keep` is too small
          │    ├── StepConflictError           the session is at another step
          │    └── StateUnknownError           no saved state has that name
          ├── UnsupportedError               UNIMPLEMENTED
          ├── ExhaustedError                 RESOURCE_EXHAUSTED
          │    ├── JobTooLargeError            the server has too little memory
          │    ├── ServerBusyError             the queue is full; see `retry_after_s`
          │    ├── DeviceOutOfMemoryError      the device ran out of memory
          │    └── StateNotSavedError          a session was not saved on the server
          ├── UnavailableError               UNAVAILABLE
          │    ├── DrainingError               the server is about to stop
          │    ├── DeviceLostError             a device failed; the server stops
          │    ├── ConnectionLostError (ConnectionError)
          │    └── RowsLostError               a stream cannot continue
          ├── AbortedError                   ABORTED
          │    └── ClientIdleError             the client sent or read too slowly
          ├── JobCancelledError              CANCELLED
          ├── DeadlineError (TimeoutError)   DEADLINE_EXCEEDED
          ├── DataLossError                  DATA_LOSS
          │    └── ChecksumError               a payload's checksum is wrong
          ├── AuthenticationError            UNAUTHENTICATED
          ├── NotAllowedError                PERMISSION_DENIED
          └── ServerError                    INTERNAL, UNKNOWN

An exception of the caller's own code (an iterable of rows, a progress callback) cancels
the job and reaches the caller unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping

from grpc import StatusCode

from gradwire_protocol.error_details import ErrorDetails
from gradwire_protocol.error_reasons import Reason

_NO_DETAILS = ErrorDetails()


class GradwireError(Exception):
    """Base class of all exceptions that gradwire raises.

    Example:
        >>> try:
        ...     gradwire.connect("gpu-node:50051").gradients(x, w, dy)
        ... except gradwire.ServerBusyError as busy:
        ...     time.sleep(busy.retry_after_s or 1)
        ... except gradwire.GradwireError as error:
        ...     print(error, error.status, error.reason, error.job_id)
    """

    status: StatusCode | None
    """Status of the call; None if no call ended."""

    reason: Reason | None
    """The server's reason, a stable name; None if the server gave none."""

    fields: Mapping[str, str]
    """Description of the error for each invalid field of the request, by field path."""

    metadata: Mapping[str, str]
    """Further details from the server, such as ``error_id``."""

    retry_after_s: float | None
    """Seconds after which the same call may succeed; None if the server gave no
    time."""

    job_id: str | None
    """Id of the job, as in the server's log; None outside a job."""

    details: str
    """Message of the server or of gRPC; empty if there was none."""

    attempts: int
    """Number of attempts; see `RetryPolicy`."""

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
    """An argument is invalid. Nothing was sent."""


class ClientStateError(GradwireError, RuntimeError):
    """The client is closed, belongs to another event loop, or cannot be used here."""


class ConnectError(GradwireError, ConnectionError):
    """No gradwire server answers at the address. The message says what does answer."""


class TlsError(ConnectError):
    """The TLS handshake failed. The message says why.

    A server that rejects the client's certificate gives no reason: it closes the
    connection, which raises a plain `ConnectError`.
    """


class ContractError(ConnectError):
    """The server at the address has no contract version that this SDK knows."""


class ProtocolError(GradwireError):
    """The server violated the contract. The job was cancelled."""


class NumericsError(GradwireError):
    """A server computes with another library, kind of processor or block size.

    Its segments of a job (`spread=True`) would have other last bits than those of the
    job's other servers. Also raised if no server says with what it computes.
    """


class VerificationError(GradwireError):
    """`verify` found a wrong result.

    The message names the server's address and the device; another device may compute
    correctly. Row blocks that a stream yielded earlier were checked and are correct.
    """

    result: str = ""
    """The wrong result: ``"y"``, ``"dx"`` or ``"dw"``."""

    row: int = 0
    """Index of a wrong row, with leading dimensions flattened."""

    column: int | None = None
    """Index of a wrong column; None if only sums over the row were compared."""

    error: float | None = None
    """Absolute error of the element, or, if `column` is None, the error of a sum as a
    multiple of its bound. None if the error is not a finite number."""

    bound: float | None = None
    """Largest error that rounding can cause; 1 if `column` is None."""

    server_instance: str = ""
    """The server process that computed the result, as in its receipts."""


class CallError(GradwireError):
    """A call ended with a status other than OK."""


class RequestError(CallError):
    """The server rejected the request as invalid; see `fields`."""


class SessionLostError(RequestError):
    """The session is gone, with its tensors.

    It was closed, it has expired, or its server was restarted. Open another one, and
    restore a saved state or put the tensors again.
    """


class SessionFullError(RequestError):
    """The session's `keep` is too small for its tensors."""


class StepConflictError(RequestError):
    """The session is at another step, or a gradient lacks a contribution."""


class StateUnknownError(RequestError):
    """The server has no saved state of this name, of the caller's tenant."""


class UnsupportedError(CallError):
    """The server does not support a requested option or feature."""


class ExhaustedError(CallError):
    """The server lacks a resource."""


class JobTooLargeError(ExhaustedError):
    """The job needs more memory than the server can give to any job."""


class ServerBusyError(ExhaustedError):
    """The server's queue is full; `retry_after_s` says when to try again."""


class DeviceOutOfMemoryError(ExhaustedError):
    """The server's device ran out of memory during the job."""


class StateNotSavedError(ExhaustedError):
    """A session's state was not saved on the server, for example on a full disk.

    An earlier state of that name is unchanged. A step that raises it was made: calling
    `step` again with the same arguments saves the state.
    """


class UnavailableError(CallError):
    """The service is currently unavailable."""


class DrainingError(UnavailableError):
    """The server accepts no new jobs because it is about to stop."""


class DeviceLostError(UnavailableError):
    """A device of the server failed permanently. The server stops, and may restart."""


class ConnectionLostError(UnavailableError, ConnectionError):
    """The connection broke before the job was done."""


class RowsLostError(UnavailableError):
    """A stream broke and cannot continue, because needed rows are no longer buffered.

    ``__cause__`` is the error that broke the stream. Row blocks that were yielded
    earlier remain valid.
    """

    rows: range = range(0)
    """The missing rows."""


class AbortedError(CallError):
    """The server ended the call."""


class ClientIdleError(AbortedError):
    """The server ended the call because the client neither sent nor read in time."""


class JobCancelledError(CallError):
    """The job was cancelled, by the client or in the network."""


class DeadlineError(CallError, TimeoutError):
    """The call took longer than its `timeout_s`."""


class DataLossError(CallError):
    """Data was damaged in transit."""


class ChecksumError(DataLossError):
    """The checksum of a payload is wrong, in either direction."""


class AuthenticationError(CallError):
    """The caller's credentials are missing or invalid."""


class NotAllowedError(CallError):
    """The caller is authenticated but not allowed to make the call."""


class ServerError(CallError):
    """An internal error of the server. The server's log has the ``error_id``."""


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
"""Exception class of every status other than OK."""

BY_REASON: dict[Reason, type[CallError]] = {
    Reason.SESSION_UNKNOWN: SessionLostError,
    Reason.SESSION_EXPIRED: SessionLostError,
    Reason.SESSION_FULL: SessionFullError,
    Reason.STEP_CONFLICT: StepConflictError,
    Reason.GRADIENT_INCOMPLETE: StepConflictError,
    Reason.STATE_UNKNOWN: StateUnknownError,
    Reason.STATE_NOT_SAVED: StateNotSavedError,
    Reason.JOB_TOO_LARGE: JobTooLargeError,
    Reason.BUSY: ServerBusyError,
    Reason.DEVICE_OUT_OF_MEMORY: DeviceOutOfMemoryError,
    Reason.DRAINING: DrainingError,
    Reason.DEVICE_LOST: DeviceLostError,
    Reason.CONNECTION_LOST: ConnectionLostError,
    Reason.CLIENT_IDLE: ClientIdleError,
    Reason.CHECKSUM_MISMATCH: ChecksumError,
}
"""Exception class of each reason that has a more specific class than its status."""
