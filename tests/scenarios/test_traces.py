"""A call is one trace, from the caller's span to the stages on the server."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
import pytest
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    TraceFlags,
    TraceState,
    use_span,
)

import gradwire
from gradwire_server import Settings, start_in_thread
from tests.scenarios.ways import COMPUTE, SHARED, STREAM, Way, serving_all
from tests.support import oracle
from tests.support.collector import CLIENT, ERROR, INTERNAL, OK, SERVER, Collector, Span
from tests.support.proxy import Fault, Proxy
from tests.support.serving import ServerProcess

X, W, DY = oracle.operands(400, 30, 20)
JOBS = "gradwire.v1.GradientService"
SESSIONS = "gradwire.v1.SessionService"
STAGES = ["wait", "receive", "compute", "send"]


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as one:
        yield one


@pytest.fixture(scope="module")
def server(collector: Collector) -> Iterator[ServerProcess]:
    """A server that sends its spans at once, and lets nobody wait."""
    env = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint,
        "OTEL_BSP_SCHEDULE_DELAY": "20",
    }
    with serving_all(
        traces=True, max_jobs=8, max_queue=0, row_block_bytes=1024, env=env
    ) as one:
        yield one


class Traced:
    """A program with a tracer provider."""

    def __init__(self, provider: TracerProvider, collector: Collector) -> None:
        self.tracer = provider.get_tracer("program")
        self._collector = collector

    @contextmanager
    def caller(self) -> Iterator[str]:
        """A span of the caller; yields its trace's id."""
        with self.tracer.start_as_current_span("caller") as span:
            yield trace.format_trace_id(span.get_span_context().trace_id)

    def spans(self, trace_id: str, count: int) -> list[Span]:
        """All spans of a trace; there are no more than expected."""
        found = self._collector.wait(lambda each: each.trace == trace_id, count)
        assert len(found) == count
        return found


@pytest.fixture(scope="module")
def provider(collector: Collector) -> Iterator[TracerProvider]:
    made = TracerProvider(
        resource=Resource({"service.name": "program"}), shutdown_on_exit=False
    )
    exporter = OTLPSpanExporter(endpoint=collector.endpoint)
    made.add_span_processor(SimpleSpanProcessor(exporter))
    yield made
    made.shutdown()


@pytest.fixture
def traced(
    provider: TracerProvider, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> Traced:
    # A process can set its provider once only, and other tests have none.
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    return Traced(provider, collector)


Gradients: TypeAlias = Callable[..., gradwire.Receipt]


def gradients(way: Way, server: Any, **options: Any) -> gradwire.Receipt:
    with way.connect(server) as client:
        return client.gradients(X, W, DY, **options).receipt


def async_gradients(way: Way, server: Any, **options: Any) -> gradwire.Receipt:
    async def work() -> gradwire.Receipt:
        async with way.async_client(server) as client:
            return (await client.gradients(X, W, DY, **options)).receipt

    return asyncio.run(work())


BOTH = pytest.mark.parametrize("call", [gradients, async_gradients])


def children(spans: list[Span], of: Span) -> list[Span]:
    return [each for each in spans if each.parent == of.id]


def only(spans: list[Span], kind: int) -> Span:
    (found,) = [each for each in spans if each.span.kind == kind]
    return found


def sides(spans: list[Span]) -> tuple[Span, Span]:
    """The client's and the server's span of a trace with one call."""
    client, server = only(spans, CLIENT), only(spans, SERVER)
    assert server.parent == client.id
    return client, server


@BOTH
@pytest.mark.parametrize(
    ("way", "stages"),
    [(COMPUTE, STAGES[:3]), (STREAM, STAGES), (SHARED, ["wait", "compute"])],
    ids=str,
)
def test_a_job_is_one_trace_from_its_caller_to_its_stages(
    traced: Traced,
    server: ServerProcess,
    call: Gradients,
    way: Way,
    stages: list[str],
) -> None:
    method = f"{JOBS}/Compute" if way is COMPUTE else f"{JOBS}/ComputeStream"
    with traced.caller() as trace_id:
        receipt = call(way, server)
    spans = traced.spans(trace_id, 3 + len(stages))
    (root,) = [each for each in spans if not each.parent]
    client, served = sides(spans)
    assert root.name == "caller"
    assert client.parent == root.id
    assert client.name == served.name == method
    assert (client.service, served.service) == ("program", "gradwire")
    assert Counter(each.name for each in children(spans, served)) == Counter(stages)
    for each in spans:
        parents = [one for one in spans if one.id == each.parent]
        assert all(each.within(parent) for parent in parents)
        assert each.span.status.code == OK
    common = {
        "rpc.system.name": "grpc",
        "rpc.method": method,
        "rpc.response.status_code": "OK",
        "gradwire.job_id": receipt.job_id,
        "gradwire.m": 400,
        "gradwire.n": 30,
        "gradwire.k": 20,
        "gradwire.dtype": "float32",
        "gradwire.results": "y,dx,dw",
        "gradwire.transport": way.transport,
    }
    sent, came = receipt.bytes_received, receipt.bytes_sent
    assert sent == X.nbytes + W.nbytes + DY.nbytes
    address = way.address(server)
    place = {"server.address": address.removeprefix("unix:")}
    if not way.unix:
        host, port = address.split(":")
        place = {"server.address": host, "server.port": int(port)}
    told = common | place
    told |= {"gradwire.bytes_sent": sent, "gradwire.bytes_received": came}
    assert client.attributes == told | {"gradwire.attempts": 1}
    told = common | {"gradwire.bytes_sent": came, "gradwire.bytes_received": sent}
    assert told.items() <= served.attributes.items()
    figures = {each.name: each.attributes for each in children(spans, served)}
    assert figures["compute"]["gradwire.blocks"] == receipt.blocks
    if "receive" in stages:
        assert figures["receive"]["gradwire.bytes_received"] == sent
    if "send" in stages:
        assert figures["send"]["gradwire.bytes_sent"] == came
    for stage, figure in (("compute", "computing_s"), ("receive", "receiving_s")):
        if stage in stages:
            seconds = figures[stage][f"gradwire.{figure}"]
            assert seconds == pytest.approx(getattr(receipt, figure), abs=2e-6)
    record = server.wait_for_log(receipt.job_id)
    assert (record["trace_id"], record["span_id"]) == (trace_id, served.id)


_HELD_S = 0.05
"""Seconds between the results of the first rows and the sending of the others."""


def test_stages_that_overlap_last_from_their_first_to_their_last_activity(
    traced: Traced, server: ServerProcess
) -> None:
    came, sent = threading.Event(), threading.Event()

    def rows() -> Iterator[Any]:
        yield X[:200], DY[:200]
        came.wait(20)  # results leave while rows are still to come
        time.sleep(_HELD_S)
        yield X[200:], DY[200:]
        sent.set()

    with STREAM.connect(server) as client, traced.caller() as trace_id:
        for _ in client.stream(rows(), W):
            came.set()
    assert sent.is_set()
    spans = traced.spans(trace_id, 7)
    named = {each.name: each.span for each in spans if each.span.kind == INTERNAL}
    receive, send, compute = (named[each] for each in ("receive", "send", "compute"))
    assert named["wait"].end_time_unix_nano <= receive.start_time_unix_nano
    for other in (compute, send):
        assert receive.start_time_unix_nano <= other.start_time_unix_nano
        assert other.start_time_unix_nano < receive.end_time_unix_nano
    # Nothing says which one ends last: the half-close may come behind all results.
    for stage in (receive, compute, send):
        lasted_ns = stage.end_time_unix_nano - stage.start_time_unix_nano
        assert lasted_ns >= _HELD_S * 1e9, stage.name
    assert compute.start_time_unix_nano <= send.start_time_unix_nano


def test_a_busy_server_and_the_repeated_call_are_one_trace(
    traced: Traced,
    server: ServerProcess,
    caplog: pytest.LogCaptureFixture,
) -> None:
    go_on, running = threading.Event(), threading.Barrier(9)

    def rows() -> Iterator[Any]:
        yield X, DY
        running.wait(20)
        go_on.wait(60)

    class Leaves(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            go_on.set()

    told = Leaves()
    with STREAM.connect(server) as client:
        occupants = [
            threading.Thread(target=lambda: list(client.stream(rows(), W)))
            for _ in range(8)
        ]
        for each in occupants:
            each.start()
        running.wait(20)
        logging.getLogger("gradwire").addHandler(told)
        try:
            with traced.caller() as trace_id:
                receipt = client.gradients(X, W, DY).receipt
        finally:
            logging.getLogger("gradwire").removeHandler(told)
            go_on.set()
            for each in occupants:
                each.join()
    assert receipt.retried == ("BUSY",)
    spans = traced.spans(trace_id, 9)
    client_span = only(spans, CLIENT)
    refused, done = children(spans, client_span)
    assert refused.attributes["error.type"] == "BUSY"
    assert refused.attributes["rpc.response.status_code"] == "RESOURCE_EXHAUSTED"
    assert refused.span.status.code == ERROR
    assert "error.type" not in done.attributes
    assert client_span.attributes["gradwire.attempts"] == 2
    assert client_span.span.status.code == OK
    ((name, event),) = client_span.events
    assert name == "retry"
    assert event["error.type"] == "BUSY"
    assert event["gradwire.attempt"] == 1
    assert event["server.address"] == "127.0.0.1"
    (record,) = [each for each in caplog.records if each.name == "gradwire"]
    assert event["gradwire.delay_s"] == pytest.approx(vars(record)["delay_s"], abs=1e-6)
    assert event["gradwire.delay_s"] >= 1
    assert vars(record)["trace_id"] == trace_id


@BOTH
def test_a_connection_that_is_cut_and_the_rest_of_the_job_are_one_trace(
    traced: Traced, server: ServerProcess, call: Gradients
) -> None:
    soon = gradwire.RetryPolicy(initial_backoff_s=0.02, max_backoff_s=0.2)
    with Proxy(server.addresses[0]) as proxy:
        through: Any = SimpleNamespace(addresses=(proxy.address, ""))
        way = Way("cut", {"transport": "grpc", "retries": soon})
        proxy.arm(Fault("responses", cut_after_messages=100))
        with traced.caller() as trace_id:
            receipt = call(way, through, checkpoint_rows=50)
    assert receipt.retried == ("UNAVAILABLE",)
    spans = traced.spans(trace_id, 12)
    client = only(spans, CLIENT)
    cut, done = children(spans, client)
    assert cut.attributes["rpc.response.status_code"] == "CANCELLED"
    assert cut.attributes["error.type"] == "JOB_CANCELLED"
    assert cut.span.status.code == OK  # no error of the server's
    assert "gradwire.resumed" not in cut.attributes
    assert done.attributes["gradwire.resumed"] is True
    assert 0 < done.attributes["gradwire.blocks"] < 100  # of 4 rows each
    assert [event["error.type"] for _, event in client.events] == ["UNAVAILABLE"]


def test_what_is_not_sampled_has_no_spans_but_its_ids_in_the_log(
    traced: Traced, server: ServerProcess, collector: Collector
) -> None:
    left_out = SpanContext(0xABC, 0xDEF, is_remote=True, trace_flags=TraceFlags(0))
    with COMPUTE.connect(server) as client:
        with use_span(NonRecordingSpan(left_out)):
            receipt = client.gradients(X, W, DY).receipt
        with traced.caller() as trace_id:
            client.gradients(X, W, DY)
    traced.spans(trace_id, 6)  # spans come in the order in which they ended
    record = server.wait_for_log(receipt.job_id)
    assert record["trace_id"] == f"{0xABC:032x}"
    assert not collector.spans(lambda each: each.trace == record["trace_id"])


TRACE_ID, PARENT_ID = "ab" * 16, "cd" * 8


@pytest.mark.parametrize(
    "metadata",
    [
        [("traceparent", "00-zz")],
        [("traceparent", f"00-{TRACE_ID}-{PARENT_ID}")],
        [("traceparent", f"ff-{TRACE_ID}-{PARENT_ID}-01")],
        [("traceparent", f"00-{'0' * 32}-{PARENT_ID}-01")],
    ],
)
def test_a_malformed_traceparent_is_as_if_there_were_none(
    server: ServerProcess, collector: Collector, metadata: Any
) -> None:
    with COMPUTE.connect(server, metadata=metadata) as client:
        job_id = client.gradients(X, W, DY).receipt.job_id
    (span,) = collector.wait(
        lambda each: each.attributes.get("gradwire.job_id") == job_id, 1
    )
    assert span.parent == ""
    assert span.trace != TRACE_ID


def test_a_caller_may_name_its_span_itself(
    traced: Traced, server: ServerProcess
) -> None:
    own = {
        "traceparent": f"00-{'12' * 16}-{PARENT_ID}-01",
        "tracestate": "vendor=1,other=2",
    }
    with traced.caller() as trace_id, COMPUTE.connect(server) as client:
        client.gradients(X, W, DY, metadata=own)
    assert only(traced.spans(trace_id, 2), CLIENT).span.status.code == OK
    spans = traced.spans("12" * 16, 4)
    served = only(spans, SERVER)
    assert served.parent == PARENT_ID
    assert served.span.trace_state == "vendor=1,other=2"


def test_a_call_does_not_fail_because_its_trace_has_no_room_in_the_metadata(
    traced: Traced, server: ServerProcess
) -> None:
    crowded = SpanContext(
        0xAAA,
        0xBBB,
        is_remote=True,
        trace_flags=TraceFlags(1),
        trace_state=TraceState([(f"v{each}", "x" * 200) for each in range(30)]),
    )
    full = {"x-filler": "y" * 7100}
    token = "t" * 6600
    with use_span(NonRecordingSpan(crowded)), COMPUTE.connect(server) as client:
        client.gradients(X, W, DY, metadata={"x-filler": "y" * 2000})
        client.gradients(X, W, DY, metadata=full)
    with (
        use_span(NonRecordingSpan(crowded)),
        COMPUTE.connect(server, token=token) as client,
    ):
        client.gradients(X, W, DY, metadata={"x-filler": "y" * 400})
    spans = traced.spans(f"{0xAAA:032x}", 3 + 4)
    assert len([each for each in spans if each.span.kind == SERVER]) == 1


def test_threads_and_the_jobs_of_a_batch_have_their_callers_as_parents(
    traced: Traced, server: ServerProcess
) -> None:
    heads = np.ones((3, 40, 30), np.float32), np.ones((3, 30, 20), np.float32)
    ids: list[str] = []
    together = threading.Barrier(2)

    def work() -> None:
        with traced.caller() as trace_id:
            together.wait(20)
            ids.append(trace_id)
            client.forward(*heads)

    with COMPUTE.connect(server) as client:
        threads = [threading.Thread(target=work) for _ in range(2)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    assert len(set(ids)) == 2
    for trace_id in ids:
        spans = traced.spans(trace_id, 1 + 3 * 5)
        (root,) = [each for each in spans if not each.parent]
        jobs = children(spans, root)
        assert [each.name for each in jobs] == [f"{JOBS}/Compute"] * 3
        for each in jobs:
            (served,) = children(spans, each)
            assert served.span.kind == SERVER


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_the_calls_of_a_session_have_spans(
    traced: Traced, server: ServerProcess, kind: str
) -> None:
    rule = gradwire.SGD(lr=0.1)

    def sync() -> None:
        with COMPUTE.connect(server) as client, client.session("1MiB") as session:
            w = session.put(W)
            gradient = session.zeros_like(w)
            _, context = session.forward(X, w)
            session.backward(context, DY, into=gradient)
            session.step(rule, {w: gradient})
            session.get(w)

    async def coroutine() -> None:
        async with (
            COMPUTE.async_client(server) as client,
            client.session("1MiB") as session,
        ):
            w = await session.put(W)
            gradient = await session.zeros_like(w)
            _, context = await session.forward(X, w)
            await session.backward(context, DY, into=gradient)
            await session.step(rule, {w: gradient})
            await session.get(w)

    with traced.caller() as trace_id:
        if kind == "sync":
            sync()
        else:
            asyncio.run(coroutine())
    calls = ["OpenSession", "PutTensor", "PutTensor", "Step", "GetTensor"]
    expected = [f"{SESSIONS}/{each}" for each in [*calls, "CloseSession"]]
    expected[3:3] = [f"{JOBS}/Compute"] * 2
    spans = traced.spans(trace_id, 1 + 2 * len(expected) + 6)
    (root,) = [each for each in spans if not each.parent]
    assert [each.name for each in children(spans, root)] == expected
    for each in children(spans, root):
        (served,) = children(spans, each)
        assert (served.name, served.span.kind) == (each.name, SERVER)
        assert served.within(each)
        if each.name.endswith("GetTensor"):
            assert served.attributes["gradwire.bytes_sent"] == W.nbytes
            assert each.attributes["gradwire.session"].startswith("session-")


def test_a_refused_call_has_its_reason_on_both_sides(
    traced: Traced, server: ServerProcess
) -> None:
    with (
        COMPUTE.connect(server) as client,
        traced.caller() as trace_id,
        pytest.raises(gradwire.SessionLostError) as lost,
    ):
        client.close_session("session-of-nobody")
    for each in sides(traced.spans(trace_id, 3)):
        assert each.span.status.code == ERROR
        assert each.attributes["error.type"] == lost.value.reason
        assert lost.value.status is not None
        assert each.attributes["rpc.response.status_code"] == lost.value.status.name
        assert lost.value.details in each.span.status.message


def test_a_stream_that_is_left_early_is_cancelled_and_no_error(
    traced: Traced, server: ServerProcess
) -> None:
    left = threading.Event()

    def rows() -> Iterator[Any]:
        yield X, DY
        left.wait(20)

    with (
        traced.caller() as trace_id,
        STREAM.connect(server) as client,
        client.stream(rows(), W) as stream,
    ):
        next(stream)
        left.set()
        stream.close()
    for each in sides(
        [each for each in traced.spans(trace_id, 7) if each.span.kind != INTERNAL]
    ):
        assert each.span.status.code == OK
        assert each.attributes["rpc.response.status_code"] == "CANCELLED"


async def test_a_cancelled_task_ends_its_span(
    traced: Traced, server: ServerProcess
) -> None:
    asked = asyncio.Event()

    async def rows() -> Any:
        yield X, DY
        asked.set()
        await asyncio.sleep(60)

    async with STREAM.async_client(server) as client:
        with traced.caller() as trace_id:

            async def work() -> None:
                async for _ in client.stream(rows(), W):
                    pass

            task = asyncio.create_task(work())
            await asked.wait()
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
    client_span = only(
        await asyncio.to_thread(
            traced._collector.wait,
            lambda each: each.trace == trace_id and each.span.kind == CLIENT,
            1,
        ),
        CLIENT,
    )
    assert client_span.span.status.code == ERROR
    assert client_span.attributes["error.type"] == "CancelledError"


def test_a_server_in_a_program_uses_the_programs_provider(
    traced: Traced, collector: Collector
) -> None:
    settings = Settings(listen=("127.0.0.1:0",), backend="numpy", cpu_threads=0)
    with (
        start_in_thread(settings) as private,
        traced.caller() as trace_id,
        gradwire.connect(private.addresses[0]) as client,
    ):
        client.gradients(X, W, DY)
    spans = traced.spans(trace_id, 6)
    assert {each.service for each in spans} == {"program"}
    assert sides(spans)


OFF = """
import cProfile, pstats, sys
import numpy as np
import gradwire
from gradwire_server import start_in_thread

a = np.ones((4, 4), np.float32)
with start_in_thread() as server, gradwire.connect(server.addresses[0]) as client:
    client.gradients(a, a, a)
    profile = cProfile.Profile()
    profile.runcall(lambda: [client.gradients(a, a, a) for _ in range(10)])
assert not [name for name in sys.modules if name.startswith("opentelemetry")]
calls = {
    name: count
    for (path, _, name), (count, *_) in pstats.Stats(profile).stats.items()
    if "call_span" in path
}
assert calls == {"job_span": 10}, calls
"""


def test_a_program_without_opentelemetry_pays_one_function_call_for_a_job() -> None:
    subprocess.run([sys.executable, "-c", textwrap.dedent(OFF)], check=True, timeout=60)
