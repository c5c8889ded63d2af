"""The span of a call, for programs that use OpenTelemetry.

A span is made only if the program has set a tracer provider. Otherwise OpenTelemetry is
not even imported: that it was is what `sys.modules` says.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from gradwire._api.errors import GradwireError
from gradwire._api.options import (
    MAX_METADATA_BYTES,
    TRACE_KEYS,
    MetadataPairs,
    metadata_bytes,
)
from gradwire._api.types import Receipt
from gradwire._core.job_plan import Plan
from gradwire._transport.address import host_and_port
from gradwire_protocol.limits import SERVICE, SESSION_SERVICE
from gradwire_protocol.version import VERSION

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, Tracer, TracerProvider

_API = "opentelemetry.trace"

Attributes: TypeAlias = Mapping[str, str | int | float | bool]


def callers_context() -> Context | None:
    """Return the OpenTelemetry context of the caller, for a span that begins later.

    Returns:
        The context; None if the program has no tracer provider.
    """
    if _API not in sys.modules or _tracer() is None:
        return None
    # Imported here: it is there, and most programs have it not.
    from opentelemetry.context import get_current  # noqa: PLC0415

    return get_current()


def job_span(
    plan: Plan,
    metadata: MetadataPairs,
    *,
    unary: bool,
    context: Context | None = None,
) -> CallSpan | None:
    """Begin the span of a job.

    Args:
        plan: The job's plan.
        metadata: Metadata of the job's calls.
        unary: Whether the job is sent in one message.
        context: The caller's context; None: that of now.

    Returns:
        The span; None if the program has no tracer provider.
    """
    if _API not in sys.modules or (tracer := _tracer()) is None:
        return None
    attributes: dict[str, str | int] = {
        "gradwire.n": plan.n,
        "gradwire.k": plan.k,
        "gradwire.dtype": plan.dtype.label,
        "gradwire.results": ",".join(result.label for result in plan.options.results),
        "gradwire.job_id": plan.options.job_id,
    }
    if plan.m is not None:
        attributes["gradwire.m"] = plan.m
    method = _COMPUTE if unary else _COMPUTE_STREAM
    return CallSpan(tracer, method, metadata, context, attributes)


def session_span(
    name: str, metadata: MetadataPairs, session: str = ""
) -> CallSpan | None:
    """Begin the span of a call of a session.

    Args:
        name: The method.
        metadata: Metadata of the call.
        session: The session's id; empty: none.

    Returns:
        The span; None if the program has no tracer provider.
    """
    if _API not in sys.modules or (tracer := _tracer()) is None:
        return None
    attributes = {"gradwire.session": session} if session else {}
    method = f"{SESSION_SERVICE}/{name}"
    return CallSpan(tracer, method, metadata, None, attributes)


class CallSpan:
    """The span of a call over all of its attempts.

    Its names follow OpenTelemetry's conventions for RPCs. Each failed attempt that is
    repeated is an event.

    Args:
        tracer: The tracer.
        method: The full name of the method.
        metadata: Metadata of the call, for which the span's own leaves room.
        context: The caller's context; None: that of now.
        attributes: Attributes of the call.

    Attributes:
        metadata: What names the span to the server (W3C Trace Context); empty if the
            caller's metadata names one.
        ids: Fields of log lines that name the span.
    """

    def __init__(
        self,
        tracer: Tracer,
        method: str,
        metadata: MetadataPairs,
        context: Context | None,
        attributes: Attributes,
    ) -> None:
        from opentelemetry.trace import (  # noqa: PLC0415
            SpanKind,
            format_span_id,
            format_trace_id,
        )

        self._span: Span = tracer.start_span(
            method,
            context,
            SpanKind.CLIENT,
            {"rpc.system.name": "grpc", "rpc.method": method, **attributes},
        )
        here = self._span.get_span_context()
        self.ids = {
            "trace_id": format_trace_id(here.trace_id),
            "span_id": format_span_id(here.span_id),
        }
        self.metadata = _w3c(self._span, metadata)
        self._ended = False
        self._attempts = 1
        self._server: dict[str, str | int] = {}

    def sent_to(self, address: str) -> None:
        """Name the server of the current attempt, and how elements travel to it."""
        if address.startswith("unix:"):
            transport, self._server = "unix", {"server.address": address[5:]}
        else:
            host, port = host_and_port(address)
            transport = "tcp"
            self._server = {"server.address": host, "server.port": port}
        self._span.set_attributes({**self._server, "gradwire.transport": transport})

    def in_shared_memory(self) -> None:
        """Tell that the current attempt shares memory with the server.

        That is another method than the one of a small job in one message.
        """
        self._span.update_name(_COMPUTE_STREAM)
        self._span.set_attributes(
            {"rpc.method": _COMPUTE_STREAM, "gradwire.transport": "shm"}
        )

    def computed(self, receipt: Receipt) -> None:
        """Tell what a receipt says of the last attempt."""
        self._span.set_attributes(
            {
                "gradwire.m": receipt.m,
                "gradwire.transport": receipt.transport,
                # As this side sees it: what the server received was sent.
                "gradwire.bytes_sent": receipt.bytes_received,
                "gradwire.bytes_received": receipt.bytes_sent,
            }
        )

    def retried(self, cause: str, delay_s: float) -> None:
        """Add the event of a failed attempt, after which there is another one."""
        self._span.add_event(
            "retry",
            {
                "gradwire.attempt": self._attempts,
                "gradwire.delay_s": round(delay_s, 6),
                "error.type": cause,
                **self._server,
            },
        )
        self._attempts += 1

    def end(self, error: BaseException | None = None) -> None:
        """End the span. Further calls do nothing.

        Args:
            error: Why the call failed; None: it succeeded.
        """
        if self._ended:
            return
        self._ended = True
        self._span.set_attribute("gradwire.attempts", self._attempts)
        if error is None:
            self._span.set_attribute("rpc.response.status_code", "OK")
        else:
            self._failed(error)
        self._span.end()

    def _failed(self, error: BaseException) -> None:
        from opentelemetry.trace import Status, StatusCode  # noqa: PLC0415

        kind, status = type(error).__name__, "CANCELLED"
        if isinstance(error, GradwireError):
            status = error.status.name if error.status else ""
            kind = str(error.reason or status or kind)
        if status:
            self._span.set_attribute("rpc.response.status_code", status)
        if isinstance(error, GeneratorExit):  # a stream may be left at any time
            return
        self._span.set_attribute("error.type", kind)
        self._span.set_status(Status(StatusCode.ERROR, str(error) or None))


_COMPUTE, _COMPUTE_STREAM = f"{SERVICE}/Compute", f"{SERVICE}/ComputeStream"

_known: tuple[TracerProvider, Tracer] | None = None
"""The last provider, and its tracer."""


def _tracer() -> Tracer | None:
    """Return the program's tracer; None if it has no provider."""
    global _known  # noqa: PLW0603 - a cache
    api: Any = sys.modules[_API]
    try:
        provider = api.get_tracer_provider()
        none = (api.ProxyTracerProvider, api.NoOpTracerProvider)
    except AttributeError:  # another thread is importing it
        return None
    if isinstance(provider, none):
        return None
    if _known is None or _known[0] is not provider:
        _known = provider, provider.get_tracer("gradwire", VERSION)
    return _known[1]


def _w3c(span: Span, metadata: MetadataPairs) -> MetadataPairs:
    """Return the metadata that names a span to the server, as far as there is room."""
    from opentelemetry.trace import set_span_in_context  # noqa: PLC0415
    from opentelemetry.trace.propagation.tracecontext import (  # noqa: PLC0415
        TraceContextTextMapPropagator,
    )

    if any(key == "traceparent" for key, _ in metadata):
        return ()
    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier, set_span_in_context(span))
    pairs: MetadataPairs = ()
    for key in TRACE_KEYS:
        if key in carrier:
            more = (*pairs, (key, carrier[key]))
            # A long tracestate of others must not fail the call.
            if metadata_bytes((*metadata, *more)) <= MAX_METADATA_BYTES:
                pairs = more
    return pairs
