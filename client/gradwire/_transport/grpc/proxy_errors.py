"""Sentences for errors that come from a proxy or a web server, not from gradwire.

A proxy answers a call by itself with an HTTP status, which gRPC turns into a status of
its own, or with a gRPC status and a text of its own. It knows no details of gradwire.
"""

from __future__ import annotations

import re

from grpc import StatusCode

from gradwire._api.errors import (
    AuthenticationError,
    ConnectError,
    ContractError,
    GradwireError,
    NotAllowedError,
    UnavailableError,
)
from gradwire._transport.endpoint import Endpoint
from gradwire_protocol import limits

_HTTP_STATUS = re.compile(r"http2 header with status: (\d+)")
"""gRPC's text for an answer with an HTTP status other than 200."""

_BY_HTTP_STATUS: dict[int, tuple[type[GradwireError], str]] = {
    401: (AuthenticationError, "a proxy before {} requires other credentials"),
    403: (NotAllowedError, "a proxy before {} does not allow the call"),
    404: (ContractError, "a web server answers at {}, or a proxy without a route for"
          " the path /{service}/"),
    408: (UnavailableError, "the proxy before {} waited too long for the client: raise"
          " its timeout (nginx: client_body_timeout; HAProxy: timeout client)"),
    413: (ConnectError, "a proxy before {} limits the size of requests, and a job's are"
          " larger: raise the limit (nginx: client_max_body_size 0)"),
    429: (UnavailableError, "a proxy before {} limits the rate of calls"),
    502: (UnavailableError, "the proxy before {} could not use its server: it is not"
          " running, or the proxy does not speak HTTP/2 to it (nginx: grpc_pass;"
          " HAProxy: proto h2)"),
    503: (UnavailableError, "the proxy before {} has no server available"),
    504: (UnavailableError, "the proxy before {} waited too long for its server: raise"
          " its timeout (nginx: grpc_read_timeout, grpc_send_timeout; HAProxy: timeout"
          " server; Envoy: a route's timeout)"),
}  # fmt: skip

_OTHER_HTTP = (
    ConnectError,
    "a web server or a proxy answers at {}, not a gradwire server",
)

_BY_TEXT: tuple[tuple[re.Pattern[str], type[GradwireError], str], ...] = (
    (
        re.compile("upstream (request|response) timeout|stream timeout|max stream dur"),
        UnavailableError,
        "the proxy before {} ended the call, because it took longer than the proxy"
        " allows: raise its timeouts (Envoy: a route's timeout, stream_idle_timeout)",
    ),
    (
        re.compile("upstream connect error|no healthy upstream|upstream reset"),
        UnavailableError,
        "the proxy before {} has no server available",
    ),
)
"""Texts of Envoy, which answers with gRPC statuses."""

_PAGE = re.compile("END_STREAM flag received|Bad GRPC frame")
"""In gRPC's text if an answer is no gRPC, for example a web page."""

_NO_TRAILERS = "No status received"


def proxy_error(
    code: StatusCode, text: str, endpoint: Endpoint, job_id: str | None
) -> GradwireError | None:
    """Return the exception for an answer of a proxy; None if it is not known as one.

    Args:
        code: The call's status.
        text: Its message.
        endpoint: The address of the server, or of the proxy before it.
        job_id: The job.
    """
    kind, sentence = _known(code, text)
    if kind is None:
        return None
    where = sentence.format(endpoint, service=limits.SERVICE)
    return kind(f"{where} ({text})", status=code, job_id=job_id, details=text)


def hint(text: str) -> str:
    """Return what a text of gRPC says about what answers; empty if nothing."""
    if _PAGE.search(text):
        return ": what answers there is not gRPC, but for example a web page"
    if text == _NO_TRAILERS:
        return ": the answer has no end, as behind a proxy that passes no trailers"
    return ""


def _known(code: StatusCode, text: str) -> tuple[type[GradwireError] | None, str]:
    if status := _HTTP_STATUS.search(text):
        return _BY_HTTP_STATUS.get(int(status[1]), _OTHER_HTTP)
    if code in _ENVOYS:
        for pattern, kind, sentence in _BY_TEXT:
            if pattern.search(text):
                return kind, sentence
    return None, ""


_ENVOYS = {StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED}
