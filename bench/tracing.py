"""What traces cost a small call: ``python -m bench.tracing``.

Servers without traces, with traces of which none is sampled, and with traces of every
call are asked for 32³ products in turn, 250 calls at a time; so is the first of them by
this process without OpenTelemetry, and with a tracer provider. Prints a line of JSON:
microseconds of processor time for a call, of the server or of the client, and what they
are more than without traces. A collector in this process takes the servers' spans; the
client's go nowhere, so that its own figure has no export.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent import futures
from contextlib import ExitStack, contextmanager
from typing import Any

import grpc
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import (
    BatchSpanProcessor,
    SpanExporter,
    SpanExportResult,
)

import gradwire
from bench.driver import rotated
from bench.metrics import SMALL, TURN, busy_ns
from bench.work import operands

KINDS = ("without", "unsampled", "traced")
_API = "opentelemetry.trace"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tracing", description="What traces cost a small call."
    )
    parser.add_argument("--calls", type=int, default=10_000, help="to each (10,000)")
    options = parser.parse_args()
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(_Nowhere()))
    trace.set_tracer_provider(provider)
    turns = options.calls // TURN
    print(json.dumps({"server": servers(turns)}), flush=True)
    print(json.dumps({"client": client(turns)}), flush=True)


def servers(turns: int) -> dict[str, float]:
    """Compare servers; microseconds of their processor time for a call."""
    given = operands(SMALL)
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with ExitStack() as stack, opentelemetry_absent():
        endpoint = stack.enter_context(collector())
        running = {kind: stack.enter_context(server(kind, endpoint)) for kind in KINDS}
        clients = {
            kind: stack.enter_context(gradwire.connect(address, transport="grpc"))
            for kind, (address, _) in running.items()
        }
        for turn in range(-2, turns):
            for kind in rotated(list(KINDS), turn):
                _, pid = running[kind]
                before = busy_ns(pid)
                for _ in range(TURN):
                    clients[kind].gradients(*given)
                if turn >= 0:
                    found[kind].append((busy_ns(pid) - before) / TURN / 1000)
    return compared(found)


def client(turns: int) -> dict[str, float]:
    """Compare this client without OpenTelemetry and with it."""
    given = operands(SMALL)
    found: dict[str, list[float]] = {"without": [], "traced": []}
    with server("without", "") as (address, _), gradwire.connect(address) as one:
        for turn in range(-2, turns):
            for kind in rotated(list(found), turn):
                with ExitStack() as stack:
                    if kind == "without":
                        stack.enter_context(opentelemetry_absent())
                    before = time.process_time_ns()
                    for _ in range(TURN):
                        one.gradients(*given)
                    took = time.process_time_ns() - before
                if turn >= 0:
                    found[kind].append(took / TURN / 1000)
    return compared(found)


def compared(found: dict[str, list[float]]) -> dict[str, float]:
    least = {f"{kind}_us": statistics.median(each) for kind, each in found.items()}
    more = {
        f"{kind}_more_us": statistics.median(
            b - a for a, b in zip(found["without"], each, strict=True)
        )
        for kind, each in found.items()
        if kind != "without"
    }
    return {name: round(value, 1) for name, value in (least | more).items()}


@contextmanager
def opentelemetry_absent() -> Iterator[None]:
    """As in a program that does not use OpenTelemetry."""
    module = sys.modules.pop(_API)
    try:
        yield
    finally:
        sys.modules[_API] = module


@contextmanager
def server(kind: str, endpoint: str) -> Iterator[tuple[str, int]]:
    """A `gradwire serve` of its own; yields its address and its process's number."""
    command = [sys.executable, "-m", "gradwire_cli", "serve", "--backend=numpy"]
    command += ["--listen=127.0.0.1:0", "--log-level=warning"]
    command += [] if kind == "without" else ["--traces"]
    sampler = "always_off" if kind == "unsampled" else "parentbased_always_on"
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_TRACES_SAMPLER": sampler}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | env
    )
    assert process.stdout is not None
    address = process.stdout.readline().split("serves on ")[1].split()[0]
    try:
        yield address, process.pid
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def collector() -> Iterator[str]:
    """Takes spans, and reads none of them."""

    take = grpc.unary_unary_rpc_method_handler(lambda *_: b"")
    service = "opentelemetry.proto.collector.trace.v1.TraceService"
    handler = grpc.method_handlers_generic_handler(service, {"Export": take})
    taking = grpc.server(futures.ThreadPoolExecutor(2), handlers=[handler])
    port = taking.add_insecure_port("127.0.0.1:0")
    taking.start()
    yield f"http://127.0.0.1:{port}"
    taking.stop(None).wait()


class _Nowhere(SpanExporter):
    def export(self, spans: Any) -> SpanExportResult:
        del spans
        return SpanExportResult.SUCCESS


if __name__ == "__main__":
    main()
