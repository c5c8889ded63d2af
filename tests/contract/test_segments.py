"""Sums of dW and dB segment by segment, as any client can ask for them.

The oracle adds the shares of row blocks, each computed by a job of its own, in the
order that the contract states.
"""

from __future__ import annotations

import functools
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import numpy as np
import pytest

from gradwire.v1 import job_pb2, matrix_pb2
from tests.contract.conftest import assert_untroubled
from tests.support.direct_client import (
    CHECKPOINT,
    COMPLETE,
    DirectCall,
    direct_job,
    receive_frame,
)
from tests.support.raw import (
    DTYPES,
    INLINE,
    CallError,
    Problem,
    Stream,
    chunk,
    compute_job,
    compute_request,
    end,
    make_job,
    normal_numbers,
    stream_job,
    whole_numbers,
)
from tests.support.serving import BACKEND, ServerProcess, running_server
from tests.support.sessions import RawSessions, into
from tests.support.shared_memory import RawRegion, shared_job

B, S = 16, 64
SIZES = M, N, K = 300, 30, 20
ENDS = [64, 128, 192, 256, 300]
ALL = ("y", "dx", "dw", "db")
FLOAT64 = matrix_pb2.DTYPE_FLOAT64
SUMS = {matrix_pb2.MATRIX_DW_SUM: "dw", matrix_pb2.MATRIX_DB_SUM: "db"}
ACCUMULATORS = {"float16": "float32", "bfloat16": "float32"}
WIDE = {"dw": "float64", "db": "float64"}


def hard_to_sum(dtype: str = "float32") -> Problem:
    """A problem whose sums differ with every order of additions.

    Shares in float32 leave half of float64's bits free: their sizes have to differ.
    """
    problem = replace(normal_numbers(*SIZES, dtype, seed=5), results=ALL)
    if dtype == "float32":
        scale = 10.0 ** np.random.default_rng(6).uniform(-8, 8, (M // B + 1, 1))
        problem.dy[:] *= np.repeat(scale, B, axis=0)[:M]
    return problem


PROBLEM = hard_to_sum()


@pytest.fixture(
    scope="module",
    params=["numpy", pytest.param("simulated", marks=pytest.mark.thorough)],
)
def server(request: pytest.FixtureRequest) -> Iterator[ServerProcess]:
    backend = BACKEND if request.param == "numpy" else request.param
    settings = {"row_block_bytes": 1 << 16, "allow_shared_memory": True}
    with running_server(backend=backend, **settings) as process:
        yield process
        assert_untroubled(process)


@pytest.fixture(scope="module")
def channel(server: ServerProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as opened:
        yield opened


def in_segments(rows: int = S, **options: Any) -> dict[str, Any]:
    """Options of a job with segments of so many rows, of blocks of `B`."""
    numerics = job_pb2.Numerics(dw_segment_rows=rows)
    features = ["segments", "block-rows"]
    fields = {"numerics": numerics, "block_rows": B, "required_features": features}
    return fields | options


OF_ALL = in_segments(results=dict.fromkeys(ALL) | WIDE)


@dataclass
class Oracle:
    """The sums of a problem, in the accumulator's dtype."""

    segments: list[dict[str, np.ndarray]]
    """Those of each segment alone."""
    totals: list[dict[str, np.ndarray]]
    """Those of each segment and all before it."""


def added(terms: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The sums of all terms, added in their order."""
    return {
        name: functools.reduce(np.add, [each[name] for each in terms])
        for name in terms[0]
    }


def oracle(channel: grpc.Channel, problem: Problem, segment: int = S) -> Oracle:
    wide = ACCUMULATORS.get(problem.dtype, "float64")
    sums = [name for name in problem.results if name in {"dw", "db"}]
    shares = []
    for first in range(0, problem.shape[0], B):
        rows = slice(first, first + B)
        part = Problem(problem.x[rows], problem.w, problem.dy[rows], tuple(sums))
        wanted = dict.fromkeys(sums, wide)
        shares.append(compute_job(channel, part, results=wanted).arrays)
    in_one = segment // B
    segments = [added(shares[at : at + in_one]) for at in range(0, len(shares), in_one)]
    totals = [added(segments[:count]) for count in range(1, len(segments) + 1)]
    return Oracle(segments, totals)


def bits(arrays: dict[str, np.ndarray]) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in arrays.items()}


@dataclass
class Came:
    """What a server sent."""

    accepted: job_pb2.Accepted
    sums: dict[int, dict[str, bytes]] = field(default_factory=dict)
    """Those after each Checkpoint, by its rows."""
    results: dict[str, bytes] = field(default_factory=dict)
    firsts: dict[str, int] = field(default_factory=dict)
    """Index of the first element of each result."""
    order: list[str] = field(default_factory=list)
    receipt: job_pb2.Receipt = field(default_factory=job_pb2.Receipt)
    reason: str = ""

    def checkpoint(self, rows: int) -> None:
        assert rows not in self.sums
        self.sums[rows] = {}
        self.order.append(f"sums at {rows}")

    def take(self, matrix: int, index: int, data: bytes) -> None:
        if matrix in SUMS:
            name, into = SUMS[matrix], list(self.sums.values())[-1]
            wide = self.accepted.effective_job.numerics.dw_accumulator == FLOAT64
            assert index * (8 if wide else 4) == len(into.get(name, b""))
        else:
            name, into = matrix_pb2.Matrix.Name(matrix)[7:].lower(), self.results
            self.firsts.setdefault(name, index)
            self.order.append(name)
        into[name] = into.get(name, b"") + data


def read(stream: Stream, came: Came) -> Came:
    """Reads the messages of a call to its end."""
    while (message := stream.receive()) is not None:
        match message.WhichOneof("message"):
            case "checkpoint":
                came.checkpoint(message.checkpoint.rows)
            case "chunk":
                given = message.chunk
                came.take(given.matrix, given.index, given.data)
            case "receipt":
                came.receipt = message.receipt
    return came


def streamed(channel: grpc.Channel, problem: Problem, **options: Any) -> Came:
    with Stream(channel) as stream:
        stream.send(problem.job(**options))
        came = Came(stream.receive_accepted().accepted)
        stream.send_all(problem.body(came.accepted.block_rows))
        stream.half_close()
        return read(stream, came)


def on_direct_connections(
    channel: grpc.Channel, problem: Problem, **options: Any
) -> Came:
    with DirectCall(channel, problem, **options) as call:
        assert call.access.connections == 2
        call.attach().send_all()
        came = Came(call.accepted)
        rows: dict[str, dict[int, bytes]] = {"y": {}, "dx": {}}
        for sock in call.downs:
            while (frame := receive_frame(sock)).kind != COMPLETE:
                name = matrix_pb2.Matrix.Name(frame.matrix)[7:].lower()
                if frame.kind == CHECKPOINT:
                    came.checkpoint(frame.index)
                elif name in rows:
                    rows[name][frame.index] = frame.payload
                else:
                    came.take(frame.matrix, frame.index, frame.payload)
        for name, parts in rows.items():
            if parts:
                came.results[name] = b"".join(parts[at] for at in sorted(parts))
        return read(call.stream, came)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_added_segment_by_segment(channel: grpc.Channel, dtype: str) -> None:
    problem = hard_to_sum(dtype)
    wide = ACCUMULATORS.get(dtype, "float64")
    expected = oracle(channel, problem).totals[-1]
    options = in_segments(results=dict.fromkeys(ALL) | dict.fromkeys(expected, wide))
    ways = [
        compute_job(channel, problem, **options),
        stream_job(channel, problem, **options),
        stream_job(channel, problem, open_m=True, message_bytes=500, **options),
        direct_job(channel, problem, **options),
    ]
    plain = compute_job(channel, problem, **options | {"numerics": None})
    for each in ways:
        assert each.accepted.block_rows == B
        assert each.accepted.fingerprint.segment_rows == S
        assert each.accepted.effective_job.numerics.dw_segment_rows == S
        got = {name: each.arrays[name] for name in expected}
        assert bits(got) == bits(expected)
        for name in ("y", "dx"):
            assert each.bits[name] == plain.bits[name]
    # Otherwise nothing here would show anything.
    assert plain.accepted.fingerprint.segment_rows == B
    assert plain.bits["dw"] != ways[0].bits["dw"]
    # Without a wish, the total is rounded once.
    own = stream_job(channel, problem, **in_segments(results=ALL))
    rounded = {name: each.astype(DTYPES[dtype]) for name, each in expected.items()}
    assert bits({name: own.arrays[name] for name in expected}) == bits(rounded)


def test_segments_of_one_block_are_none(channel: grpc.Channel) -> None:
    plain = stream_job(channel, PROBLEM, block_rows=B)
    options = in_segments(B)
    for outcome in (
        stream_job(channel, PROBLEM, **options),
        # A segment limits the rows of a block, too.
        stream_job(channel, PROBLEM, **options | {"block_rows": 0}),
        stream_job(channel, PROBLEM, **options | {"block_rows": 64}, open_m=True),
    ):
        assert outcome.accepted.block_rows == B
        assert outcome.accepted.fingerprint == plain.accepted.fingerprint
        assert outcome.bits == plain.bits
        assert outcome.accepted.reserved_bytes == plain.accepted.reserved_bytes


@pytest.mark.parametrize("run", [streamed, on_direct_connections])
@pytest.mark.parametrize("results", [ALL, ("dw",), ("db",)])
def test_the_sums_of_each_segment_come_alone(
    channel: grpc.Channel, run: Any, results: tuple[str, ...]
) -> None:
    problem = replace(PROBLEM, results=results)
    expected = oracle(channel, problem)
    plain = stream_job(channel, problem, block_rows=B).bits
    for open_m in (False, True):
        options = in_segments(segment_sums=True, open_m=open_m, max_chunk_bytes=1000)
        came = run(channel, problem, **options)
        assert came.accepted.effective_job.segment_sums
        assert came.accepted.effective_job.dw.dtype in {0, 4}
        assert list(came.sums) == ENDS
        assert list(came.sums.values()) == list(map(bits, expected.segments))
        rows = {name: plain[name] for name in ("y", "dx") if name in results}
        assert came.results == rows
        assert came.receipt.m == M
        assert came.receipt.blocks == -(-M // B)
        sent = sum(map(len, [*rows.values()]))
        sent += sum(len(data) for each in came.sums.values() for data in each.values())
        assert came.receipt.bytes_sent == sent
        if run is streamed and "y" in results:
            before = came.order[: came.order.index(f"sums at {S}")]
            assert {"y", "dx"} <= set(before)
            assert came.order[-1] == f"sums at {M}"
    if "dw" in results and run is streamed:
        total = added(expected.segments)
        assert bits(total) == bits(expected.totals[-1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_client_that_adds_sums_of_blocks_has_the_bits_of_a_job_without_segments(
    channel: grpc.Channel, dtype: str
) -> None:
    problem = replace(hard_to_sum(dtype), results=("dw",))
    wide = ACCUMULATORS.get(dtype, "float64")
    whole = stream_job(channel, problem, block_rows=B, results={"dw": wide})
    came = streamed(channel, problem, **in_segments(B, segment_sums=True))
    terms = [np.frombuffer(each["dw"], wide) for each in came.sums.values()]
    assert len(terms) == -(-M // B)
    assert functools.reduce(np.add, terms).tobytes() == whole.bits["dw"]


@pytest.mark.parametrize("run", [streamed, on_direct_connections])
def test_a_job_without_rows_has_no_segments(channel: grpc.Channel, run: Any) -> None:
    problem = whole_numbers(0, 5, 4, results=ALL)
    for open_m in (False, True) if run is streamed else (True,):
        came = run(channel, problem, **in_segments(segment_sums=True, open_m=open_m))
        assert (came.sums, came.results) == ({}, {})
        assert came.receipt.transport
    whole = stream_job(channel, problem, **in_segments())
    assert not whole.arrays["dw"].any()


@pytest.mark.parametrize("run", [streamed, on_direct_connections])
@pytest.mark.parametrize(("n", "k"), [(0, 3), (3, 0), (0, 0)])
def test_matrices_without_elements_have_sums_without_elements(
    channel: grpc.Channel, run: Any, n: int, k: int
) -> None:
    problem = whole_numbers(40, n, k, results=ALL)
    plain = stream_job(channel, problem)
    assert stream_job(channel, problem, **in_segments(32)).bits == plain.bits
    if run is on_direct_connections and not n + k:
        return  # there are none for it
    came = run(channel, problem, **in_segments(32, segment_sums=True))
    # Rows of no bytes may be as many as one likes, so there are no messages for them.
    assert list(came.sums) == ([32, 40] if n + k else [])
    db = problem.dy[:32].astype(np.float64).sum(axis=0)
    assert [*came.sums.values()][:1] == (
        [{"db": db.tobytes()}] if k else [{}] * (n > 0)
    )


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("run", [streamed, on_direct_connections])
def test_the_last_segment_may_be_whole(
    channel: grpc.Channel, run: Any, segments: int
) -> None:
    rows = segments * S
    problem = Problem(PROBLEM.x[:rows], PROBLEM.w, PROBLEM.dy[:rows], ("y", "dw"))
    expected = oracle(channel, problem)
    came = run(channel, problem, **in_segments(segment_sums=True))
    assert list(came.sums.values()) == list(map(bits, expected.segments))
    for open_m in (False, True):
        wide = {"y": None, "dw": "float64"}
        options = in_segments(open_m=open_m, results=wide)
        outcome = stream_job(channel, problem, **options)
        assert outcome.bits["dw"] == expected.totals[-1]["dw"].tobytes()


def late(channel: grpc.Channel, problem: Problem, **options: Any) -> Came:
    """A client that reads when the server takes no more, or has everything."""
    made = 0

    def body() -> Iterator[Any]:
        nonlocal made
        for message in problem.body(B, 1 << 14):
            made += 1
            yield message

    with Stream(channel) as stream:
        stream.send(problem.job(**options))
        accepted = stream.receive_accepted().accepted
        stream.send_all(body())
        stream.half_close()
        before = -1
        while before < made:
            before = made
            time.sleep(0.1)
        return read(stream, Came(accepted))


def test_a_device_that_computes_beside_its_thread_has_the_same_order() -> None:
    with (
        running_server(backend="simulated", row_block_bytes=1 << 16) as process,
        grpc.insecure_channel(process.address) as channel,
    ):
        expected = oracle(channel, PROBLEM)
        whole = stream_job(channel, PROBLEM, **OF_ALL)
        assert {name: whole.bits[name] for name in WIDE} == bits(expected.totals[-1])
        came = streamed(channel, PROBLEM, **in_segments(segment_sums=True))
        assert list(came.sums.values()) == list(map(bits, expected.segments))


@pytest.mark.parametrize("run", [late, on_direct_connections])
def test_no_sums_are_left_out_for_a_client_that_reads_late(
    channel: grpc.Channel, run: Any
) -> None:
    """Sums of 1 MiB each, more than the buffers on the way hold."""
    problem = whole_numbers(20 * B, 512, 256, results=("dw",))
    expected = oracle(channel, problem, segment=B)
    came = run(channel, problem, **in_segments(B, segment_sums=True))
    assert list(came.sums.values()) == list(map(bits, expected.segments))


def test_shared_memory_has_segments_too(server: ServerProcess) -> None:
    problem = replace(PROBLEM, results=("y", "dw"))
    with (
        grpc.insecure_channel(server.address) as channel,
        RawRegion(channel, 1 << 20) as region,
    ):
        expected = oracle(channel, problem).totals[-1]["dw"]
        for dtype in ("float32", "float64"):
            wanted = {"y": None, "dw": dtype}
            header = region.lay_out(problem, **in_segments(results=wanted))
            shared_job(channel, header)
            assert region.bits(header)["dw"] == expected.astype(dtype).tobytes()


def test_a_gradient_that_stays_is_summed_in_segments(channel: grpc.Channel) -> None:
    problem = replace(PROBLEM, results=("y", "dw"))
    expected = oracle(channel, problem).totals[-1]["dw"].astype(np.float32)
    session = RawSessions(channel).open(1 << 20)
    session.zeros(7, (N, K))
    for run in (session.stream, session.compute):
        run(problem, **in_segments(dw=into(7)))
        assert session.get(7).tobytes() == expected.tobytes()


# Jobs that go on.


def going_on(
    channel: grpc.Channel,
    accepted: job_pb2.Accepted,
    first: int,
    results_from: int,
    sums: dict[str, bytes],
) -> Came:
    resume = job_pb2.Resume(
        fingerprint=accepted.fingerprint,
        first_row=first,
        results_from_row=results_from,
        **{f"{name}_sum": INLINE for name in sums},
    )
    with Stream(channel) as stream:
        stream.send(PROBLEM.job(**OF_ALL, resume=resume))
        came = Came(stream.receive_accepted().accepted)
        stream.send_all(PROBLEM.chunks("w", 0, N))
        for matrix, name in SUMS.items():
            if name in sums:
                stream.send(chunk(matrix, 0, sums[name]))
        for row in range(first, M, B):
            for name in ("x", "dy"):
                stream.send_all(PROBLEM.chunks(name, row, min(row + B, M)))
        stream.send(end(M))
        stream.half_close()
        return read(stream, came)


@pytest.mark.parametrize("run", [streamed, on_direct_connections])
def test_checkpoints_come_at_the_ends_of_segments(
    channel: grpc.Channel, run: Any
) -> None:
    expected = oracle(channel, PROBLEM)
    came = run(channel, PROBLEM, **OF_ALL, checkpoints=job_pb2.Checkpoints(rows=1))
    # One that falls due while another is sent is left out.
    assert came.sums
    assert set(came.sums) <= set(ENDS[:-1])
    for rows, sums in came.sums.items():
        assert sums == bits(expected.totals[rows // S - 1])
        for results_from in (rows, 272, 304):
            again = going_on(channel, came.accepted, rows, results_from, sums)
            assert {name: again.results[name] for name in sums} == bits(
                expected.totals[-1]
            )
            at = min(results_from, M) * K * 4
            assert again.results.get("y", b"") == came.results["y"][at:]
            assert again.receipt.blocks == -(-(M - rows) // B)


def test_sums_go_on_at_the_beginning_of_a_segment_only(channel: grpc.Channel) -> None:
    accepted = stream_job(channel, PROBLEM, **in_segments()).accepted

    def refused(first: int, **options: Any) -> Any:
        fingerprint = job_pb2.NumericsFingerprint()
        fingerprint.CopyFrom(accepted.fingerprint)
        resume = job_pb2.Resume(
            fingerprint=fingerprint,
            first_row=first,
            results_from_row=first,
            dw_sum=INLINE,
            db_sum=INLINE,
        )
        with Stream(channel) as stream:
            stream.send(PROBLEM.job(**options, resume=resume))
            return stream.failure()

    failure = refused(80, **in_segments())
    assert (failure.reason, *failure.fields) == (
        "OPTION_INVALID",
        "job.resume.first_row",
    )
    assert "is 80: expected a multiple of 64" in failure.text
    # Who forgets to ask for segments, or asks for others, is told so.
    for options, here in (
        ({"block_rows": B}, B),
        (in_segments(32), 32),
        (in_segments(256), 256),
    ):
        failure = refused(128, **options)
        assert failure.reason == "RESUME_MISMATCH"
        assert f"segment_rows is 64, and is {here} here" in failure.text
    # Rows alone go on at any block.
    resume = job_pb2.Resume(
        fingerprint=accepted.fingerprint, first_row=80, results_from_row=80
    )
    rows = replace(PROBLEM, results=("y", "dx"))
    with Stream(channel) as stream:
        stream.send(rows.job(**in_segments(resume=resume)))
        stream.receive_accepted()


def cut_off(process: ServerProcess, channel: grpc.Channel, rows: int) -> Came:
    """What comes of a job whose server stops when it has these rows, in messages."""
    with Stream(channel) as stream:
        stream.send(PROBLEM.job(**OF_ALL, checkpoints=job_pb2.Checkpoints()))
        came = Came(stream.receive_accepted().accepted)
        stream.send_all(PROBLEM.chunks("w", 0, N))
        for row in range(0, rows, B):
            for name in ("x", "dy"):
                stream.send_all(PROBLEM.chunks(name, row, row + B))
        while len(came.results.get("dx", b"")) < rows * N * 4:
            message = stream.receive()
            assert message is not None
            came.take(message.chunk.matrix, message.chunk.index, message.chunk.data)
        process.process.send_signal(signal.SIGTERM)
        with pytest.raises(CallError) as failed:
            read(stream, came)
    came.reason = failed.value.reason
    return came


def cut_off_directly(process: ServerProcess, channel: grpc.Channel, rows: int) -> Came:
    """The same on direct connections."""
    header = PROBLEM.job(**OF_ALL, checkpoints=job_pb2.Checkpoints())
    with DirectCall(channel, PROBLEM, header=header) as call:
        came = Came(call.attach().accepted)
        for part in call.elements("w", 0, N, 1 << 20):
            call.send(part)
        for number, row in enumerate(range(0, rows, B)):
            for name in ("x", "dy"):
                for part in call.elements(name, row, row + B, 1 << 20):
                    call.send(part, number % 2)
        for number in range(rows // B):
            for _ in ("y", "dx"):
                frame = receive_frame(call.downs[number % 2])
                came.take(frame.matrix, frame.index, frame.payload)
        process.process.send_signal(signal.SIGTERM)
        frame = receive_frame(call.downs[0])
        assert frame.kind == CHECKPOINT
        came.checkpoint(frame.index)
        for _ in SUMS:
            frame = receive_frame(call.downs[0])
            came.take(frame.matrix, frame.index, frame.payload)
        came.reason = call.stream.failure().reason
    return came


@pytest.mark.parametrize("run", [cut_off, cut_off_directly])
def test_a_stopping_server_hands_over_whole_segments(run: Any) -> None:
    """Results of later rows have been sent by then, and do not come again."""
    rows = 7 * B
    with (
        running_server(row_block_bytes=1 << 16, grace=0.05) as process,
        grpc.insecure_channel(process.address) as channel,
    ):
        expected = oracle(channel, PROBLEM)
        whole = stream_job(channel, PROBLEM, block_rows=B).bits
        came = run(process, channel, rows)
    assert came.reason == "DRAINING"
    assert came.sums == {S: bits(expected.totals[0])}
    assert came.results["y"] == whole["y"][: rows * K * 4]
    with (
        running_server(row_block_bytes=1 << 16) as process,
        grpc.insecure_channel(process.address) as channel,
    ):
        rest = going_on(channel, came.accepted, S, rows, came.sums[S])
    assert rest.results["y"] == whole["y"][rows * K * 4 :]
    assert {name: rest.results[name] for name in WIDE} == bits(expected.totals[-1])


def test_a_job_with_the_sums_of_segments_is_not_handed_over() -> None:
    """The server lets it end, within its grace period."""
    with (
        running_server(row_block_bytes=1 << 16, grace=15.0) as process,
        grpc.insecure_channel(process.address) as channel,
        Stream(channel) as stream,
    ):
        stream.send(PROBLEM.job(**in_segments(segment_sums=True)))
        came = Came(stream.receive_accepted().accepted)
        process.process.send_signal(signal.SIGTERM)
        process.wait_for_log("draining")
        stream.send_all(PROBLEM.body(B))
        stream.half_close()
        assert list(read(stream, came).sums) == ENDS


def test_compute_does_not_send_the_sums_of_segments(channel: grpc.Channel) -> None:
    with pytest.raises(CallError) as refused:
        compute_request(
            channel, PROBLEM.compute_request(**in_segments(segment_sums=True))
        )
    assert refused.value.reason == "OPTION_INVALID"
    assert "ComputeStream does" in refused.value.text


# Memory.


def test_only_jobs_that_add_segments_hold_memory_for_them(
    channel: grpc.Channel,
) -> None:
    def reserved(**options: Any) -> tuple[int, int]:
        with Stream(channel) as stream:
            stream.send(make_job(n=N, k=K, **{"results": ("y", "dw")} | options))
            accepted = stream.receive_accepted().accepted
            return accepted.reserved_bytes, accepted.device_bytes

    size = N * K * 8
    for m in (M, None):
        host, device = reserved(m=m, block_rows=B)
        assert reserved(m=m, **in_segments()) == (host + 2 * size, device)
        assert reserved(m=m, **in_segments(B)) == (host, device)
        by_segment = reserved(m=m, **in_segments(segment_sums=True))
        wide = {"y": None, "dw": "float64"}
        host, device = reserved(m=m, block_rows=B, results=wide)
        assert 0 <= by_segment[0] - host - size < 256
        assert by_segment[1] == device
    known = reserved(m=S, block_rows=B)
    assert reserved(m=S, **in_segments()) == known
