"""A span for each call, with children for the stages of its job.

Imported on request: it needs opentelemetry-api.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from opentelemetry.context import Context
from opentelemetry.trace import (
    Span,
    SpanKind,
    Status,
    StatusCode,
    Tracer,
    TracerProvider,
    format_span_id,
    format_trace_id,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from gradwire_protocol.error_reasons import Reason
from gradwire_protocol.limits import SERVICE, SESSION_SERVICE
from gradwire_protocol.version import VERSION
from gradwire_server.errors import JobError
from gradwire_server.observability.calls import Call, CallObserver, Metadata
from gradwire_server.observability.figures import JOB_METHODS
from gradwire_server.observability.stages import Interval, StageIntervals

_UNTRACED = frozenset({"OpenRegion", "RenewSession"})
"""Methods that a client calls in the background: the former lasts as long as the
client, and the latter is called every few minutes."""

_OF_TENSORS = frozenset({"PutTensor", "GetTensor"})
"""Methods that move elements, but are no jobs."""

_W3C = TraceContextTextMapPropagator()


class _Open(NamedTuple):
    """The span of a call that has not ended."""

    span: Span
    clocks: _Clocks


class _Clocks(NamedTuple):
    """The two clocks, read together."""

    before_s: float
    """`time.perf_counter` before `wall_ns` was read."""
    wall_ns: int
    """Time since the epoch."""
    after_s: float
    """`time.perf_counter` after it."""

    @classmethod
    def read(cls) -> _Clocks:
        """Read them."""
        return cls(time.perf_counter(), time.time_ns(), time.perf_counter())

    def at(self, clock_s: float) -> int:
        """Return the nanoseconds since the epoch at a time of the monotonic clock.

        A wall clock that is set meanwhile then moves no span. Between two readings the
        thread may have waited for the processor. So that a span lies within that of its
        client nevertheless, no earlier time is too early, and no later one too late.
        """
        if clock_s <= self.before_s:
            return self.wall_ns - int((self.before_s - clock_s) * 1e9)
        return self.wall_ns + int(max(clock_s - self.after_s, 0.0) * 1e9)


class CallSpans(CallObserver):
    """Makes the spans of calls.

    The span that a client names in its metadata (W3C Trace Context) is the parent; a
    client that names none, or not in that form, begins a trace.

    Args:
        provider: Where spans go.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self._tracer: Tracer = provider.get_tracer("gradwire.server", VERSION)
        self._open: dict[Call, _Open] = {}

    def began(self, call: Call) -> None:
        """Begin the call's span."""
        if call.method in _UNTRACED:
            return
        clocks = _Clocks.read()
        service = SERVICE if call.method in JOB_METHODS else SESSION_SERVICE
        method = f"{service}/{call.method}"
        span = self._tracer.start_span(
            method,
            parent_of(call.metadata() or ()),
            SpanKind.SERVER,
            {"rpc.system.name": "grpc", "rpc.method": method},
            start_time=clocks.at(call.started),
        )
        context = span.get_span_context()
        if not context.is_valid:  # the process has turned tracing off
            return
        call.trace_ids = {
            "trace_id": format_trace_id(context.trace_id),
            "span_id": format_span_id(context.span_id),
        }
        if span.is_recording():
            call.progress.stages = StageIntervals()
            self._open[call] = _Open(span, clocks)

    def ended(
        self, call: Call, reason: Reason | None, error: JobError | None = None
    ) -> None:
        """End the call's span."""
        begun = self._open.pop(call, None)
        if begun is None:
            return
        now_s, span = time.perf_counter(), begun.span
        span.set_attributes(_attributes(call))
        status = "OK" if reason is None else reason.status.name
        span.set_attribute("rpc.response.status_code", status)
        if reason is not None and not call.ends_by_cancelling:
            span.set_attribute("error.type", str(reason))
            # That a client cancels its call is no error of the server's.
            if reason is not Reason.JOB_CANCELLED:
                text = None if error is None else error.message
                span.set_status(Status(StatusCode.ERROR, text))
        self._add_stages(call, begun, now_s)
        span.end(begun.clocks.at(now_s))

    def _add_stages(self, call: Call, begun: _Open, now_s: float) -> None:
        if not call.asked_at:
            return
        admitted_at = call.asked_at + call.waited_s if call.admitted else now_s
        progress, stages = call.progress, call.progress.stages
        context = set_span_in_context(begun.span, Context())
        clocks = begun.clocks

        def add(name: str, first_s: float, last_s: float, **figures: float) -> None:
            attributes = {
                f"gradwire.{key}": round(value, 6) for key, value in figures.items()
            }
            child = self._tracer.start_span(
                name, context, attributes=attributes, start_time=clocks.at(first_s)
            )
            child.end(clocks.at(max(first_s, last_s)))

        waited_s = admitted_at - call.asked_at
        add("wait", call.asked_at, admitted_at, waited_s=waited_s)
        if stages is None or not call.admitted:
            return
        sent = call.transport != "shm"
        if sent and stages.receive.first:
            add(
                "receive",
                *_apart(stages.receive, admitted_at),
                receiving_s=call.receiving_s,
                bytes_received=progress.bytes_received,
            )
        if stages.compute.first:
            add(
                "compute",
                stages.compute.first,
                stages.compute.last,
                computing_s=progress.times.computing_s,
                blocks=progress.blocks,
            )
        if sent and stages.send.first:
            add(
                "send",
                stages.send.first,
                stages.send.last,
                sending_s=call.sending_s,
                bytes_sent=progress.bytes_sent,
            )


def _apart(receive: Interval, admitted_at: float) -> tuple[float, float]:
    """Return when operands were received: of a stream, after the job was admitted.

    Its header is received before.
    """
    if receive.last > admitted_at:
        return max(receive.first, admitted_at), receive.last
    return receive.first, receive.last


def _attributes(call: Call) -> dict[str, Any]:
    """Return the fields of the call's log line as attributes."""
    fields = call.log_fields()
    if call.method in _OF_TENSORS:
        fields["bytes_received"] = call.progress.bytes_received
        fields["bytes_sent"] = call.progress.bytes_sent
    if call.resumed:
        fields["resumed"] = True
    left_out = {"method", "total_s", *(call.trace_ids or ())}
    return {
        f"gradwire.{key}": value
        for key, value in fields.items()
        if key not in left_out and value is not None and value != ""
    }


def parent_of(metadata: Metadata) -> Context:
    """Return a context with the span that a client names, or with none.

    https://www.w3.org/TR/trace-context/: what is malformed, or sent twice, is as if it
    had not been sent.
    """
    given: dict[str, list[str]] = {"traceparent": [], "tracestate": []}
    for key, value in metadata:
        if key in given and isinstance(value, str):
            given[key].append(value)
    if len(given["traceparent"]) != 1:
        return Context()
    carrier = {
        "traceparent": given["traceparent"][0],
        "tracestate": ",".join(given["tracestate"]),
    }
    return _W3C.extract(carrier, Context())
