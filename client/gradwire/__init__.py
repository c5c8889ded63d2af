"""The gradients of a matrix product, computed on another machine.

With X of shape (m, n), W of shape (n, k) and dY = dL/dY of shape (m, k), a
gradwire server computes Y = X W, dX = dY Wᵀ and dW = Xᵀ dY, and streams them
back while the operands are still arriving.

    import gradwire

    with gradwire.connect("gpu-node:50051") as client:
        y, dx, dw = client.gradients(x, w, dy)
"""

from __future__ import annotations

# isort: off
import gradwire_protocol  # noqa: F401 - first: it decides how grpc is loaded

# isort: on
from gradwire._api.errors import (
    AbortedError,
    AuthenticationError,
    CallError,
    ChecksumError,
    ClientIdleError,
    ClientStateError,
    ConnectError,
    ConnectionLostError,
    ContractError,
    DataLossError,
    DeadlineError,
    DeviceLostError,
    DeviceOutOfMemoryError,
    DrainingError,
    ExhaustedError,
    GradwireError,
    InputError,
    JobCancelledError,
    JobTooLargeError,
    NotAllowedError,
    NumericsError,
    ProtocolError,
    RequestError,
    RowsLostError,
    ServerBusyError,
    ServerError,
    SessionFullError,
    SessionLostError,
    StateNotSavedError,
    StateUnknownError,
    StepConflictError,
    TlsError,
    UnavailableError,
    UnsupportedError,
    VerificationError,
)
from gradwire._api.optimizers import SGD, Adam, AdamW
from gradwire._api.session_types import (
    Forward,
    SavedState,
    SessionInfo,
    SessionSummary,
    StepResult,
    TensorInfo,
)
from gradwire._api.types import (
    Backward,
    Device,
    Gradients,
    NumericsFingerprint,
    Progress,
    Receipt,
    RowBlock,
    Segment,
    ServerInfo,
    ServerLimits,
)
from gradwire._api.verify import Verify
from gradwire._client._async.client import AsyncClient
from gradwire._client._async.session import AsyncSession
from gradwire._client._async.stream import AsyncGradientStream
from gradwire._client._sync.client import Client
from gradwire._client._sync.session import Session
from gradwire._client._sync.stream import GradientStream
from gradwire._client.connect import connect
from gradwire._core.kept import Tensor
from gradwire._resilience.retry import RetryPolicy
from gradwire._transport.tls import Tls
from gradwire_protocol.error_reasons import Reason

__all__ = [
    "SGD",
    "AbortedError",
    "Adam",
    "AdamW",
    "AsyncClient",
    "AsyncGradientStream",
    "AsyncSession",
    "AuthenticationError",
    "Backward",
    "CallError",
    "ChecksumError",
    "Client",
    "ClientIdleError",
    "ClientStateError",
    "ConnectError",
    "ConnectionLostError",
    "ContractError",
    "DataLossError",
    "DeadlineError",
    "Device",
    "DeviceLostError",
    "DeviceOutOfMemoryError",
    "DrainingError",
    "ExhaustedError",
    "Forward",
    "GradientStream",
    "Gradients",
    "GradwireError",
    "InputError",
    "JobCancelledError",
    "JobTooLargeError",
    "NotAllowedError",
    "NumericsError",
    "NumericsFingerprint",
    "Progress",
    "ProtocolError",
    "Reason",
    "Receipt",
    "RequestError",
    "RetryPolicy",
    "RowBlock",
    "RowsLostError",
    "SavedState",
    "Segment",
    "ServerBusyError",
    "ServerError",
    "ServerInfo",
    "ServerLimits",
    "Session",
    "SessionFullError",
    "SessionInfo",
    "SessionLostError",
    "SessionSummary",
    "StateNotSavedError",
    "StateUnknownError",
    "StepConflictError",
    "StepResult",
    "Tensor",
    "TensorInfo",
    "Tls",
    "TlsError",
    "UnavailableError",
    "UnsupportedError",
    "VerificationError",
    "Verify",
    "connect",
]
