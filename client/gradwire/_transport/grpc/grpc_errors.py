"""From the way a call ended to the exception that says so.

gRPC reports with one status, UNAVAILABLE, that nobody listens, that a name
has no address, and that a running call's connection broke. Only its text
tells them apart, so the text is looked at here, and nowhere else.
"""

from __future__ import annotations

import re
from typing import Any, Protocol

from grpc import StatusCode

from gradwire._api.errors import (
    BY_REASON,
    BY_STATUS,
    ConnectError,
    ConnectionLostError,
    ContractError,
    GradwireError,
    ProtocolError,
    TlsError,
    UnavailableError,
)
from gradwire._transport.address import proxy_of
from gradwire._transport.endpoint import Endpoint
from gradwire_protocol import error_details, limits
from gradwire_protocol.error_details import ErrorDetails
from gradwire_protocol.error_reasons import Reason

LATE = "the call was not done within its timeout_s"

_NO_SUCH_NAME = re.compile("DNS resolution failed|Domain name not found|lookup failed")
_RESET = "CANCELLED"
"""What gRPC says of a call that the other side has reset: a server that is closed, or
a proxy. Of calls that this side has cancelled it says more, and a gradwire server
that ends a call gives its reason."""

_REMOVED = "Stream removed"
"""What gRPC says of a call whose connection ended in a way that it has no status for,
as when TLS finds that bytes were changed."""

_NO_HTTP2 = re.compile("Failed parsing HTTP/2|http1.x server|selected ALPN")
_CONNECT_CAUSE = re.compile("(?:to remote host|connect failed: .* error): ?(.+)")
_DISTRUSTED = re.compile("CERTIFICATE_VERIFY_FAILED: (.+?)(?:: OK)?$")
_WRONG_NAME = re.compile("Hostname Verification Check failed|is not in peer certif")
_NO_TLS = re.compile("WRONG_VERSION_NUMBER|HTTP_REQUEST|HTTPS_PROXY_REQUEST")
_HANDSHAKE = re.compile("(?:Tls handshake failed|security handshaker)(.*)")
_NOBODY = re.compile("refused|No such file")


class Outcome(Protocol):
    """What gRPC's errors, of either shell, tell about a call that ended."""

    def code(self) -> StatusCode:
        """The call's status."""

    def details(self) -> str | None:
        """The text beside it."""

    def trailing_metadata(self) -> Any:
        """The metadata that came last."""


def call_error(
    outcome: Outcome, endpoint: Endpoint, job_id: str | None = None
) -> GradwireError:
    """The exception for a call that ended with a status other than OK."""
    code, text = outcome.code(), outcome.details() or ""
    attached = _attached(outcome)
    if attached.reason is None:
        if (code is StatusCode.CANCELLED and text == _RESET) or (
            code is StatusCode.UNKNOWN and text.startswith(_REMOVED)
        ):
            return ConnectionLostError(
                f"the call was cut off at {endpoint.address}, or on the way there,"
                f" before it was done ({text})",
                status=code,
                job_id=job_id,
                details=text,
            )
        if code is StatusCode.UNAVAILABLE:
            return _unavailable(endpoint, text, job_id)
        if code is StatusCode.UNIMPLEMENTED:
            return ContractError(
                f"the gRPC server at {endpoint} does not offer {limits.SERVICE}"
                f" ({text})",
                status=code,
                job_id=job_id,
                details=text,
            )
    if attached.reason is Reason.CONTRACT_UNKNOWN:
        return ContractError(
            f"the server at {endpoint} does not speak {limits.CONTRACT}: {text}",
            status=code,
            attached=attached,
            details=text,
        )
    if code is StatusCode.OK:
        return ProtocolError(
            "the server ended the call early and called it a success", job_id=job_id
        )
    kind = BY_STATUS[code]
    if attached.reason is not None:
        kind = BY_REASON.get(attached.reason, kind)
    message = text
    if code is StatusCode.DEADLINE_EXCEEDED and attached.reason is None:
        message = LATE
    error = kind(message, status=code, attached=attached, job_id=job_id, details=text)
    error.args = (f"{message} ({_label(error)})",)
    return error


def connect_error(
    outcome: Outcome, endpoint: Endpoint, connect_timeout_s: float
) -> GradwireError:
    """The exception for a handshake that ended with a status other than OK."""
    error = call_error(outcome, endpoint)
    if outcome.code() is StatusCode.DEADLINE_EXCEEDED:
        return ConnectError(
            f"no gradwire server answered at {endpoint} within {connect_timeout_s:g} s",
            status=error.status,
            details=error.details,
        )
    if isinstance(error, ConnectionLostError):
        return ConnectError(
            f"what listens at {endpoint} is no gradwire server: it closed the"
            f" connection ({error.details})",
            status=error.status,
            details=error.details,
        )
    return error


def _attached(outcome: Outcome) -> ErrorDetails:
    for key, value in outcome.trailing_metadata() or ():
        if key == error_details.TRAILER and isinstance(value, bytes):
            return error_details.decode(value)
    return ErrorDetails()


def _unavailable(endpoint: Endpoint, text: str, job_id: str | None) -> GradwireError:
    kind: type[GradwireError] = ConnectError
    cause = _CONNECT_CAUSE.search(text)
    if sentence := _handshake(endpoint, text):
        kind, message = TlsError, sentence
    elif _NO_SUCH_NAME.search(text):
        message = f"the name in {endpoint} has no known address"
    elif _NO_HTTP2.search(text):
        message = f"what listens at {endpoint} does not speak HTTP/2, so it is no"
        message += " gradwire server"
    elif cause is not None and _NOBODY.search(cause[1]):
        message = f"nothing listens at {endpoint} ({cause[1]})"
        if proxy := proxy_of(endpoint.address):
            message = f"nothing listens at {endpoint}, or at the proxy on the way to it"
            message += f" ({proxy}; {cause[1]})"
    elif cause is not None:
        message = f"{endpoint} cannot be reached ({cause[1]})"
    elif text.startswith("failed to connect to all addresses"):
        message = f"what listens at {endpoint} closed the connection at once:"
        message += f" {_refusal(endpoint)}, or stops ({text.rpartition(': ')[2]})"
    elif "http2 header with status" in text:
        kind = UnavailableError
        message = f"what stands before {endpoint} has no server for it ({text})"
    else:
        kind = ConnectionLostError
        message = f"the connection to {endpoint} broke before the call was done"
        message += f" ({text})"
    return kind(message, status=StatusCode.UNAVAILABLE, job_id=job_id, details=text)


def _handshake(endpoint: Endpoint, text: str) -> str | None:
    """The sentence for a server that TLS could not be agreed on with."""
    if endpoint.tls is None:
        return None
    if distrusted := _DISTRUSTED.search(text):
        if distrusted[1] == "certificate has expired":
            return f"the certificate of the server at {endpoint} has expired"
        signers = "the system trusts" if endpoint.tls.ca is None else "of tls.ca"
        return (
            f"the certificate of the server at {endpoint} is not trusted: no authority"
            f" {signers} vouches for it ({distrusted[1]})"
        )
    if _WRONG_NAME.search(text):
        name = endpoint.tls.server_name
        return (
            f"the certificate of the server at {endpoint} is for another name than"
            f" {name or 'the host there'}; tls.server_name names the one to expect"
        )
    if _NO_TLS.search(text):
        return (
            f"what listens at {endpoint} does not speak TLS: it is no gradwire server,"
            " or one that was started without tls-cert"
        )
    if reason := _HANDSHAKE.search(text):
        return f"no TLS could be agreed on with the server at {endpoint} ({reason[1]})"
    return None


def _refusal(endpoint: Endpoint) -> str:
    """Why a server may close a connection at once, as far as this side knows."""
    if endpoint.tls is None:
        return "it expects TLS (tls=...), is no gradwire server"
    if endpoint.tls.cert is None:
        return "it wants a client's certificate (tls.cert), is no gradwire server"
    return "it does not trust tls.cert, is no gradwire server"


def _label(error: GradwireError) -> str:
    code = error.reason or (error.status.name if error.status else "")
    return f"{code}, job {error.job_id}" if error.job_id else str(code)
