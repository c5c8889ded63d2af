"""A collector of OpenTelemetry that keeps what it is sent: the oracle of traces.

It knows OTLP alone, through the classes that are generated from its contract.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent import futures
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import (
    trace_service_pb2,
    trace_service_pb2_grpc,
)
from opentelemetry.proto.trace.v1 import trace_pb2

CLIENT, SERVER, INTERNAL = (
    trace_pb2.Span.SPAN_KIND_CLIENT,
    trace_pb2.Span.SPAN_KIND_SERVER,
    trace_pb2.Span.SPAN_KIND_INTERNAL,
)
OK, ERROR = trace_pb2.Status.STATUS_CODE_UNSET, trace_pb2.Status.STATUS_CODE_ERROR


def _value(value: Any) -> Any:
    return getattr(value, value.WhichOneof("value"))


@dataclass(frozen=True)
class Span:
    """A span, taken apart."""

    service: str
    span: Any

    @property
    def name(self) -> str:
        return str(self.span.name)

    @property
    def id(self) -> str:
        return str(self.span.span_id.hex())

    @property
    def parent(self) -> str:
        return str(self.span.parent_span_id.hex())

    @property
    def trace(self) -> str:
        return str(self.span.trace_id.hex())

    @property
    def attributes(self) -> dict[str, Any]:
        return {each.key: _value(each.value) for each in self.span.attributes}

    @property
    def events(self) -> list[tuple[str, dict[str, Any]]]:
        return [
            (event.name, {each.key: _value(each.value) for each in event.attributes})
            for event in self.span.events
        ]

    def within(self, other: Span) -> bool:
        """Whether it began and ended while the other one lasted."""
        mine, its = self.span, other.span
        return bool(
            its.start_time_unix_nano <= mine.start_time_unix_nano
            and mine.start_time_unix_nano <= mine.end_time_unix_nano
            and mine.end_time_unix_nano <= its.end_time_unix_nano
        )


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Listens on a port of its own."""

    def __init__(self) -> None:
        self._spans: list[Span] = []
        self._came = threading.Condition()
        self._server = grpc.server(futures.ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        port = self._server.add_insecure_port("127.0.0.1:0")
        self.endpoint = f"http://127.0.0.1:{port}"
        self._server.start()

    def __enter__(self) -> Collector:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(None).wait()

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
        with self._came:
            for of in request.resource_spans:
                names = {each.key: each.value for each in of.resource.attributes}
                service = names["service.name"].string_value
                for scope in of.scope_spans:
                    self._spans += [Span(service, each) for each in scope.spans]
            self._came.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    def spans(self, wanted: Callable[[Span], bool]) -> list[Span]:
        """Those that have come until now, in the order of their beginnings."""
        with self._came:
            found = [each for each in self._spans if wanted(each)]
        return sorted(found, key=lambda each: each.span.start_time_unix_nano)

    def wait(
        self, wanted: Callable[[Span], bool], count: int, timeout_s: float = 20.0
    ) -> list[Span]:
        """Those that are wanted, once so many have come."""
        deadline = time.monotonic() + timeout_s
        with self._came:
            while sum(map(wanted, self._spans)) < count:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    names = [each.name for each in self._spans if wanted(each)]
                    raise AssertionError(f"{count} spans did not come, but {names}")
                self._came.wait(left_s)
        return self.spans(wanted)
