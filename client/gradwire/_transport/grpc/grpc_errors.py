"""Conversion of gRPC's errors to gradwire's exceptions.

A gradwire server attaches its reason to every error. It decides: a proxy that ends a
call early may replace the status. Errors without details are gRPC's or a proxy's.
gRPC has one status, UNAVAILABLE, for several errors: no server listens, a name has no
address, or the connection of a running call broke. Only gRPC's message distinguishes
them. This module and `proxy_errors` are the only ones that examine the message.
"""

from __future__ import annotations

import contextlib
import datetime
import re
from collections.abc import Iterator
from typing import Any, Protocol

from grpc import StatusCode
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # not in its stubs

from gradwire._api.errors import (
    BY_REASON,
    BY_STATUS,
    ClientStateError,
    ConnectError,
    ConnectionLostError,
    ContractError,
    DeadlineError,
    GradwireError,
    JobCancelledError,
    ProtocolError,
    TlsError,
    UnsupportedError,
)
from gradwire._transport.address import proxy_of
from gradwire._transport.endpoint import Endpoint
from gradwire._transport.grpc.proxy_errors import hint, proxy_error
from gradwire_protocol import error_details, limits
from gradwire_protocol.error_details import Answer, ErrorDetails
from gradwire_protocol.error_reasons import Reason

LATE = "the call took longer than its timeout_s"

_CANCELLED_HERE = (
    "the call was cancelled here, for example because the client was closed"
)

_NO_SUCH_NAME = re.compile("DNS resolution failed|Domain name not found|lookup failed")
_OF_RESETS = frozenset(
    {
        StatusCode.INTERNAL,
        StatusCode.UNKNOWN,
        StatusCode.CANCELLED,
        StatusCode.RESOURCE_EXHAUSTED,
    }
)
"""Statuses of a call that was reset, by a proxy whose server is gone or by a server
that was closed: which one depends on the code in HTTP/2's RST_STREAM."""

_RST_STREAM = "RST_STREAM"
"""In gRPC's message for a call that was reset, whatever its status."""

_OTHER_CAUSE = re.compile(
    "Locally cancelled|Channel (is )?closed|channel was closed"  # by this client
    "|Exception (de)?serializing|Exception iterating"  # in this client
    "|larger than max|metadata size exceeds"  # a retry has the same size
    "|Unexpected <class|Exception calling application"  # a server's bug
)
"""In gRPC's message for errors with these statuses and another cause."""

_CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")
_NO_DESCRIPTORS = re.compile("Too many open files")
_NO_HTTP2 = re.compile("Failed parsing HTTP/2|http1.x server|selected ALPN")
_CONNECT_CAUSE = re.compile("(?:to remote host|connect failed: .* error): ?(.+)")
_DISTRUSTED = re.compile("CERTIFICATE_VERIFY_FAILED: (.+?)(?:: OK)?$")
_NO_SIGNER = re.compile("issuer|self.signed|first certificate|signature failure")
"""In the cause, if no trusted authority has signed the certificate. There are others:
its time has not come, or it is a client's."""
_WRONG_NAME = re.compile("Hostname Verification Check failed|is not in peer certif")
_NO_TLS = re.compile("WRONG_VERSION_NUMBER|HTTP_REQUEST|HTTPS_PROXY_REQUEST")
_HANDSHAKE = re.compile("(?:Tls handshake failed|security handshaker)(.*)")
_NOBODY = re.compile("refused|No such file")


class Outcome(Protocol):
    """The common interface of gRPC's synchronous and asynchronous errors."""

    def code(self) -> StatusCode:
        """Return the call's status."""

    def details(self) -> str | None:
        """Return the message."""

    def trailing_metadata(self) -> Any:
        """Return the trailing metadata."""


def call_error(
    outcome: Outcome,
    endpoint: Endpoint,
    job_id: str | None = None,
    *,
    service: str = limits.SERVICE,
) -> GradwireError:
    """Return the exception for a call that ended with a status other than OK.

    Args:
        outcome: How it ended.
        endpoint: The server.
        job_id: The job.
        service: The service that was called.
    """
    forget_frames(outcome)
    code, text = outcome.code(), _legible(outcome.details() or "")
    answer = _answer(outcome)
    attached = answer.details if answer is not None else ErrorDetails()
    if answer is not None and answer.from_gradwire:
        code, text = answer.status or code, _legible(answer.message) or text
    elif error := _foreign(
        code, text, endpoint, job_id=job_id, service=service, bare=answer is None
    ):
        return error
    if attached.reason is Reason.CONTRACT_UNKNOWN:
        return ContractError(
            f"the server at {endpoint} does not support {limits.CONTRACT}: {text}",
            status=code,
            attached=attached,
            details=text,
        )
    if code is StatusCode.OK:
        return ProtocolError(
            "the server ended the call too early, with status OK", job_id=job_id
        )
    kind = BY_STATUS[code]
    if attached.reason is not None:
        kind = BY_REASON.get(attached.reason, kind)
    message = text
    if code is StatusCode.DEADLINE_EXCEEDED and attached.reason is None:
        message = LATE
    if code is StatusCode.CANCELLED and "Channel closed!" in text:
        message = _CANCELLED_HERE
    error = kind(message, status=code, attached=attached, job_id=job_id, details=text)
    error.args = (f"{message} ({_label(error)})",)
    return error


def late_error(job_id: str | None) -> DeadlineError:
    """Return the exception for a call that takes longer than its timeout."""
    error = DeadlineError(LATE, status=StatusCode.DEADLINE_EXCEEDED, job_id=job_id)
    error.args = (f"{LATE} ({_label(error)})",)
    return error


def _foreign(
    code: StatusCode,
    text: str,
    endpoint: Endpoint,
    *,
    job_id: str | None,
    service: str,
    bare: bool,
) -> GradwireError | None:
    """Return the exception for an error that no gradwire server has sent.

    Args:
        code: The status.
        text: The message.
        endpoint: The server.
        job_id: The job.
        service: The service that was called.
        bare: Whether there are no details, not even those of another service.

    Returns:
        The exception; None if it is that of the status.
    """
    if bare:
        if told := proxy_error(code, text, endpoint, job_id):
            return told
        if _was_cut_off(code, text):
            return ConnectionLostError(
                f"the call was interrupted by the server at {endpoint.address}, by a"
                f" proxy, or in the network, before it was done{hint(text)} ({text})",
                status=code,
                job_id=job_id,
                details=text,
            )
    if code is StatusCode.UNAVAILABLE:
        return _unavailable(endpoint, text, job_id)
    if code is StatusCode.UNIMPLEMENTED and service != limits.SERVICE:
        return UnsupportedError(
            f"the server at {endpoint} does not offer {service} ({text}): update it",
            status=code,
            details=text,
        )
    if code is StatusCode.UNIMPLEMENTED:
        return ContractError(
            f"the gRPC server at {endpoint} does not offer {limits.SERVICE} ({text})",
            status=code,
            job_id=job_id,
            details=text,
        )
    return None


def forget_frames(outcome: Outcome) -> None:
    """Drop the traceback of gRPC's error, in place of which another one is raised.

    gRPC raises the call itself, and the frames hold the call and its operands: only the
    garbage collector would release them.
    """
    if isinstance(outcome, BaseException):
        outcome.__traceback__ = None


def session_error(outcome: Outcome, endpoint: Endpoint) -> GradwireError:
    """Return the exception for a call of the sessions' service."""
    return call_error(outcome, endpoint, service=limits.SESSION_SERVICE)


def connect_error(
    outcome: Outcome, endpoint: Endpoint, connect_timeout_s: float
) -> GradwireError:
    """Return the exception for a handshake that ended with a status other than OK."""
    error = call_error(outcome, endpoint)
    if outcome.code() is StatusCode.DEADLINE_EXCEEDED:
        return ConnectError(
            f"no gradwire server answered at {endpoint} within {connect_timeout_s:g} s"
            f"{hint(error.details)}",
            status=error.status,
            details=error.details,
        )
    if isinstance(error, ConnectionLostError):
        return ConnectError(
            f"the server at {endpoint} closed the connection or refused the call"
            f" ({error.details}): it is not a gradwire server, is overloaded, or is not"
            f" available behind a proxy{hint(error.details)}",
            # Another attempt may succeed, whatever the status was.
            status=StatusCode.UNAVAILABLE,
            details=error.details,
        )
    return error


def _legible(text: str) -> str:
    """Return a message up to its first control character, on one line.

    gRPC appends the bytes of a socket's address to some of its messages.
    """
    return _CONTROLS.split(" ".join(text.splitlines()), maxsplit=1)[0].rstrip()


def _answer(outcome: Outcome) -> Answer | None:
    """Return the end of the call as its server wrote it; None: without details."""
    for key, value in outcome.trailing_metadata() or ():
        if key == error_details.TRAILER and isinstance(value, bytes):
            return error_details.decode_answer(value)
    return None


def _was_cut_off(code: StatusCode, text: str) -> bool:
    """Whether a call without details was cut off on the way."""
    if _RST_STREAM in text:
        return True
    return code in _OF_RESETS and not _OTHER_CAUSE.search(text)


def _unavailable(endpoint: Endpoint, text: str, job_id: str | None) -> GradwireError:
    kind: type[GradwireError] = ConnectError
    cause = _CONNECT_CAUSE.search(text)
    if sentence := _handshake(endpoint, text):
        kind, message = TlsError, sentence
    elif _NO_SUCH_NAME.search(text):
        message = f"the name in {endpoint} has no known address"
    elif _NO_DESCRIPTORS.search(text):
        message = f"this process has too many open files to connect to {endpoint}:"
        message += " raise its limit (ulimit -n), or close some"
    elif _NO_HTTP2.search(text):
        message = f"the server at {endpoint} does not support HTTP/2, so it is not a"
        message += " gradwire server"
    elif cause is not None and _NOBODY.search(cause[1]):
        message = f"nothing listens at {endpoint} ({cause[1]})"
        if proxy := proxy_of(endpoint.address):
            message = f"nothing listens at {endpoint}, or at the proxy on the way to it"
            message += f" ({proxy}; {cause[1]})"
    elif cause is not None:
        message = f"{endpoint} cannot be reached ({cause[1]})"
    elif text.startswith("failed to connect to all addresses"):
        message = f"the server at {endpoint} closed the connection at once:"
        message += f" {_refusal(endpoint)}, or is stopping"
        message += f" ({text.rpartition(': ')[2]})"
    else:
        kind = ConnectionLostError
        message = f"the connection to {endpoint} broke before the call was done"
        message += f" ({text})"
    return kind(message, status=StatusCode.UNAVAILABLE, job_id=job_id, details=text)


def _handshake(endpoint: Endpoint, text: str) -> str | None:
    """Return the message for a failed TLS handshake; None if it did not fail."""
    if endpoint.tls is None:
        return None
    if distrusted := _DISTRUSTED.search(text):
        if distrusted[1] == "certificate has expired":
            return f"the certificate of the server at {endpoint} has expired"
        if not _NO_SIGNER.search(distrusted[1]):
            return (
                f"the certificate of the server at {endpoint} cannot be used:"
                f" {distrusted[1]}{_clock(distrusted[1])}"
            )
        signers = "of the system" if endpoint.tls.ca is None else "of tls.ca"
        return (
            f"the certificate of the server at {endpoint} is not trusted: no authority"
            f" {signers} has signed it ({distrusted[1]})"
        )
    if _WRONG_NAME.search(text):
        name = endpoint.tls.server_name
        return (
            f"the certificate of the server at {endpoint} is not for"
            f" {name or 'the host of the address'}: tls.server_name sets the expected"
            " name"
        )
    if _NO_TLS.search(text):
        return (
            f"the server at {endpoint} does not use TLS: it is not a gradwire server,"
            " or was started without tls-cert"
        )
    if reason := _HANDSHAKE.search(text):
        return f"the TLS handshake with the server at {endpoint} failed ({reason[1]})"
    return None


def _clock(cause: str) -> str:
    """Return this machine's time if it is what decides."""
    if "not yet valid" not in cause:
        return ""
    now = datetime.datetime.now(datetime.UTC)
    return f" (by the clock of this machine it is {now:%Y-%m-%d %H:%M} UTC)"


def _refusal(endpoint: Endpoint) -> str:
    """Return possible reasons why a server closed a connection at once."""
    if endpoint.tls is None:
        return "it expects TLS (tls=...), is not a gradwire server"
    if endpoint.tls.cert is None:
        return "it requires a client certificate (tls.cert), is not a gradwire server"
    return "it does not trust tls.cert, is not a gradwire server"


def _label(error: GradwireError) -> str:
    code = error.reason or (error.status.name if error.status else "")
    return f"{code}, job {error.job_id}" if error.job_id else str(code)


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Start a call.

    Raises:
        ClientStateError: The client was closed meanwhile, by another thread or task.
    """
    try:
        yield
    # The one of gRPC's channels that block, the other of those of an event loop.
    except (ValueError, cygrpc.UsageError) as error:
        if "closed" not in str(error):
            raise
        raise ClientStateError("the client was closed while a call began") from None


def cancelled_error(job_id: str | None) -> JobCancelledError:
    """Return the error of a call that the client has cancelled."""
    return JobCancelledError(
        _CANCELLED_HERE,
        status=StatusCode.CANCELLED,
        job_id=job_id,
    )
