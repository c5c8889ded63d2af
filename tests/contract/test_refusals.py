"""Every way in which a request can be wrong: status, reason, field, text.

After each refusal the same server computes another job right.
"""

from __future__ import annotations

import grpc
import pytest
from grpc import StatusCode

from gradwire.v1 import gradient_service_pb2 as service_pb2
from gradwire.v1 import job_pb2, matrix_pb2
from gradwire_protocol.error_reasons import Reason
from tests.support import http2
from tests.support.raw import (
    INLINE,
    CallError,
    Stream,
    assert_exact,
    chunk,
    compute_job,
    compute_request,
    end,
    make_job,
    stream_job,
    whole_numbers,
)

INVALID = StatusCode.INVALID_ARGUMENT
UNIMPLEMENTED = StatusCode.UNIMPLEMENTED

JOB_ID = "the-refused-job"
MIB = 1 << 20

# The header that `make_job` makes has m = 6, n = 5, k = 4, float32.
W = chunk("w", 0, bytes(5 * 4 * 4))
X = chunk("x", 0, bytes(6 * 5 * 4))
DY = chunk("dy", 0, bytes(6 * 4 * 4))
END = end(6)


def job(**fields) -> job_pb2.Job:
    return make_job(**({"job_id": JOB_ID} | fields))


def in_segments(rows: int, **fields) -> job_pb2.Job:
    return job(numerics=job_pb2.Numerics(dw_segment_rows=rows), **fields)


def case(name, messages, reason, field, *says, status=INVALID):
    return pytest.param(messages, status, reason, field, says, id=name)


def crc(matrix, data, crc32c):
    return chunk(matrix, 0, data, crc32c)


HEADERS = [
    case("m-negative", job(m=-1), "SHAPE_INVALID", "job.m", "-1", "at least 0"),
    case("n-negative", job(n=-5), "SHAPE_INVALID", "job.n", "-5", "at least 0"),
    case("k-negative", job(k=-(2**63)), "SHAPE_INVALID", "job.k", str(-(2**63))),
    case(
        "n-times-k-overflows",
        job(n=2**31, k=2**31),
        "SHAPE_OVERFLOW",
        "job.n",
        str(2**31),
        "64 bits",
    ),
    case(
        "m-times-n-overflows",
        job(m=2**62, n=2),
        "SHAPE_OVERFLOW",
        "job.m",
        str(2**62),
        "64 bits",
    ),
    case(
        "m-times-k-overflows",
        job(m=2**60, n=0, k=2),
        "SHAPE_OVERFLOW",
        "job.m",
        str(2**60),
    ),
    case(
        "more-columns-than-the-backend-takes",
        job(n=2**40, k=0),
        "SHAPE_INVALID",
        "job.n",
        str(2**40),
        "at most",
    ),
    case(
        "dtype-missing",
        job(dtype="UNSPECIFIED"),
        "DTYPE_INVALID",
        "job.dtype",
        "is 0",
        "FLOAT16 (1), BFLOAT16 (2), FLOAT32 (3), FLOAT64 (4)",
    ),
    case(
        "dtype-unknown",
        job_pb2.Job.FromString(job().SerializeToString() + b"\x28\x63"),
        "DTYPE_INVALID",
        "job.dtype",
        "is 99",
        "FLOAT32 (3)",
    ),
    case(
        "result-dtype-unknown",
        job(dw=job_pb2.Result(dtype=77, inline=job_pb2.InlineDestination())),
        "DTYPE_INVALID",
        "job.dw.dtype",
        "is 77",
        "FLOAT32 (3)",
    ),
    case(
        "accumulator-unknown",
        job(numerics=job_pb2.Numerics(dw_accumulator=77)),
        "DTYPE_INVALID",
        "job.numerics.dw_accumulator",
        "is 77",
    ),
    case(
        "accumulator-narrower-than-the-sums",
        job(
            dtype="float64",
            numerics=job_pb2.Numerics(dw_accumulator=matrix_pb2.DTYPE_FLOAT32),
        ),
        "OPTION_INVALID",
        "job.numerics.dw_accumulator",
        "FLOAT32",
        "FLOAT64",
    ),
    case(
        "accumulator-of-16-bits",
        job(
            dtype="float16",
            numerics=job_pb2.Numerics(dw_accumulator=matrix_pb2.DTYPE_FLOAT16),
        ),
        "OPTION_INVALID",
        "job.numerics.dw_accumulator",
        "FLOAT16",
        "FLOAT32",
    ),
    case(
        "header-too-large",
        job(required_features=["checksum-crc32c"] * 2000),
        "OPTION_INVALID",
        "job",
        "has 34",
        "at most 16384",
    ),
    case("no-result", job(results=()), "RESULTS_MISSING", "job", "job.y", "job.dw"),
    case(
        "needed-operand-absent",
        job(w=None),
        "OPERAND_MISSING",
        "job.w",
        "absent",
        "y, dx, dw",
    ),
    case(
        "operand-that-nothing-needs",
        job(results=("y",), dy=INLINE),
        "OPERAND_UNEXPECTED",
        "job.dy",
        "present",
        "(y)",
    ),
    case(
        "source-unknown",
        job(x=job_pb2.Operand()),
        "OPTION_UNKNOWN",
        "job.x.source",
        "inline",
        status=UNIMPLEMENTED,
    ),
    case(
        "destination-unknown",
        job(dx=job_pb2.Result()),
        "OPTION_UNKNOWN",
        "job.dx.destination",
        "inline",
        status=UNIMPLEMENTED,
    ),
    case(
        "checksum-unknown",
        job(checksum=9),
        "OPTION_UNKNOWN",
        "job.checksum",
        "9",
        status=UNIMPLEMENTED,
    ),
    case(
        "feature-unknown",
        job(required_features=["checksum-crc32c", "levitation"]),
        "FEATURE_UNKNOWN",
        "job.required_features[1]",
        "levitation",
        "checksum-crc32c",
        status=UNIMPLEMENTED,
    ),
    case(
        "max-chunk-bytes-negative",
        job(max_chunk_bytes=-1),
        "OPTION_INVALID",
        "job.max_chunk_bytes",
        "-1",
        str(4 * MIB),
    ),
    case(
        "max-chunk-bytes-too-large",
        job(max_chunk_bytes=4 * MIB + 1),
        "OPTION_INVALID",
        "job.max_chunk_bytes",
        str(4 * MIB + 1),
        str(4 * MIB),
    ),
    case(
        "block-rows-negative",
        job(block_rows=-8),
        "OPTION_INVALID",
        "job.block_rows",
        "-8",
        "a power of two",
    ),
    case(
        "block-rows-not-a-power-of-two",
        job(block_rows=100),
        "OPTION_INVALID",
        "job.block_rows",
        "100",
        "a power of two",
    ),
    case(
        "segment-rows-negative",
        in_segments(-4),
        "OPTION_INVALID",
        "job.numerics.dw_segment_rows",
        "-4",
        "a power of two",
    ),
    case(
        "segment-rows-not-a-power-of-two",
        in_segments(6),
        "OPTION_INVALID",
        "job.numerics.dw_segment_rows",
        "6",
        "a power of two",
    ),
    case(
        "segment-sums-without-segments",
        job(segment_sums=True),
        "OPTION_INVALID",
        "job.numerics.dw_segment_rows",
        "is 0",
        "segment_sums",
    ),
    case(
        "segment-sums-without-sums",
        in_segments(4, results=("y", "dx"), segment_sums=True),
        "OPTION_INVALID",
        "job.segment_sums",
        "dw is not wanted and db is not wanted",
    ),
    case(
        "segment-sums-with-checkpoints",
        in_segments(4, segment_sums=True, checkpoints=job_pb2.Checkpoints()),
        "OPTION_INVALID",
        "job.checkpoints",
        "segment_sums",
    ),
    case(
        "segment-sums-with-resume",
        in_segments(
            4,
            segment_sums=True,
            resume=job_pb2.Resume(fingerprint=job_pb2.NumericsFingerprint()),
        ),
        "OPTION_INVALID",
        "job.resume",
        "segment_sums",
    ),
    case(
        "segment-sums-with-a-session",
        in_segments(
            4,
            segment_sums=True,
            w=job_pb2.Operand(kept=job_pb2.KeptSource(tensor=1)),
            session=job_pb2.SessionRef(session="some"),
        ),
        "OPTION_INVALID",
        "job.session",
        "segment_sums",
    ),
]

IDS = [
    case("too-long", job(job_id="i" * 129), "JOB_ID_INVALID", "job.job_id", "129"),
    case(
        "unprintable", job(job_id="a\nb"), "JOB_ID_INVALID", "job.job_id", "printable"
    ),
    case("not-ascii", job(job_id="jöb"), "JOB_ID_INVALID", "job.job_id", "ASCII"),
]

STREAMS = [
    case(
        "random-bytes-after-the-header",
        [job(), b"\xff\xfe\xfd"],
        "MESSAGE_MALFORMED",
        None,
        "ComputeStreamRequest",
    ),
    case(
        "nothing-set-after-the-header",
        [job(), b""],
        "MESSAGE_MALFORMED",
        None,
        "neither job, chunk nor end",
    ),
    case("second-job", [job(), W, job()], "MESSAGE_UNEXPECTED", None, "job", "end"),
    case(
        "matrix-absent",
        [job(), chunk(0, 0, bytes(4))],
        "MATRIX_INVALID",
        "chunk.matrix",
        "is 0",
        "X (1), W (2), DY (3)",
    ),
    case(
        "matrix-that-is-a-result",
        [job(), chunk("y", 0, bytes(4))],
        "MATRIX_INVALID",
        "chunk.matrix",
        "is 4",
        "X (1), W (2), DY (3)",
    ),
    case(
        "matrix-unknown",
        [job(), chunk(99, 0, bytes(4))],
        "MATRIX_INVALID",
        "chunk.matrix",
        "is 99",
    ),
    case(
        "operand-that-nothing-needs-in-a-chunk",
        [job(results=("dw",)), W],
        "OPERAND_UNEXPECTED",
        "chunk.matrix",
        "W",
        "(dw)",
    ),
    case(
        "gap",
        [job(), chunk("w", 0, bytes(8)), chunk("w", 3, bytes(8))],
        "INDEX_INVALID",
        "chunk.index",
        "is 3",
        "is 2",
    ),
    case(
        "repeated-message", [job(), W, W], "INDEX_INVALID", "chunk.index", "is 0", "20"
    ),
    case(
        "index-negative",
        [job(), chunk("w", -1, bytes(8))],
        "INDEX_INVALID",
        "chunk.index",
        "-1",
    ),
    case(
        "index-huge",
        [job(), W, chunk("x", 2**63 - 1, bytes(8))],
        "INDEX_INVALID",
        "chunk.index",
        str(2**63 - 1),
    ),
    case(
        "part-of-an-element",
        [job(), chunk("w", 0, bytes(7))],
        "PAYLOAD_INVALID",
        "chunk.data",
        "7 bytes",
        "multiple of 4",
    ),
    case(
        "payload-over-4-MiB",
        [job(m=None, n=1024, k=1024), chunk("w", 0, bytes(4 * MIB + 4))],
        "PAYLOAD_INVALID",
        "chunk.data",
        str(4 * MIB + 4),
        str(4 * MIB),
    ),
    case(
        "payload-of-an-unknown-kind",
        [job(), chunk("w", 0, None)],
        "OPTION_UNKNOWN",
        "chunk.payload",
        "data",
        status=UNIMPLEMENTED,
    ),
    case(
        "more-of-w-than-it-has",
        [job(), chunk("w", 0, bytes(84))],
        "PAYLOAD_EXCESS",
        "chunk.data",
        "21",
        "20",
    ),
    case(
        "more-rows-than-m",
        [job(), W, chunk("x", 0, bytes(31 * 4))],
        "PAYLOAD_EXCESS",
        "chunk.data",
        "31",
        "30",
    ),
    case(
        "elements-of-rows-without-any",
        [job(m=None, n=0), chunk("x", 0, bytes(4))],
        "PAYLOAD_EXCESS",
        "chunk.data",
        "1",
        "0",
    ),
    case(
        "rows-before-w",
        [job(), chunk("w", 0, bytes(8)), X],
        "ORDER_INVALID",
        "chunk.matrix",
        "X",
        "2 of 20",
    ),
    case(
        "w-missing",
        [job(), END],
        "PAYLOAD_MISSING",
        "end.m",
    ),
    case(
        "rows-missing",
        [job(), W, X, chunk("dy", 0, bytes(92)), END],
        "PAYLOAD_MISSING",
        "end.m",
        "dy",
        "24",
        "23",
    ),
    case(
        "rows-missing-of-an-open-m",
        [job(m=None), W, X, DY, end(7)],
        "PAYLOAD_MISSING",
        "end.m",
        "7",
        "35",
        "30",
    ),
    case("end-negative", [job(m=None), W, end(-1)], "SHAPE_INVALID", "end.m", "-1"),
    case(
        "m-disagrees-with-the-header",
        [job(), W, X, DY, end(5)],
        "M_MISMATCH",
        "end.m",
        "is 5",
        "is 6",
    ),
    case(
        "m-disagrees-with-the-rows",
        [job(m=None), W, X, DY, end(5)],
        "M_MISMATCH",
        "end.m",
        "is 5",
        "30",
        "25",
    ),
    case("end-missing-at-once", [job()], "END_MISSING", None, "end"),
    case("end-missing-in-the-middle", [job(), W, X], "END_MISSING", None, "end"),
    case("end-missing-at-the-end", [job(), W, X, DY], "END_MISSING", None, "end"),
    case(
        "checksum-absent",
        [job(checksum=1), W],
        "PAYLOAD_INVALID",
        "chunk.crc32c",
        "absent",
    ),
    case(
        "checksum-unasked",
        [job(), crc("w", bytes(80), 0)],
        "PAYLOAD_INVALID",
        "chunk.crc32c",
        "present",
    ),
    case(
        "checksum-wrong",
        [job(checksum=1), crc("w", bytes(32), 0x8A9136AB)],
        "CHECKSUM_MISMATCH",
        "chunk.crc32c",
        "0x8a9136ab",
        "0x8a9136aa",
        status=StatusCode.DATA_LOSS,
    ),
]

BEFORE_ANY_JOB = [
    case("nothing", [], "END_MISSING", None, "job"),
    case("random-bytes", [b"\xff\xff"], "MESSAGE_MALFORMED", None, "ComputeStreamReq"),
    case("nothing-set", [b""], "MESSAGE_MALFORMED", None, "neither job"),
    case("a-member-of-the-future", [b"\x7a\x00"], "MESSAGE_MALFORMED", None, "neither"),
    case("chunk-first", [W], "MESSAGE_UNEXPECTED", None, "chunk", "job"),
    case("end-first", [END], "MESSAGE_UNEXPECTED", None, "end", "job"),
]


def assert_refused(failure: CallError, status, reason, field, says) -> None:
    assert (failure.status, failure.reason) == (status, reason), failure
    assert list(failure.fields) == ([] if field is None else [field])
    assert failure.repeats_the_status
    assert failure.retry_after_s is None
    for part in says:
        assert part in failure.text
    for description in failure.fields.values():
        assert description in failure.text


def assert_computes(channel: grpc.Channel) -> None:
    problem = whole_numbers(40, 5, 4)
    assert_exact(stream_job(channel, problem), problem)
    assert_exact(compute_job(channel, problem), problem)


@pytest.mark.parametrize(("messages", "status", "reason", "field", "says"), HEADERS)
def test_a_wrong_header_is_refused_by_the_stream(
    channel, messages, status, reason, field, says
):
    with Stream(channel) as stream:
        stream.send(messages)  # and no more: it is refused from the header alone
        failure = stream.failure()
    assert_refused(failure, status, reason, field, says)
    assert failure.metadata["job_id"] == JOB_ID
    assert_computes(channel)


@pytest.mark.parametrize(("messages", "status", "reason", "field", "says"), HEADERS)
def test_a_wrong_header_is_refused_by_compute_in_the_same_words(
    channel, messages, status, reason, field, says
):
    request = service_pb2.ComputeRequest(
        job=messages, x=bytes(120), w=bytes(80), dy=bytes(96)
    )
    with pytest.raises(CallError) as raised:
        compute_request(channel, request)
    assert_refused(raised.value, status, reason, field, says)
    assert raised.value.metadata["job_id"] == JOB_ID
    assert_computes(channel)


@pytest.mark.parametrize(("messages", "status", "reason", "field", "says"), IDS)
def test_a_wrong_job_id_is_refused_and_not_repeated(
    channel, messages, status, reason, field, says
):
    with Stream(channel) as stream:
        stream.send(messages)
        failure = stream.failure()
    assert_refused(failure, status, reason, field, says)
    assert failure.metadata.get("job_id") != messages.job_id
    with pytest.raises(CallError) as raised:
        compute_request(channel, service_pb2.ComputeRequest(job=messages))
    assert_refused(raised.value, status, reason, field, says)
    assert_computes(channel)


@pytest.mark.parametrize(("messages", "status", "reason", "field", "says"), STREAMS)
def test_a_wrong_stream_is_refused(channel, messages, status, reason, field, says):
    with Stream(channel) as stream:
        stream.send(*messages)
        stream.half_close()
        failure = stream.failure()
    assert_refused(failure, status, reason, field, says)
    assert failure.metadata["job_id"] == JOB_ID
    assert_computes(channel)


@pytest.mark.parametrize(
    ("messages", "status", "reason", "field", "says"), BEFORE_ANY_JOB
)
def test_a_stream_that_does_not_begin_with_a_job_is_refused(
    channel, messages, status, reason, field, says
):
    with Stream(channel) as stream:
        stream.send(*messages)
        stream.half_close()
        failure = stream.failure()
    assert_refused(failure, status, reason, field, says)
    assert_computes(channel)


def compute_case(name, request, reason, field, *says):
    return pytest.param(request, INVALID, reason, field, says, id=name)


def request(job_fields=None, **parts) -> service_pb2.ComputeRequest:
    data = {"x": bytes(120), "w": bytes(80), "dy": bytes(96)} | parts
    return service_pb2.ComputeRequest(job=job(**(job_fields or {})), **data)


COMPUTES = [
    compute_case(
        "m-open", request({"m": None}), "SHAPE_INVALID", "job.m", "absent", "Compute"
    ),
    compute_case(
        "x-short", request(x=bytes(116)), "PAYLOAD_MISSING", "x", "116", "120"
    ),
    compute_case("w-long", request(w=bytes(84)), "PAYLOAD_EXCESS", "w", "84", "80"),
    compute_case(
        "dy-with-part-of-an-element",
        request(dy=bytes(95)),
        "PAYLOAD_MISSING",
        "dy",
        "95",
        "96",
    ),
    compute_case(
        "operand-that-nothing-needs",
        request({"results": ("y",)}),
        "PAYLOAD_EXCESS",
        "dy",
        "96",
        "0",
    ),
    compute_case(
        "checksum", request({"checksum": 1}), "OPTION_INVALID", "job.checksum"
    ),
    compute_case(
        "request-over-4-MiB",
        request({"n": 1024, "k": 1024}),
        "STREAM_REQUIRED",
        "job",
        "ComputeStream",
        str(1024 * 1024 * 4 + 6 * 1024 * 8),
    ),
    compute_case(
        "response-over-4-MiB",
        request({"m": 2000, "n": 1, "k": 2000, "results": ("y",)}),
        "STREAM_REQUIRED",
        "job",
        "ComputeStream",
        str(2000 * 2000 * 4),
    ),
    compute_case(
        "response-over-4-MiB-by-a-wider-dw",
        request(
            {
                "m": 1,
                "n": 1000,
                "k": 600,
                "dtype": "bfloat16",
                "results": {"dw": "float64"},
            }
        ),
        "STREAM_REQUIRED",
        "job",
        "ComputeStream",
        str(1000 * 600 * 8),
    ),
]


@pytest.mark.parametrize(("message", "status", "reason", "field", "says"), COMPUTES)
def test_a_wrong_compute_request_is_refused(
    channel, message, status, reason, field, says
):
    with pytest.raises(CallError) as raised:
        compute_request(channel, message)
    assert_refused(raised.value, status, reason, field, says)
    assert raised.value.metadata["job_id"] == JOB_ID
    assert_computes(channel)


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (b"\xff\xff", "is no gradwire.v1.ComputeRequest"),
        (b"\x0a\x05\x01", "is no gradwire.v1.ComputeRequest"),
        (b"", "has no job"),
        (service_pb2.ComputeRequest(x=bytes(4)).SerializeToString(), "no job"),
    ],
    ids=["random-bytes", "cut", "empty", "no-job"],
)
def test_a_compute_request_that_is_no_message_is_refused(channel, message, says):
    with pytest.raises(CallError) as raised:
        compute_request(channel, message)
    assert_refused(raised.value, INVALID, "MESSAGE_MALFORMED", None, [says])
    assert_computes(channel)


def test_a_single_request_that_is_cut_off_is_not_called_a_stream(small_blocks):
    message = request().SerializeToString()
    framed = b"\0" + len(message).to_bytes(4) + message
    before = len(small_blocks.records)
    sizes = (0, 3, 60)
    with http2.Connection(small_blocks.address) as connection:
        for size in sizes:
            call = connection.begin("/gradwire.v1.GradientService/Compute")
            connection.send(call, framed[:size], end=True)
            assert connection.wait_for_end() == call
    records = [each for each in small_blocks.records[before:] if "error" in each]
    assert [each["reason"] for each in records] == ["MESSAGE_MALFORMED"] * len(sizes)
    assert all("before its request was complete" in each["error"] for each in records)


@pytest.mark.parametrize("ahead", ["x", "dy"])
def test_an_operand_may_lead_by_the_window_and_not_by_one_element_more(channel, ahead):
    problem = whole_numbers(4000, 5, 4)
    with Stream(channel) as stream:
        stream.send(problem.job(open_m=True, job_id=JOB_ID))
        outcome = stream.receive_accepted()
        window = outcome.accepted.window_rows
        assert window >= outcome.accepted.block_rows
        stream.send_all(problem.chunks("w", 0, 5))
        # The lead counts from what is complete of the other, so that one row
        # of the other moves it by one.
        other = "dy" if ahead == "x" else "x"
        stream.send_all(problem.chunks(ahead, 0, window))
        stream.send_all(problem.chunks(other, 0, 1))
        stream.send_all(problem.chunks(ahead, window, window + 1))
        itemsize = 4
        columns = getattr(problem, ahead).shape[1]
        stream.send(chunk(ahead, (window + 1) * columns, bytes(itemsize)))
        failure = stream.failure()
    assert_refused(
        failure,
        INVALID,
        "LEAD_EXCEEDED",
        "chunk.matrix",
        [f"{window + 1} rows", f"at most {window}"],
    )
    assert_computes(channel)


def test_a_lead_of_the_whole_window_is_no_error(channel):
    problem = whole_numbers(400, 5, 4)
    with Stream(channel) as stream:
        stream.send(problem.job(open_m=True))
        outcome = stream.receive_accepted()
        window = outcome.accepted.window_rows
        stream.send_all(problem.body(turn_rows=window))
        stream.half_close()
        assert_exact(stream.receive_results(outcome), problem)


@pytest.mark.parametrize(
    "late",
    [
        pytest.param(W, id="chunk"),
        pytest.param(END, id="end"),
        pytest.param(b"\xff", id="random-bytes"),
    ],
)
def test_nothing_may_follow_the_end(channel, late):
    with Stream(channel) as stream:
        stream.send(job(), W, X, DY, END, late)
        stream.half_close()
        failure = stream.failure()
    assert failure.status is INVALID
    assert failure.reason in {"MESSAGE_UNEXPECTED", "MESSAGE_MALFORMED"}
    assert_computes(channel)


def test_a_message_over_the_receive_limit_is_refused_by_grpc(channel):
    with Stream(channel) as stream:
        stream.send(job(m=None, n=2048, k=2048), chunk("w", 0, bytes(5 * MIB)))
        failure = stream.failure()
    assert failure.status is StatusCode.RESOURCE_EXHAUSTED
    assert_computes(channel)


def test_every_reason_has_a_test():
    tables = (HEADERS, IDS, STREAMS, BEFORE_ANY_JOB, COMPUTES)
    in_a_table = {row.values[2] for table in tables for row in table}
    elsewhere = {
        "LEAD_EXCEEDED",  # below
        "CONTRACT_UNKNOWN",
        "JOB_TOO_LARGE",  # test_states.py
        "BUSY",
        "CLIENT_IDLE",
        "JOB_CANCELLED",
        "DEADLINE_PASSED",
        "DRAINING",  # test_stopping.py
        "RESUME_MISMATCH",  # test_checkpoints.py
        "DEVICE_LOST",  # test_devices.py
        "CONNECTION_LOST",  # test_direct_connections.py
        "DEVICE_OUT_OF_MEMORY",  # test_faults.py
        "UNFORESEEN",
        "BUFFER_REF_INVALID",  # test_shared_memory.py
        "REGION_UNKNOWN",
        "STATE_UNKNOWN",  # test_session_states.py
        "STATE_INVALID",
        "STATE_NOT_SAVED",
        "NOT_ALLOWED",
        "SESSION_UNKNOWN",  # test_sessions.py
        "SESSION_FULL",
        "TENSOR_UNKNOWN",
        "TENSOR_MISMATCH",
        "STEP_CONFLICT",
        "GRADIENT_INCOMPLETE",  # test_session_steps.py
        "SESSION_EXPIRED",  # test_session_faults.py
    }
    of_the_future = {"CREDENTIALS_INVALID"}
    assert in_a_table | elsewhere | of_the_future == {each.value for each in Reason}


@pytest.mark.parametrize("method", ["Compute", "ComputeStream", "OfTheFuture"])
def test_a_client_of_another_contract_is_told_which_one_is_served(channel, method):
    call = channel.stream_stream(f"/gradwire.v2.GradientService/{method}")
    with pytest.raises(grpc.RpcError) as raised:
        next(call(iter([b""]), timeout=10))
    error = CallError(raised.value)
    assert (error.status, error.reason) == (UNIMPLEMENTED, "CONTRACT_UNKNOWN")
    assert "gradwire.v1" in error.text
    assert "gradwire.v2" in error.text
    assert_computes(channel)
