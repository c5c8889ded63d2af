from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

import gradwire
from gradwire._api.errors import BY_REASON, BY_STATUS
from gradwire._resilience.retry import is_transient
from gradwire._transport.endpoint import Endpoint
from gradwire._transport.grpc.grpc_errors import call_error, connect_error
from gradwire_protocol import error_details
from gradwire_protocol.error_details import ErrorDetails
from gradwire_protocol.error_reasons import Reason

ADDRESS = Endpoint("gpu-node:50051")


class Outcome:
    """The end of a call, as gRPC tells it."""

    def __init__(
        self, code: grpc.StatusCode, text: str, attached: ErrorDetails | None = None
    ) -> None:
        self._code, self._text = code, text
        self._trailers: Any = None
        if attached is not None:
            self._trailers = error_details.encode(code, text, attached)

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._text

    def trailing_metadata(self) -> Any:
        return self._trailers


def test_a_call_that_the_other_side_reset_is_a_lost_connection() -> None:
    """As those that a server has not ended yet when it is closed."""
    cancelled = grpc.StatusCode.CANCELLED
    error = call_error(Outcome(cancelled, "CANCELLED"), ADDRESS, "j-1")
    assert type(error) is gradwire.ConnectionLostError
    assert "was interrupted by the server at gpu-node:50051" in str(error)
    here = call_error(Outcome(cancelled, "Channel closed!"), ADDRESS)
    assert type(here) is gradwire.JobCancelledError


def test_a_handshake_that_was_reset_does_not_rule_a_gradwire_server_out() -> None:
    """gRPC's servers reset calls when too many wait, as in a flood of calls."""
    error = connect_error(Outcome(grpc.StatusCode.CANCELLED, "CANCELLED"), ADDRESS, 1)
    assert type(error) is gradwire.ConnectError
    assert "is not a gradwire server, is overloaded, or" in str(error)
    assert error.status is grpc.StatusCode.UNAVAILABLE  # wait_for_ready_s goes by it


def test_a_stream_that_tls_found_damaged_is_a_lost_connection() -> None:
    """gRPC does not call that unavailable, as it does other ends of a connection."""
    unknown = grpc.StatusCode.UNKNOWN
    removed = call_error(
        Outcome(unknown, "Stream removed (TSI_DATA_CORRUPTED)"), ADDRESS
    )
    assert type(removed) is gradwire.ConnectionLostError
    assert "TSI_DATA_CORRUPTED" in str(removed)
    other = call_error(Outcome(unknown, "Unexpected <class 'E'>"), ADDRESS)
    assert type(other) is gradwire.ServerError


RESET = [
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
]


@pytest.mark.parametrize("code", RESET)
@pytest.mark.parametrize(
    "text",
    ["Received RST_STREAM with error code 2", "No status received", "", "of a proxy"],
)
def test_what_no_gradwire_server_gave_a_reason_for_is_a_lost_connection(
    code: grpc.StatusCode, text: str
) -> None:
    error = call_error(Outcome(code, text), ADDRESS, "j-1")
    assert type(error) is gradwire.ConnectionLostError
    assert is_transient(error)
    assert (error.status, error.details, error.job_id) == (code, text, "j-1")


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("RESOURCE_EXHAUSTED", "CLIENT: Sent message larger than max (5 vs. 4)"),
        ("RESOURCE_EXHAUSTED", "SERVER: Received message larger than max (5 vs. 4)"),
        ("RESOURCE_EXHAUSTED", "received metadata size exceeds hard limit"),
        ("CANCELLED", "Locally cancelled by application!"),
        ("CANCELLED", "Channel closed!"),
        ("INTERNAL", "Exception deserializing response!"),
        ("UNKNOWN", "Exception iterating requests!"),
        ("UNKNOWN", "Unexpected <class 'ValueError'>: no"),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded"),
    ],
)
def test_what_would_happen_again_is_not_tried_again(code: str, text: str) -> None:
    status = grpc.StatusCode[code]
    error = call_error(Outcome(status, text), ADDRESS)
    assert type(error) is BY_STATUS[status]
    assert not is_transient(error)


@pytest.mark.parametrize("code", [*RESET, grpc.StatusCode.UNAVAILABLE])
@pytest.mark.parametrize("reason", [Reason.BUSY, Reason.RESUME_MISMATCH])
def test_the_servers_reason_outranks_a_proxys_status(
    code: grpc.StatusCode, reason: Reason
) -> None:
    outcome = Outcome(reason.status, "so it is", ErrorDetails(reason, retry_after_s=1))
    outcome._code, outcome._text = code, "Received RST_STREAM with error code 8"
    error = call_error(outcome, ADDRESS)
    assert type(error) is BY_REASON.get(reason, gradwire.RequestError)
    assert (error.status, error.details) == (reason.status, "so it is")
    assert is_transient(error) is (reason is Reason.BUSY)


@pytest.mark.parametrize("code", list(BY_STATUS))
def test_a_reason_of_a_newer_server_is_treated_like_its_status(
    code: grpc.StatusCode,
) -> None:
    info = error_details_pb2.ErrorInfo(reason="OF_THE_FUTURE", domain="gradwire")
    packed = status_pb2.Status(code=code.value[0], message="so it will be")
    packed.details.add().Pack(info)
    outcome = Outcome(grpc.StatusCode.CANCELLED, "RST_STREAM")
    outcome._trailers = ((error_details.TRAILER, packed.SerializeToString()),)
    error = call_error(outcome, ADDRESS)
    assert type(error) is BY_STATUS[code]
    assert (error.status, error.details) == (code, "so it will be")


@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_becomes_its_class_with_everything_attached(
    reason: Reason,
) -> None:
    attached = ErrorDetails(
        reason=reason,
        fields={"job.k": "is negative"},
        metadata={"job_id": "the-job", "error_id": "e1"},
        retry_after_s=1.5,
    )
    error = call_error(Outcome(reason.status, "so it is", attached), ADDRESS)
    if reason is Reason.CONTRACT_UNKNOWN:
        assert type(error) is gradwire.ContractError
    else:
        assert type(error) is BY_REASON.get(reason, BY_STATUS[reason.status])
        assert str(error) == f"so it is ({reason}, job the-job)"
    assert error.reason is reason
    assert error.status is reason.status
    assert error.fields == {"job.k": "is negative"}
    assert error.metadata["error_id"] == "e1"
    assert error.retry_after_s == 1.5
    assert error.job_id == "the-job"
    assert error.details == "so it is"


@pytest.mark.parametrize("code", list(BY_STATUS))
def test_every_status_without_a_reason_becomes_an_exception(
    code: grpc.StatusCode,
) -> None:
    error = call_error(Outcome(code, "a proxy's text"), ADDRESS, "the-job")
    assert isinstance(error, gradwire.GradwireError)
    assert error.status is code
    assert error.job_id == "the-job"
    assert error.details == "a proxy's text"


@pytest.mark.parametrize(
    ("text", "cls", "sentence"),
    [
        (
            "failed to connect to all addresses; last error: UNKNOWN:"
            " ipv4:127.0.0.1:1: Failed to connect to remote host: Connection refused",
            gradwire.ConnectError,
            "nothing listens at gpu-node:50051 (Connection refused)",
        ),
        (
            "failed to connect to all addresses; last error: FAILED_PRECONDITION:"
            " unix:/s: connect failed: addr: unix:/s error: No such file or directory",
            gradwire.ConnectError,
            "nothing listens at gpu-node:50051 (No such file or directory)",
        ),
        (
            "failed to connect to all addresses; last error: FAILED_PRECONDITION:"
            " unix:/s: connect failed: addr: unix:/s error: Permission denied",
            gradwire.ConnectError,
            "gpu-node:50051 cannot be reached (Permission denied)",
        ),
        (
            "failed to connect to all addresses; last error: UNAVAILABLE:"
            " ipv4:127.0.0.1:80: Failed parsing HTTP/2 (Expected SETTINGS frame as"
            " the first frame, got frame type 79)",
            gradwire.ConnectError,
            "the server at gpu-node:50051 does not support HTTP/2, so it is not a"
            " gradwire server",
        ),
        (
            "failed to connect to all addresses; last error: UNAVAILABLE:"
            " ipv4:127.0.0.1:80: recvmsg:Connection reset by peer (104)",
            gradwire.ConnectError,
            "the server at gpu-node:50051 closed the connection at once: it expects"
            " TLS (tls=...), is not a gradwire server, or is stopping"
            " (recvmsg:Connection reset by peer (104))",
        ),
        (
            "errors resolving gpu-node:50051: [field:hostname lookup error:address"
            " lookup failed for gpu-node:50051: Domain name not found]",
            gradwire.ConnectError,
            "the name in gpu-node:50051 has no known address",
        ),
        (
            "Socket closed",
            gradwire.ConnectionLostError,
            "the connection to gpu-node:50051 broke before the call was done"
            " (Socket closed)",
        ),
        (
            "Received http2 header with status: 502",
            gradwire.UnavailableError,
            "the proxy before gpu-node:50051 could not use its server: it is not"
            " running, or the proxy does not speak HTTP/2 to it (nginx: grpc_pass;"
            " HAProxy: proto h2) (Received http2 header with status: 502)",
        ),
    ],
)
def test_an_unavailable_server_is_told_apart_in_a_sentence(
    text: str, cls: type[Exception], sentence: str
) -> None:
    error = call_error(Outcome(grpc.StatusCode.UNAVAILABLE, text), ADDRESS)
    assert type(error) is cls
    assert str(error) == sentence


@pytest.mark.parametrize(
    "text",
    [
        "Custom verification check failed with error: UNAUTHENTICATED: Hostname"
        " Verification Check failed.",
        "Peer name gpu-node is not in peer certificate",  # grpcio 1.76
    ],
)
def test_a_certificate_for_another_name_is_no_matter_of_grpcs_version(
    text: str,
) -> None:
    text = (
        f"failed to connect to all addresses; last error: UNKNOWN: ipv4:::1:1: {text}"
    )
    outcome = Outcome(grpc.StatusCode.UNAVAILABLE, text)
    error = call_error(outcome, Endpoint("gpu-node:50051", tls=True))
    assert type(error) is gradwire.TlsError
    assert str(error) == (
        "the certificate of the server at gpu-node:50051 is not for the host of the"
        " address: tls.server_name sets the expected name"
    )


def test_a_server_of_another_kind_is_named_as_such() -> None:
    error = call_error(
        Outcome(grpc.StatusCode.UNIMPLEMENTED, "Method not found!"), ADDRESS
    )
    assert type(error) is gradwire.ContractError
    assert str(error) == (
        "the gRPC server at gpu-node:50051 does not offer"
        " gradwire.v1.GradientService (Method not found!)"
    )


def test_a_server_that_does_not_answer_a_handshake_is_a_connect_error() -> None:
    outcome = Outcome(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")
    error = connect_error(outcome, ADDRESS, 2.5)
    assert type(error) is gradwire.ConnectError
    assert str(error) == "no gradwire server answered at gpu-node:50051 within 2.5 s"


def test_damaged_details_do_not_hide_the_error() -> None:
    outcome = Outcome(grpc.StatusCode.INTERNAL, "oh")
    outcome._trailers = ((error_details.TRAILER, b"\xff\xff"), ("other", "x"))
    error = call_error(outcome, ADDRESS)
    assert type(error) is gradwire.ServerError
    assert str(error) == "oh (INTERNAL)"
