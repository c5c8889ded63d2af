"""Right results for every legal job, however it is cut into messages.

Operands are small whole numbers, so that the results are known exactly.
"""

from __future__ import annotations

import itertools
import queue

import google_crc32c
import grpc
import numpy as np
import pytest

from gradwire.v1 import gradient_service_pb2 as service_pb2
from gradwire.v1 import gradient_service_pb2_grpc, job_pb2, matrix_pb2
from tests.contract.conftest import ROW_BLOCK_BYTES
from tests.support.raw import (
    DTYPES,
    NEEDS,
    CallError,
    Problem,
    Stream,
    assert_exact,
    chunk,
    compute_job,
    dtype_number,
    end,
    stream_job,
    whole_numbers,
)
from tests.support.serving import BACKEND

RESULTS = [
    wanted for size in (1, 2, 3) for wanted in itertools.combinations(NEEDS, size)
]


def test_generated_stub_with_default_options_computes_a_small_job(channel):
    stub = gradient_service_pb2_grpc.GradientServiceStub(channel)
    problem = whole_numbers(30, 7, 3)
    response = stub.Compute(problem.compute_request())
    for name, expected in problem.expected().items():
        elements = np.frombuffer(getattr(response, name), np.float32)
        np.testing.assert_array_equal(elements.reshape(expected.shape), expected)


def test_generated_stub_with_default_options_streams_a_job(channel):
    stub = gradient_service_pb2_grpc.GradientServiceStub(channel)
    problem = whole_numbers(300, 7, 3)
    accepted: queue.Queue[job_pb2.Accepted] = queue.Queue()

    def requests():
        yield service_pb2.ComputeStreamRequest(job=problem.job())
        yield from problem.body(accepted.get(timeout=20).block_rows)

    elements = {
        name: np.full(array.size, np.nan, np.float32)
        for name, array in problem.expected().items()
    }
    kinds = []
    for response in stub.ComputeStream(requests()):
        kinds.append(response.WhichOneof("message"))
        if kinds[-1] == "accepted":
            accepted.put(response.accepted)
        elif kinds[-1] == "chunk":
            name = matrix_pb2.Matrix.Name(response.chunk.matrix)[7:].lower()
            run = np.frombuffer(response.chunk.data, np.float32)
            first = response.chunk.index
            elements[name][first : first + run.size] = run
    assert kinds[0] == "accepted"
    assert kinds[-1] == "receipt"
    assert set(kinds[1:-1]) == {"chunk"}
    for name, expected in problem.expected().items():
        np.testing.assert_array_equal(elements[name], expected.reshape(-1))


@pytest.mark.parametrize("results", RESULTS, ids="-".join)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_choice_of_results_in_every_dtype(channel, dtype, results):
    problem = whole_numbers(100, 6, 5, dtype, results)
    assert_exact(compute_job(channel, problem), problem)
    assert_exact(stream_job(channel, problem), problem)
    assert_exact(stream_job(channel, problem, open_m=True), problem)


@pytest.mark.parametrize("shape", list(itertools.product((0, 1, 3), repeat=3)), ids=str)
def test_zero_and_one_are_sizes_like_any_other(channel, transport, shape):
    # A third of the choices for each shape, such that each choice meets each pair of
    # sizes, on one way or the other.
    third = sum(map((0, 1, 3).index, shape)) + (transport == "unix")
    for results in RESULTS[third % 3 :: 3]:
        problem = whole_numbers(*shape, results=results)
        assert_exact(compute_job(channel, problem), problem)
        assert_exact(stream_job(channel, problem, turn_rows=1), problem)
        assert_exact(stream_job(channel, problem, turn_rows=1, open_m=True), problem)


@pytest.mark.parametrize("m", [1, 15, 16, 17, 31, 32, 33, 100])
def test_rows_need_not_fill_the_last_block(channel, m):
    problem = whole_numbers(m, 10, 6)
    outcome = stream_job(channel, problem, open_m=True)
    assert outcome.accepted.block_rows == 16
    assert outcome.receipt.blocks == -(-m // 16)
    assert_exact(outcome, problem)


@pytest.mark.parametrize(
    ("asked", "has"), [(1, 1), (4, 4), (16, 16), (32, 16), (1 << 62, 16), (0, 16)]
)
def test_a_job_has_blocks_of_at_most_the_rows_that_it_asks_for(channel, asked, has):
    problem = whole_numbers(50, 10, 6)
    options = {"block_rows": asked, "required_features": ["block-rows"]}
    for outcome in (
        stream_job(channel, problem, **options),
        compute_job(channel, problem, **options),
    ):
        assert outcome.accepted.block_rows == has
        assert outcome.accepted.fingerprint.block_rows == has
        assert outcome.accepted.effective_job.block_rows == asked
        assert outcome.receipt.blocks == -(-50 // has)
        assert_exact(outcome, problem)


@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(5000, 2, 3), (3, 400, 2), (3, 2, 400), (40, 64, 64), (2, 300_000, 2)],
)
def test_tall_wide_and_square_jobs(channel, m, n, k):
    problem = whole_numbers(m, n, k)
    outcome = stream_job(channel, problem)
    assert_exact(outcome, problem)
    if n < 300_000:  # a block has at least one row, whatever it takes
        row_bytes = (n + k) * 4
        assert outcome.accepted.block_rows * row_bytes <= max(
            ROW_BLOCK_BYTES, row_bytes
        )


@pytest.mark.thorough
@pytest.mark.parametrize("turn", ["row", "three rows", "block", "window"])
@pytest.mark.parametrize("message_bytes", [4, 8, 20, 100, 1 << 20])
def test_messages_may_split_rows_and_span_row_blocks(channel, message_bytes, turn):
    problem = whole_numbers(75, 7, 5)
    with Stream(channel) as stream:
        stream.send(problem.job(open_m=True))
        outcome = stream.receive_accepted()
        assert outcome.accepted.window_rows < 75
        turn_rows = {
            "row": 1,
            "three rows": 3,
            "block": outcome.accepted.block_rows,
            "window": outcome.accepted.window_rows,
        }[turn]
        stream.send_all(problem.body(turn_rows, message_bytes))
        stream.half_close()
        assert_exact(stream.receive_results(outcome), problem)


def test_messages_of_4_mib_in_both_directions(small_blocks):
    options = [("grpc.max_receive_message_length", 5 << 20)]
    with grpc.insecure_channel(small_blocks.address, options) as channel:
        problem = whole_numbers(3, 1024, 1024, results=("dw",))
        outcome = stream_job(channel, problem, max_chunk_bytes=4 << 20)
        assert outcome.order == [("dw", 0, 1024 * 1024)]
        assert_exact(outcome, problem)
        problem = whole_numbers(3, 1024, 1024, results=("y",))
        assert_exact(stream_job(channel, problem, message_bytes=4 << 20), problem)


@pytest.mark.parametrize("k", [1000, 1008, 1009, 1020, 1023, 1024])
def test_what_compute_takes_and_gives_a_stub_without_options_can_send_and_read(
    channel, k
):
    for problem in (
        whole_numbers(1024, 1, k, results=("y",)),
        whole_numbers(1, 1024, k, results=("y",)),
    ):
        try:
            outcome = compute_job(channel, problem, job_id="i" * 128)
        except CallError as error:
            assert error.reason == "STREAM_REQUIRED"  # noqa: PT017 - one of two
            assert k > 1000
        else:
            assert_exact(outcome, problem)


def test_messages_without_elements_change_nothing(channel):
    problem = whole_numbers(3, 2, 2)
    with Stream(channel) as stream:
        stream.send(
            problem.job(),
            chunk("w", 0),
            *problem.chunks("w", 0, 2),
            chunk("w", 4),
            chunk("dy", 0),
            *problem.chunks("x", 0, 3),
            chunk("x", 6),
            *problem.chunks("dy", 0, 3),
            end(3),
        )
        stream.half_close()
        assert_exact(stream.receive_results(stream.receive_accepted()), problem)


@pytest.mark.parametrize(
    ("max_chunk_bytes", "elements"),
    [(1, 1), (4, 1), (7, 1), (8, 2), (1000, 35), (0, 35)],
)
def test_results_come_in_messages_no_larger_than_asked(
    channel, max_chunk_bytes, elements
):
    problem = whole_numbers(40, 7, 5)
    outcome = stream_job(channel, problem, max_chunk_bytes=max_chunk_bytes)
    assert_exact(outcome, problem)
    assert max(count for name, _, count in outcome.order if name == "dw") == elements


def test_results_leave_block_by_block_y_before_dx_and_dw_last(channel):
    problem = whole_numbers(50, 10, 6)
    outcome = stream_job(channel, problem)
    rows = outcome.accepted.block_rows
    assert rows == 16
    assert outcome.order == [
        (name, first * columns, min(rows, 50 - first) * columns)
        for first in range(0, 50, rows)
        for name, columns in (("y", 6), ("dx", 10))
    ] + [("dw", 0, 60)]


def test_results_of_a_block_come_while_later_rows_do_not_exist_yet(channel):
    problem = whole_numbers(64, 10, 6)
    with Stream(channel) as stream:
        stream.send(problem.job(open_m=True))
        rows = stream.receive_accepted().accepted.block_rows
        stream.send_all(problem.chunks("w", 0, 10))
        expected = problem.expected()
        for first in range(0, 64, rows):
            stream.send_all(problem.chunks("x", first, first + rows))
            stream.send_all(problem.chunks("dy", first, first + rows))
            for name in ("y", "dx"):
                message = stream.receive()
                part = expected[name][first : first + rows]
                elements = np.frombuffer(message.chunk.data, np.float32)
                np.testing.assert_array_equal(elements, part.reshape(-1))
        stream.send(end(64))
        stream.half_close()
        elements = np.frombuffer(stream.receive().chunk.data, np.float32)
        np.testing.assert_array_equal(elements, expected["dw"].reshape(-1))
        assert stream.receive().receipt.m == 64
        assert stream.receive() is None


@pytest.mark.parametrize("wider", ["float32", "float64"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_result_comes_in_the_dtype_that_it_was_asked_in(channel, dtype, wider):
    problem = whole_numbers(100, 6, 5, dtype)
    results = {"y": wider, "dx": None, "dw": wider}
    for outcome in (
        compute_job(channel, problem, results=results),
        stream_job(channel, problem, results=results),
    ):
        assert_exact(outcome, problem, y=wider, dw=wider)


@pytest.mark.parametrize("narrower", ["float16", "bfloat16"])
def test_a_result_may_be_narrower_than_the_operands(channel, narrower):
    problem = whole_numbers(100, 6, 5, "float64", tuple(NEEDS))
    results = dict.fromkeys(NEEDS, narrower)
    outcome = stream_job(channel, problem, results=results)
    assert_exact(outcome, problem, **results)


def test_dw_is_summed_over_blocks_in_float64_when_asked(channel):
    # 2**24 + 1 is no float32: each block's share of 1 is lost in float32.
    m = 257
    x = np.ones((m, 1), np.float32)
    x[0] = 2**24
    problem = Problem(x, np.ones((1, 1), np.float32), np.ones_like(x), ("dw",))
    options = {
        "results": {"dw": "float64"},
        "numerics": job_pb2.Numerics(dw_accumulator=dtype_number("float64")),
    }
    with_float64 = stream_job(channel, problem, **options)
    rows = with_float64.accepted.block_rows
    assert rows < m - 1
    # Within the first block the products are summed in float32.
    first = float(np.float32(x[:rows].sum(dtype=np.float32)))
    expected = first + (m - rows)
    assert abs(with_float64.arrays["dw"].item() - expected) <= rows
    again = compute_job(channel, problem, **options)
    assert again.bits == with_float64.bits
    in_float32 = stream_job(channel, problem, results={"dw": "float64"})
    assert in_float32.arrays["dw"].item() == np.float32(in_float32.arrays["dw"].item())


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_are_data(channel, dtype):
    problem = whole_numbers(70, 6, 5, dtype)
    problem.x[3, 2] = np.nan
    problem.x[40, 1] = np.inf
    problem.dy[50, 4] = -np.inf
    with np.errstate(all="ignore"):
        assert_exact(stream_job(channel, problem), problem)
        assert_exact(compute_job(channel, problem), problem)


def test_float16_overflows_to_infinity(channel):
    x = np.full((40, 3), 300, np.float16)
    problem = Problem(x, np.full((3, 2), 300, np.float16), np.ones((40, 2), np.float16))
    outcome = stream_job(channel, problem)
    assert np.isposinf(outcome.arrays["y"]).all()
    assert (outcome.arrays["dx"] == 600).all()
    assert (outcome.arrays["dw"] == 12000).all()


def test_checksums_protect_both_directions(channel):
    problem = whole_numbers(50, 10, 6)
    seen = []
    with Stream(channel) as stream:
        stream.send(problem.job(checksum=matrix_pb2.CHECKSUM_CRC32C))
        outcome = stream.receive_accepted()
        for message in problem.body(outcome.accepted.block_rows):
            if message.HasField("chunk"):
                message.chunk.crc32c = google_crc32c.value(message.chunk.data)
            stream.send(message)
        stream.half_close()
        while (message := stream.receive()).HasField("chunk"):
            seen.append((message.chunk.crc32c, google_crc32c.value(message.chunk.data)))
        assert message.HasField("receipt")
    assert len(seen) > 2
    assert all(sent == computed for sent, computed in seen)


def test_chunks_carry_no_checksum_unless_asked(channel):
    problem = whole_numbers(5, 3, 2)
    with Stream(channel) as stream:
        stream.send(problem.job())
        stream.receive_accepted()
        stream.send_all(problem.body(5))
        stream.half_close()
        while (message := stream.receive()).HasField("chunk"):
            assert not message.chunk.HasField("crc32c")


def test_the_answer_says_what_was_understood_with_every_default(channel):
    problem = whole_numbers(50, 10, 6, "bfloat16", ("y", "dw"))
    accepted = stream_job(channel, problem, job_id="mine").accepted
    assert accepted.effective_job == problem.job(
        job_id="mine",
        results={"y": "bfloat16", "dw": "bfloat16"},
        numerics=job_pb2.Numerics(dw_accumulator=dtype_number("float32")),
        max_chunk_bytes=1 << 20,
    )
    open_m = stream_job(channel, problem, open_m=True).accepted
    assert not open_m.effective_job.HasField("m")
    assert open_m.effective_job.job_id


def test_every_option_that_is_in_effect_is_answered(channel):
    problem = whole_numbers(5, 10, 6, "float32", ("dx", "dw"))
    job = problem.job(
        job_id="all options",
        results={"dx": "float64", "dw": "float16"},
        numerics=job_pb2.Numerics(
            dw_accumulator=dtype_number("float64"), allow_tf32=True
        ),
        max_chunk_bytes=77,
        required_features=["checksum-crc32c", "resume", "block-rows"],
        block_rows=8,
        checksum=matrix_pb2.CHECKSUM_CRC32C,
    )
    with Stream(channel) as stream:
        stream.send(job)
        assert stream.receive_accepted().accepted.effective_job == job


def test_a_field_of_the_future_is_not_answered(channel):
    problem = whole_numbers(5, 10, 6)
    future = b"\xf8\x3f\x01"  # field 1023
    job = job_pb2.Job.FromString(problem.job().SerializeToString() + future)
    with Stream(channel) as stream:
        stream.send(job)
        answered = stream.receive_accepted().accepted.effective_job
    assert future in job.SerializeToString()
    assert future not in answered.SerializeToString()


def test_the_receipt_counts_what_moved(channel, transport):
    problem = whole_numbers(50, 10, 6)
    outcome = stream_job(channel, problem, job_id="counted")
    receipt = outcome.receipt
    assert receipt.job_id == "counted"
    assert receipt.server_instance == outcome.accepted.server_instance
    assert receipt.m == 50
    assert receipt.blocks == 4
    assert receipt.bytes_received == 4 * (50 * 10 + 10 * 6 + 50 * 6)
    assert receipt.bytes_sent == 4 * (50 * 6 + 50 * 10 + 10 * 6)
    assert receipt.device == outcome.accepted.device
    assert receipt.device.backend == BACKEND
    assert receipt.transport == transport
    assert receipt.peak_memory_bytes > 1 << 20
    assert receipt.total_seconds > 0
    for stage in ("queued", "receiving", "computing", "sending"):
        assert 0 <= getattr(receipt, f"{stage}_seconds") <= receipt.total_seconds
    # NumPy computes where the operands have arrived.
    has_memory = receipt.device.memory_limit_bytes > 0
    assert (receipt.copy_to_device_seconds > 0) == has_memory
    assert (receipt.copy_from_device_seconds > 0) == has_memory


def test_compute_answers_what_the_stream_would(channel):
    problem = whole_numbers(50, 10, 6)
    one = compute_job(channel, problem, job_id="same")
    other = stream_job(channel, problem, job_id="same")
    assert one.accepted.effective_job == other.accepted.effective_job
    assert one.accepted.fingerprint == other.accepted.fingerprint
    assert one.accepted.block_rows == other.accepted.block_rows
    assert one.accepted.server_instance == other.accepted.server_instance
    for field in ("job_id", "m", "blocks", "bytes_received", "bytes_sent", "transport"):
        assert getattr(one.receipt, field) == getattr(other.receipt, field)


@pytest.mark.parametrize("known", [True, False], ids=["m-known", "m-open"])
def test_any_number_of_rows_without_elements_takes_no_time(channel, known):
    m = 2**62
    problem = whole_numbers(0, 0, 0)
    with Stream(channel, timeout_s=5) as stream:
        stream.send(problem.job(results=("y", "dw"), m=m if known else None), end(m))
        stream.half_close()
        stream.receive_accepted()
        assert stream.receive().receipt.m == m


def test_rows_without_elements_in_one_operand_give_zeros_in_the_result(channel):
    problem = whole_numbers(1000, 0, 3, results=("y",))
    outcome = stream_job(channel, problem)
    assert_exact(outcome, problem)
    assert not outcome.arrays["y"].any()
