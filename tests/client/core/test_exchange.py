from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gradwire
from gradwire._api.options import parse_options
from gradwire._arrays.buffer_pool import ResultPool
from gradwire._arrays.device_copy import HostCopies
from gradwire._arrays.operand import Operand
from gradwire._core.exchange import JobExchange
from gradwire._core.job_plan import plan_arrays, read_operands
from gradwire._core.outputs import ArrayOutputs, Output, output_shapes
from gradwire._resilience.array_job import ArrayJob
from gradwire.v1.gradient_service_pb2 import ComputeResponse, ComputeStreamResponse
from gradwire.v1.job_pb2 import Accepted, Job, Receipt
from gradwire_protocol import checksum, framing
from gradwire_protocol.matrices import DEFAULT_RESULTS, Matrix
from tests.client.core.fake_server import FakeServer, accepted, converse
from tests.support import oracle

M, N, K = 6, 3, 2


def array_job(
    x: Any,
    w: Any,
    dy: Any,
    chunk_bytes: int = 1 << 20,
    *,
    checkpoint_rows: int | None = None,
    **options: Any,
) -> ArrayJob:
    given = {Matrix.X: x, Matrix.W: w, Matrix.DY: dy}
    parsed = parse_options(**{"results": ("y", "dx", "dw")} | options)
    plan, operands = plan_arrays(read_operands(given, parsed), parsed)
    plan = replace(plan, chunk_bytes=chunk_bytes)
    return ArrayJob(
        plan,
        operands,
        ArrayOutputs(plan, output_shapes(plan, operands), {}, ResultPool()),
        unary=False,
        copies=HostCopies(),
        checkpoint_rows=checkpoint_rows,
    )


def small_job(**options: Any) -> ArrayJob:
    return array_job(*oracle.operands(M, N, K, "float64"), **options)


@given(
    m=st.integers(0, 9),
    n=st.integers(0, 4),
    k=st.integers(0, 4),
    dtype=st.sampled_from(oracle.DTYPES),
    block_rows=st.integers(1, 5),
    chunk_bytes=st.integers(1, 64),
)
def test_a_job_of_any_shape_gives_right_results(
    m: int, n: int, k: int, dtype: str, block_rows: int, chunk_bytes: int
) -> None:
    x, w, dy = oracle.operands(m, n, k, dtype)
    job = array_job(x, w, dy, chunk_bytes)
    exchange = job.exchange()
    server = FakeServer(block_rows, 2 * block_rows)
    for answer in converse(exchange, job.messages(exchange), server):
        exchange.receive(answer)
    receipt = exchange.finish()
    results = job.outputs.results(DEFAULT_RESULTS)
    oracle.assert_right(gradwire.Gradients(*results, receipt), x, w, dy, dtype)


def conversation(
    change: Callable[[list[bytes]], list[bytes]], **options: Any
) -> JobExchange:
    """A job whose answers, after Accepted, are changed on the way."""
    job = small_job(**options)
    exchange = job.exchange()
    answers = converse(exchange, job.messages(exchange), FakeServer(block_rows=4))
    for answer in change(answers):
        exchange.receive(answer)
    return exchange


def chunk(matrix: int, index: int, elements: int, crc: int | None = None) -> bytes:
    return framing.encode_chunk(matrix, index, bytes(8 * elements), crc)


def test_the_answers_are_what_the_next_test_takes_them_for() -> None:
    kinds = []

    def look(answers: list[bytes]) -> list[bytes]:
        for answer in answers:
            message = framing.decode_response(answer)
            kinds.append(getattr(message, "matrix", type(message).__name__))
        return answers

    conversation(look).finish()
    assert kinds == [4, 5, 4, 5, 6, "Receipt"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda a: [], "ended the job without a receipt"),
        (lambda a: a[:-1], "ended the job without a receipt"),
        (lambda a: [a[-1]], "ended the job after 0 of 12 elements of y"),
        (lambda a: a[:4] + a[5:], "ended the job after 0 of 6 elements of dw"),
        (lambda a: a[:2] + a[4:], "ended the job after 8 of 12 elements of y"),
        (lambda a: [*a, a[-1]], "sent a message after the job's receipt"),
        (lambda a: [*a, a[0]], "sent a message after the job's receipt"),
        (lambda a: [a[0], *a], "sent y from element 0 on: expected element 8"),
        (lambda a: a[2:], "sent y from element 8 on: expected element 0"),
        (lambda a: [chunk(4, 0, 13)], "sent 13 elements of y: expected at most"),
        (lambda a: [chunk(1, 0, 1)], "sent matrix 1, which was not requested"),
        (lambda a: [chunk(99, 0, 1)], "sent matrix 99, which was not requested"),
        (lambda a: [chunk(4, 0, 0)], "sent a chunk of y without elements"),
        (
            lambda a: [framing.encode_chunk(4, 0, b"123")],
            "sent 3 bytes of y: expected a multiple",
        ),
        (lambda a: [chunk(4, 0, 1, 7)], "sent y with a checksum, contrary to the job"),
        (lambda a: [b"\xff\xff"], "sent an invalid message: the bytes are no"),
        (lambda a: [b""], "sent an invalid message: the message holds neither"),
        (
            lambda a: [framing.encode_accepted(Accepted(block_rows=1, window_rows=1))],
            "accepted the job twice",
        ),
        (
            lambda a: [*a[:-1], framing.encode_receipt(Receipt(job_id="me", m=7))],
            "receipt is for 7 rows of job 'me': expected 6 rows",
        ),
        (
            lambda a: [*a[:-1], framing.encode_receipt(Receipt(job_id="you", m=6))],
            "receipt is for 6 rows of job 'you': expected 6 rows",
        ),
    ],
)
def test_a_server_that_sends_nonsense_never_gives_a_wrong_array(
    change: Callable[[list[bytes]], list[bytes]], says: str
) -> None:
    with pytest.raises(gradwire.ProtocolError) as refused:
        conversation(change, request_id="me").finish()
    assert says in str(refused.value)


def test_a_result_that_was_not_wanted_is_refused() -> None:
    with pytest.raises(
        gradwire.ProtocolError, match="sent dx, which was not requested"
    ):
        conversation(lambda a: [chunk(5, 0, 1)], results="y")


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (chunk(4, 0, 1), "sent results before accepting the job"),
        (
            framing.encode_accepted(Accepted(block_rows=0, window_rows=1)),
            "announced blocks of 0 rows, a window of 1 and",
        ),
        (
            framing.encode_accepted(
                Accepted(block_rows=2, window_rows=2, credit_blocks=-1)
            ),
            "a window of 2 and a credit of -1",
        ),
    ],
)
def test_a_server_that_starts_wrong_is_given_up(answer: bytes, says: str) -> None:
    with pytest.raises(gradwire.ProtocolError, match=says):
        small_job().exchange().receive(answer)


def test_the_memory_of_results_is_free_as_soon_as_they_are_dropped() -> None:
    """The next call takes it again. The garbage collector comes too late for that."""
    job = small_job()
    exchange = job.exchange()
    for answer in converse(exchange, job.messages(exchange), FakeServer()):
        exchange.receive(answer)
    exchange.finish()
    arrays = [weakref.ref(array) for array in job.outputs.all().values()]
    gc.collect()
    gc.disable()
    try:
        del job, exchange
        assert not any(array() is not None for array in arrays)
    finally:
        gc.enable()


def test_results_before_their_rows_were_sent_are_refused() -> None:
    job = small_job()
    exchange = job.exchange()
    server = FakeServer(block_rows=4)
    for answer in server.open(exchange.opening()):
        exchange.receive(answer)
    messages = job.messages(exchange)
    next(messages)
    with pytest.raises(gradwire.ProtocolError, match="expected at most 0 for the rows"):
        exchange.receive(chunk(4, 0, 1))


def test_dw_before_the_end_of_the_rows_is_refused() -> None:
    job = small_job()
    exchange = job.exchange()
    for answer in FakeServer(block_rows=4).open(exchange.opening()):
        exchange.receive(answer)
    everything_but_end = 5
    for message in itertools.islice(job.messages(exchange), everything_but_end):
        assert isinstance(framing.decode_request(message), framing.Chunk)
    with pytest.raises(gradwire.ProtocolError, match="sent 6 elements of dw"):
        exchange.receive(chunk(6, 0, 6))


def understood_wrongly(change: Callable[[Job], None]) -> Callable[[Job], Accepted]:
    def answer(job: Job) -> Accepted:
        taken = accepted(job, 4, 8)
        change(taken.effective_job)
        return taken

    return answer


def forget(name: str) -> Callable[[Job], None]:
    return lambda job: job.ClearField(name)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("job_id", lambda job: setattr(job, "job_id", "another")),
        ("m", forget("m")),
        ("m", lambda job: setattr(job, "m", 99)),
        ("n", lambda job: setattr(job, "n", 99)),
        ("k", forget("k")),
        ("dtype", forget("dtype")),
        ("x", forget("x")),
        ("w", forget("w")),
        ("dy", forget("dy")),
        ("y", forget("y")),
        ("y.dtype", lambda job: job.y.ClearField("dtype")),
        ("dx", forget("dx")),
        ("dw", forget("dw")),
        ("dw.dtype", lambda job: setattr(job.dw, "dtype", 3)),
        ("dw.inline", lambda job: job.dw.ClearField("inline")),
        ("numerics", forget("numerics")),
        (
            "numerics.dw_accumulator",
            lambda job: setattr(job.numerics, "dw_accumulator", 3),
        ),
        ("numerics.allow_tf32", lambda job: job.numerics.ClearField("allow_tf32")),
        ("checksum", forget("checksum")),
        ("max_chunk_bytes", lambda job: setattr(job, "max_chunk_bytes", 1)),
        ("block_rows", forget("block_rows")),
        ("required_features", lambda job: job.required_features.append("more")),
    ],
)
def test_an_option_that_the_server_does_not_echo_is_named(
    path: str, change: Callable[[Job], None]
) -> None:
    exchange = small_job(
        dw_accumulator="float64", allow_tf32=True, checksum=True, block_rows=4
    ).exchange()
    job = framing.decode_request(exchange.opening())
    assert isinstance(job, Job)
    answer = understood_wrongly(change)(job)
    with pytest.raises(gradwire.ProtocolError) as refused:
        exchange.receive(framing.encode_accepted(answer))
    assert f"did not understand the option {path}:" in str(refused.value)


def test_an_option_that_was_not_asked_for_may_not_be_taken() -> None:
    exchange = small_job().exchange()
    job = framing.decode_request(exchange.opening())
    assert isinstance(job, Job)
    taken = accepted(job, 4, 8)
    taken.effective_job.numerics.allow_tf32 = True
    with pytest.raises(gradwire.ProtocolError, match="the option numerics"):
        exchange.receive(framing.encode_accepted(taken))


def test_a_newer_server_may_say_more() -> None:
    exchange = small_job().exchange()
    job = framing.decode_request(exchange.opening())
    assert isinstance(job, Job)
    message = framing.encode_accepted(accepted(job, 4, 8))
    # Field 99 of Accepted's effective_job, and of Accepted.
    envelope = ComputeStreamResponse.FromString(message)
    raw = envelope.accepted.effective_job.SerializeToString() + b"\x98\x06\x01"
    envelope.accepted.effective_job.ParseFromString(raw)
    exchange.receive(envelope.SerializeToString())
    assert exchange.accepted is not None


@pytest.mark.skipif(not checksum.AVAILABLE, reason="needs google-crc32c")
def test_a_damaged_payload_is_a_checksum_error() -> None:
    right = checksum.crc32c(bytes(8))
    conversation(lambda a: [chunk(4, 0, 1, right)], checksum=True)
    with pytest.raises(gradwire.ChecksumError, match="damaged in transit") as refused:
        conversation(lambda a: [chunk(4, 0, 1, right ^ 1)], checksum=True)
    assert refused.value.reason == "CHECKSUM_MISMATCH"
    with pytest.raises(gradwire.ProtocolError, match="sent y without a checksum"):
        conversation(lambda a: [chunk(4, 0, 1)], checksum=True)


def test_progress_goes_from_nothing_to_everything() -> None:
    seen: list[gradwire.Progress] = []
    conversation(lambda a: a, on_progress=seen.append).finish()
    assert seen[0] == gradwire.Progress(0, 8 * 36, 0, 8 * 36, 0, M, jobs_ahead=1)
    assert seen[-1] == gradwire.Progress(8 * 36, 8 * 36, 8 * 36, 8 * 36, M, M, None)
    assert [p.bytes_sent for p in seen] == sorted(p.bytes_sent for p in seen)


def unary_response(job: ArrayJob) -> ComputeResponse:
    request = job.unary_exchange().request(job.operands)
    return ComputeResponse(
        accepted=accepted(request.job, 4, 8),
        y=bytes(8 * M * K),
        dx=bytes(8 * M * N),
        dw=bytes(8 * N * K),
        receipt=Receipt(job_id=request.job.job_id, m=M),
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda r: r.ClearField("y"), "sent 0 bytes of y: expected 96"),
        (lambda r: setattr(r, "dx", b"123"), "sent 3 bytes of dx: expected 144"),
        (lambda r: setattr(r, "dw", bytes(1000)), "sent 1000 bytes of dw: expected"),
        (lambda r: r.ClearField("receipt"), "receipt is for 0 rows of job ''"),
        (lambda r: r.ClearField("accepted"), "announced blocks of 0 rows"),
        (
            lambda r: r.accepted.effective_job.ClearField("dw"),
            "did not understand the option dw",
        ),
    ],
)
def test_a_message_that_does_not_answer_is_refused(
    change: Callable[[ComputeResponse], None], says: str
) -> None:
    job = small_job(request_id="me")
    response = unary_response(job)
    job.unary_exchange().receive(response)
    change(response)
    with pytest.raises(gradwire.ProtocolError, match=says):
        small_job(request_id="me").unary_exchange().receive(response)


def test_results_in_one_message_reach_arrays_of_any_layout() -> None:
    job = small_job(request_id="me")
    response = unary_response(job)
    x, w, dy = oracle.operands(M, N, K, "float64")
    response.y, response.dx, response.dw = (
        x.tobytes()[: 8 * M * K],
        x.tobytes(),
        w.tobytes(),
    )
    given = {Matrix.X: x, Matrix.W: w, Matrix.DY: dy}
    options = parse_options(results=("y", "dx", "dw"), request_id="me")
    plan, operands = plan_arrays(read_operands(given, options), options)
    y, dx, dw = np.empty((2, M, K))[0], np.empty((N, M)).T, np.empty((2 * N, K))[::2]
    out = {Matrix.Y: y, Matrix.DX: dx, Matrix.DW: dw}
    outputs = {matrix: Output(array, array) for matrix, array in out.items()}
    into = ArrayOutputs(plan, output_shapes(plan, operands), outputs, ResultPool())
    whole = ArrayJob(plan, operands, into, unary=True, copies=HostCopies())
    whole.unary_exchange().receive(response)
    assert dx.tobytes() == x.tobytes()
    assert dw.tobytes() == w.tobytes()
    assert y.tobytes() == response.y


def test_a_message_may_not_hold_a_result_that_was_not_wanted() -> None:
    job = small_job(results=("y", "dx"))
    with pytest.raises(gradwire.ProtocolError, match="sent 48 bytes of dw: expected"):
        job.unary_exchange().receive(unary_response(job))


def test_a_request_in_one_message_holds_the_operands_in_the_wires_form() -> None:
    x, w, dy = oracle.operands(M, N, K, "float64")
    job = array_job(np.asfortranarray(x), w.astype(">f8"), dy[::-1][::-1])
    request = job.unary_exchange().request(job.operands)
    assert (request.x, request.w, request.dy) == (
        x.tobytes(),
        w.tobytes(),
        dy.tobytes(),
    )
    assert isinstance(job.operands[Matrix.X], Operand)
