"""Sends spans by OTLP, in a thread of its own.

Imported on request: it needs the extra `otel`. OpenTelemetry's SDK reads the variables
OTEL_*: where to send, which part of all traces, and how much may wait.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Sequence
from typing import Any

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import (
    OTLPSpanExporter as OverGrpc,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import (
    BatchSpanProcessor,
    SpanExporter,
    SpanExportResult,
)

from gradwire_protocol.version import VERSION
from gradwire_server.errors import TracesError

_log = logging.getLogger("gradwire_server")

SERVICE_NAME = "gradwire"
"""The service's name, unless OTEL_SERVICE_NAME or OTEL_RESOURCE_ATTRIBUTES has one."""

TELL_EVERY_S = 300.0
"""Seconds between log lines about spans that are lost."""

FLUSH_S = 2.0
"""Seconds for the last spans when the server stops."""

_GRPC, _HTTP = "grpc", "http/protobuf"


class Otlp:
    """A tracer provider that sends its spans by OTLP.

    Raises:
        TracesError: A package is missing, or a variable is invalid.

    Attributes:
        provider: The provider. It is not the process's own.
        endpoint: Where spans are sent, for the log.
    """

    def __init__(self) -> None:
        try:
            exporter, endpoint = _exporter()
            self.endpoint = re.sub("//[^/@]*@", "//", endpoint)  # without a password
            self._exporter = _Telling(exporter, self.endpoint)
            self.provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
            self.provider.add_span_processor(BatchSpanProcessor(self._exporter))
        except TracesError:
            raise
        except Exception as error:
            raise TracesError(
                f"traces is set, and OpenTelemetry refuses its variables OTEL_*: "
                f"{error}"
            ) from error
        self._stopped = threading.Event()

    def close(self) -> None:
        """Send the last spans, within `FLUSH_S`, in threads that nobody waits for."""
        for work in (self._shut_down, self._give_up):
            threading.Thread(target=work, name="gradwire-traces", daemon=True).start()

    def wait(self) -> None:
        """Wait until they are sent, or lost."""
        self._stopped.wait(FLUSH_S + 1.0)

    def _shut_down(self) -> None:
        self.provider.shutdown()
        self._stopped.set()

    def _give_up(self) -> None:
        # A collector that does not answer would take until the exporter's timeout.
        if not self._stopped.wait(FLUSH_S):
            self._exporter.give_up()


class _Telling(SpanExporter):
    """Tells now and then that spans are lost, instead of the exporter's every line.

    Args:
        exporter: Sends the spans.
        endpoint: Where to, for the log.
    """

    def __init__(self, exporter: SpanExporter, endpoint: str) -> None:
        self._exporter = exporter
        self._endpoint = endpoint
        self._lost = 0
        self._tell_at = 0.0
        self._given_up = False
        self._causes = _Causes()
        self._loggers = [
            logging.getLogger(name) for name in _loggers_of(type(exporter))
        ]
        for each in self._loggers:
            each.addFilter(self._causes)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send spans."""
        result = self._exporter.export(spans)
        if result is not SpanExportResult.SUCCESS:
            self._lost += len(spans)
            if time.monotonic() >= self._tell_at:
                self._tell()
        elif self._lost or self._tell_at:
            self._tell_at = 0.0
            _log.info("traces are sent again", extra=self._fields())
            self._lost = 0
        return result

    def shutdown(self) -> None:
        """Send no more."""
        if self._lost:
            self._tell()
        if not self._given_up:
            self._exporter.shutdown()
        for each in self._loggers:
            each.removeFilter(self._causes)

    def give_up(self) -> None:
        """End the call of `export` that runs, and send no more."""
        self._given_up = True
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Return at once: nothing waits here."""
        del timeout_millis
        return True

    def _tell(self) -> None:
        self._tell_at = time.monotonic() + TELL_EVERY_S
        fields = self._fields() | {"error": self._causes.last}
        _log.warning("traces cannot be sent; jobs are not affected", extra=fields)
        self._lost = 0

    def _fields(self) -> dict[str, Any]:
        return {"endpoint": self._endpoint, "lost_spans": self._lost}


class _Causes(logging.Filter):
    """Keeps the last line of a log, and lets none pass."""

    def __init__(self) -> None:
        super().__init__()
        self.last = ""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        # That it was shut down meanwhile is what this server did, and no cause.
        if record.levelno >= logging.WARNING and "shutdown" not in text.lower():
            self.last = text
        return False


def _loggers_of(kind: type) -> set[str]:
    """Return the loggers of an exporter's class: its modules have one each."""
    modules = {each.__module__ for each in kind.__mro__}
    return {name for name in modules if name.startswith("opentelemetry.exporter.")}


def _resource() -> Resource:
    resource = Resource.create({"service.version": VERSION})
    name = str(resource.attributes.get("service.name", ""))
    if not name or name.startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": SERVICE_NAME}))
    return resource


def _exporter() -> tuple[SpanExporter, str]:
    """Return the exporter of the protocol that the variables name, and its endpoint."""
    protocol = (
        os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
        or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
        or _GRPC
    )
    endpoint = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or os.environ.get(
        "OTEL_EXPORTER_OTLP_ENDPOINT"
    )
    if protocol == _GRPC:
        return OverGrpc(), endpoint or "http://localhost:4317"
    if protocol == _HTTP:
        try:
            # Not in the extra: gRPC is there anyway, and this brings more packages.
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415
                OTLPSpanExporter as OverHttp,
            )
        except ImportError as error:
            raise TracesError(
                f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol}, and its exporter cannot "
                f"be imported ({error}): install opentelemetry-exporter-otlp-proto-http"
            ) from None
        return OverHttp(), endpoint or "http://localhost:4318"
    raise TracesError(
        f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol!r}: expected {_GRPC} or {_HTTP}"
    )
