"""The times of spans."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("opentelemetry.sdk")

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from gradwire_server.api.call_state import CallState
from gradwire_server.observability import call_spans


class BusyClock:
    """The clocks of a process that waits for the processor before each reading.

    Args:
        wait_ns: For how long.
    """

    def __init__(self, wait_ns: int) -> None:
        self.now_ns, self._wait_ns = 0, wait_ns

    def time_ns(self) -> int:
        self.now_ns += self._wait_ns
        return self.now_ns

    def perf_counter(self) -> float:
        return (self.time_ns() - 7_000_000_000) / 1e9


def test_a_span_lies_within_its_call_on_a_busy_machine_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The client's span, by the same clock, begins before it and ends behind it."""
    clock = BusyClock(wait_ns=3_000_000)
    monkeypatch.setattr(call_spans, "time", clock)
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    spans = call_spans.CallSpans(provider)
    call: Any = CallState("Compute", "tcp", "", metadata=lambda: ())
    first_ns, call.started = clock.now_ns, clock.perf_counter()
    spans.began(call)
    spans.ended(call, None)
    last_ns = clock.now_ns
    (span,) = exporter.get_finished_spans()
    assert span.start_time is not None
    assert span.end_time is not None
    assert first_ns <= span.start_time < span.end_time <= last_ns
    provider.shutdown()
