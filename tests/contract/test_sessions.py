"""The methods of SessionService one by one, and every way in which they refuse."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import google_crc32c
import grpc
import numpy as np
import pytest
from grpc import StatusCode

from gradwire.v1 import job_pb2
from gradwire.v1 import session_service_pb2 as pb2
from tests.support.raw import (
    DTYPES,
    CallError,
    Stream,
    assert_exact,
    dtype_number,
    make_job,
    stream_job,
    whole_numbers,
)
from tests.support.serving import ServerProcess
from tests.support.sessions import (
    GRADIENT,
    MIB,
    RawSessions,
    chunks,
    header,
    into,
    kept,
    sent_and_kept,
    sgd,
)

INVALID = StatusCode.INVALID_ARGUMENT
FAILED = StatusCode.FAILED_PRECONDITION
PROBLEM = whole_numbers(40, 5, 4)
W, X, G, ACTIVATION, OTHER = 1, 2, 3, 4, 5
"""Tensors of `session`: W, X put as a weight, the gradient of W, X kept by a job, and
a gradient with three dimensions in float64."""
NONE = 99


@pytest.fixture(scope="module")
def channel(small_blocks: ServerProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(small_blocks.address) as opened:
        yield opened


@pytest.fixture(scope="module")
def session(channel: grpc.Channel) -> Iterator[RawSessions]:
    """A session that no test of this module changes."""
    session = RawSessions(channel).open(label="of the tests")
    session.put(W, PROBLEM.w)
    session.put(X, PROBLEM.x, compute_dtype=dtype_number("bfloat16"))
    session.zeros(G, PROBLEM.w.shape)
    session.compute(PROBLEM, x=sent_and_kept(ACTIVATION))
    session.zeros(OTHER, (2, 3, 4), dtype=dtype_number("float64"))
    yield session
    session.close()


@pytest.fixture
def own(channel: grpc.Channel) -> Iterator[RawSessions]:
    """A session of the test's own."""
    session = RawSessions(channel).open()
    yield session
    session.close()


@pytest.fixture(autouse=True)
def _nothing_changes(request: pytest.FixtureRequest) -> Iterator[None]:
    """A refusal leaves the session as it was, with its memory to the byte."""
    if "session" not in request.fixturenames:
        yield
        return
    session: RawSessions = request.getfixturevalue("session")
    before = session.describe()
    yield
    assert session.describe() == before


def assert_refused(
    failure: CallError, status: StatusCode, reason: str, field: str | None, *says: str
) -> None:
    assert (failure.status, failure.reason) == (status, reason), failure
    assert list(failure.fields) == ([] if field is None else [field]), failure
    assert failure.repeats_the_status
    for part in says:
        assert part in failure.text, failure


# The ways that succeed.


def test_a_session_describes_itself(channel: grpc.Channel) -> None:
    sessions = RawSessions(channel)
    request = pb2.OpenSessionRequest(
        keep_bytes=1000, label="mine", lease_seconds=60, required_features=["sessions"]
    )
    answer = sessions.call("OpenSession", request)
    opened = RawSessions(channel, answer.session)
    described = opened.describe()
    assert len(answer.session) >= 43  # 256 bits in base64
    assert answer.lease_seconds == described.lease_seconds == 60
    assert answer.device == described.device
    assert answer.server_instance == described.server_instance
    assert (described.label, described.keep_bytes) == ("mine", 1000)
    assert (described.step, described.used_bytes) == (0, 0)
    assert not described.tensors
    assert opened.renew() == pb2.RenewSessionResponse(lease_seconds=60)
    opened.close()


def test_closing_a_session_again_is_no_error_and_nothing_else_works(
    channel: grpc.Channel,
) -> None:
    session = RawSessions(channel).open()
    session.put(W, PROBLEM.w)
    session.close()
    session.close()
    for call in (
        session.renew,
        session.describe,
        lambda: session.drop(W),
        lambda: session.step(1, sgd((W, G))),
        lambda: session.get(W),
        lambda: session.put(W, PROBLEM.w),
        lambda: session.compute(PROBLEM, w=kept(W)),
        lambda: session.stream(PROBLEM, w=kept(W)),
    ):
        with pytest.raises(CallError) as raised:
            call()
        assert (raised.value.status, raised.value.reason) == (FAILED, "SESSION_UNKNOWN")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 0, 2), (2, 3, 4), (1,) * 8])
def test_a_tensor_is_returned_with_its_bits(own, dtype, shape) -> None:
    random = np.random.default_rng(1)
    size = int(np.prod(shape)) * DTYPES[dtype].itemsize
    array = np.frombuffer(random.bytes(size), DTYPES[dtype]).reshape(shape)
    used = own.put(7, array, name="any bits")
    got = own.get(7)
    assert (got.dtype, got.shape) == (array.dtype, array.shape)
    assert got.tobytes() == array.tobytes()
    info = own.tensors()[7]
    assert used == info.size_bytes == own.used_bytes == array.nbytes
    expected = header(array, tensor=7, name="any bits")
    assert info.header == expected
    assert own.drop(7, 7, NONE) == 0
    assert not own.tensors()


def test_chunks_have_the_size_and_the_checksum_that_were_asked_for(own) -> None:
    array = np.arange(1000, dtype=np.float32)
    own.put(1, array)
    for size, per_chunk in ((0, 1000), (1, 1), (10, 2), (400, 100)):
        first, *rest = own.get_messages(1, max_chunk_bytes=size, checksum=1)
        assert first.header.checksum == 1
        assert [m.chunk.index for m in rest] == list(range(0, 1000, per_chunk))
        for message in rest:
            data = message.chunk.data
            assert message.chunk.crc32c == google_crc32c.value(data)
    _, *rest = own.get_messages(1)
    assert not any(m.chunk.HasField("crc32c") for m in rest)


def test_a_checksum_of_the_clients_is_compared(own) -> None:
    array = np.arange(20, dtype=np.float32)
    messages = list(chunks(array, 32))
    for message in messages:
        message.chunk.crc32c = google_crc32c.value(message.chunk.data)
    first = header(array, session=own.token, tensor=1, checksum=1)
    own.put_messages([pb2.PutTensorRequest(header=first), *messages])
    assert own.get(1).tobytes() == array.tobytes()
    messages[1].chunk.crc32c ^= 1
    with pytest.raises(CallError) as raised:
        own.put_messages([pb2.PutTensorRequest(header=first), *messages])
    assert_refused(
        raised.value, StatusCode.DATA_LOSS, "CHECKSUM_MISMATCH", "chunk.crc32c"
    )
    assert own.used_bytes == array.nbytes


def test_a_copy_for_jobs_is_rounded_and_counts(own) -> None:
    problem = whole_numbers(6, 5, 4, "bfloat16", ("y",))
    w = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    used = own.put(1, w, compute_dtype=dtype_number("bfloat16"))
    assert used == w.nbytes * 3 // 2
    rounded = w.astype(DTYPES["bfloat16"])
    expected = problem.x.astype(np.float64) @ rounded.astype(np.float64)
    outcome = own.compute(problem, w=kept(1), y=make_job(results={"y": "float32"}).y)
    np.testing.assert_allclose(outcome.arrays["y"], expected, rtol=1e-5, atol=1e-5)
    assert own.get(1).tobytes() == w.tobytes()


def test_a_put_tensor_replaces_another_of_its_role(own) -> None:
    own.put(1, np.ones((2, 3), np.float32))
    assert own.put(1, np.full((4,), 7.0)) == 32
    assert own.get(1).tolist() == [7.0] * 4
    assert own.zeros(2, (3,)) == 44
    assert own.get(2).tolist() == [0.0] * 3


def test_a_state_is_put_and_returned(own) -> None:
    w = np.ones((2, 3), np.float32)
    own.put(1, w)
    moments = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert own.put(1, moments, state="exp_avg", updates=9) == 48
    assert own.put(1, moments, state="exp_avg", updates=9) == 48
    first, _ = own.get_messages(1, state="exp_avg")
    assert (first.header.state, first.header.updates) == ("exp_avg", 9)
    assert own.get(1, state="exp_avg").tobytes() == moments.tobytes()
    info = own.tensors()[1]
    assert (list(info.states), info.updates, info.size_bytes) == (["exp_avg"], 9, 48)
    assert own.drop(1) == 0


def test_states_go_on_with_a_weight_that_takes_them_over(own) -> None:
    array = np.ones((3, 2), np.float32)
    own.put(1, array, compute_dtype=dtype_number("bfloat16"))
    own.put(1, array + 1, state="exp_avg", updates=7)
    before = own.used_bytes
    own.put(1, array + 2, keep_states=True, compute_dtype=dtype_number("bfloat16"))
    assert own.used_bytes == before
    assert (own.get(1) == 3).all()
    assert (own.get(1, state="exp_avg") == 2).all()
    info = own.tensors()[1]
    assert (list(info.states), info.updates) == (["exp_avg"], 7)
    own.put(1, array)
    info = own.tensors()[1]
    assert (list(info.states), info.updates) == ([], 0)
    assert own.drop(1) == 0


def test_a_kept_operand_is_used_once_more_and_dropped(own) -> None:
    x_bytes = PROBLEM.x.nbytes
    for call in (own.compute, own.stream):
        assert_exact(call(PROBLEM, x=sent_and_kept(1)), PROBLEM)
        assert own.used_bytes == x_bytes
        assert own.tensors()[1].header.role == pb2.TENSOR_ROLE_ACTIVATION
        assert own.get(1).tobytes() == PROBLEM.x.tobytes()
        assert_exact(call(PROBLEM, x=kept(1)), PROBLEM)
        assert_exact(call(PROBLEM, x=kept(1, last_use=True)), PROBLEM)
        assert own.used_bytes == 0


# Sessions that are refused.


@pytest.mark.parametrize(
    ("fields", "status", "reason", "field", "says"),
    [
        ({"keep_bytes": 0}, INVALID, "OPTION_INVALID", "keep_bytes", "is 0"),
        ({"keep_bytes": -5}, INVALID, "OPTION_INVALID", "keep_bytes", "is -5"),
        (
            {"keep_bytes": 2**62},
            StatusCode.RESOURCE_EXHAUSTED,
            "JOB_TOO_LARGE",
            "keep_bytes",
            "keep_limit",
        ),
        ({"label": "é"}, INVALID, "OPTION_INVALID", "label", "printable"),
        ({"label": "a\n"}, INVALID, "OPTION_INVALID", "label", "printable"),
        ({"label": "a" * 129}, INVALID, "OPTION_INVALID", "label", "129"),
        ({"lease_seconds": -1}, INVALID, "OPTION_INVALID", "lease_seconds", "-1"),
        (
            {"lease_seconds": float("nan")},
            INVALID,
            "OPTION_INVALID",
            "lease_seconds",
            "nan",
        ),
        (
            {"idempotency_key": b"short"},
            INVALID,
            "OPTION_INVALID",
            "idempotency_key",
            "5 bytes",
        ),
        (
            {"required_features": ["sessions", "of-the-future"]},
            StatusCode.UNIMPLEMENTED,
            "FEATURE_UNKNOWN",
            "required_features[1]",
            "of-the-future",
        ),
    ],
)
def test_a_wrong_request_for_a_session(channel, fields, status, reason, field, says):
    with pytest.raises(CallError) as raised:
        RawSessions(channel).open(**({"keep_bytes": 1000} | fields))
    assert_refused(raised.value, status, reason, field, says)


KEY = b"16 random bytes."


def test_a_repeated_request_opens_one_session(channel) -> None:
    sessions = RawSessions(channel)
    first = sessions.open(1000, idempotency_key=KEY)
    first.put(1, np.ones(3, np.float32))
    again = sessions.open(1000, idempotency_key=KEY)
    assert (again.token, again.used_bytes) == (first.token, 12)
    with pytest.raises(CallError) as raised:
        sessions.open(1001, idempotency_key=KEY)
    assert_refused(raised.value, INVALID, "OPTION_INVALID", "idempotency_key", "new")
    others = [
        sessions.open(1000, idempotency_key=b"another" + KEY),
        sessions.open(1000),
        sessions.open(1000),
    ]
    first.close()
    others.append(sessions.open(1001, idempotency_key=KEY))
    assert len({first.token, *(each.token for each in others)}) == 5
    assert not others[-1].used_bytes
    for each in others:
        each.close()


def test_an_infinite_lease_is_shortened(channel) -> None:
    request = pb2.OpenSessionRequest(keep_bytes=1, lease_seconds=float("inf"))
    answer = RawSessions(channel).call("OpenSession", request)
    assert answer.lease_seconds == 3600
    RawSessions(channel, answer.session).close()


@pytest.mark.parametrize("token", ["", "nobody's", "\0", "x" * 5000])
def test_an_unknown_session(channel, token) -> None:
    session = RawSessions(channel, token)
    for call, field in (
        (session.renew, "session"),
        (session.describe, "session"),
        (lambda: session.drop(1), "session"),
        (lambda: session.step(1, sgd((W, G))), "session"),
        (lambda: session.get(1), "session"),
        (lambda: session.put(1, PROBLEM.w), "header.session"),
        (lambda: session.stream(PROBLEM, w=kept(1)), "job.session.session"),
        (lambda: session.compute(PROBLEM, w=kept(1)), "job.session.session"),
    ):
        with pytest.raises(CallError) as raised:
            call()
        assert_refused(raised.value, FAILED, "SESSION_UNKNOWN", field)
        assert raised.value.metadata["server_instance"]
    session.close()


@pytest.mark.parametrize(
    "method",
    [
        "OpenSession",
        "RenewSession",
        "CloseSession",
        "DescribeSession",
        "DropTensors",
        "Step",
    ],
)
def test_what_is_no_request(channel, method) -> None:
    with pytest.raises(CallError) as raised:
        RawSessions(channel).call(method, b"\xff\xff")
    assert_refused(raised.value, INVALID, "MESSAGE_MALFORMED", None, method)


# Jobs that are refused from their header alone.


def job(token: str, **fields: Any) -> job_pb2.Job:
    """The header of PROBLEM's job with kept tensors of `session`."""
    session = {"session": job_pb2.SessionRef(session=token)} if token else {}
    return PROBLEM.job(**(session | fields))


HEADERS = [
    ({"session": None, "w": kept(W)}, "OPTION_INVALID", "job.session", "absent"),
    ({"session": None, "x": sent_and_kept(9)}, "OPTION_INVALID", "job.session", "abs"),
    ({"session": None, "dw": into(G)}, "OPTION_INVALID", "job.session", "absent"),
    ({}, "OPTION_INVALID", "job.session", "present", "no kept tensors"),
    ({"w": kept(W), "m": None}, "SHAPE_INVALID", "job.m", "absent"),
    (
        {"w": kept(W), "checkpoints": job_pb2.Checkpoints(rows=4)},
        "OPTION_INVALID",
        "job.checkpoints",
        "kept",
    ),
    (
        {"w": kept(W), "resume": job_pb2.Resume()},
        "OPTION_INVALID",
        "job.resume",
        "kept",
    ),
    ({"w": sent_and_kept(9)}, "OPTION_INVALID", "job.w.keep", "x and dy"),
    (
        {
            "x": job_pb2.Operand(
                kept=job_pb2.KeptSource(tensor=X), keep=job_pb2.KeepAs(tensor=9)
            )
        },
        "OPTION_INVALID",
        "job.x.keep",
        "x and dy",
    ),
    ({"y": into(G)}, "OPTION_INVALID", "job.y.destination", "dw and db"),
    ({"dx": into(G)}, "OPTION_INVALID", "job.dx.destination", "dw and db"),
    ({"w": kept(0)}, "OPTION_INVALID", "job.w.source.tensor", "is 0", "at least 1"),
    ({"x": sent_and_kept(0)}, "OPTION_INVALID", "job.x.keep.tensor", "is 0"),
    ({"dw": into(0)}, "OPTION_INVALID", "job.dw.destination.tensor", "is 0"),
    (
        {"x": kept(W), "w": kept(W)},
        "OPTION_INVALID",
        "job.w.source.tensor",
        "is 1",
        "job.x.source.tensor",
    ),
    (
        {"x": sent_and_kept(9), "dy": sent_and_kept(9)},
        "OPTION_INVALID",
        "job.dy.keep.tensor",
        "is 9",
        "job.x.keep.tensor",
    ),
    (
        {"w": kept(G), "dw": into(G)},
        "OPTION_INVALID",
        "job.dw.destination.tensor",
        "is 3",
    ),
    (
        {"dw": into(G, 4, parts=4)},
        "OPTION_INVALID",
        "job.dw.destination.add.part",
        "is 4",
        "less than 4",
    ),
]


@pytest.mark.parametrize(
    ("fields", "reason", "field", "says"),
    [(row[0], row[1], row[2], row[3:]) for row in HEADERS],
)
def test_a_wrong_header(channel, session, fields, reason, field, says) -> None:
    with Stream(channel) as stream:
        stream.send(job(session.token, **fields))
        failure = stream.failure()
    assert_refused(failure, INVALID, reason, field, *says)
    assert_exact(stream_job(channel, PROBLEM), PROBLEM)


MISFITS = [
    ({"w": kept(NONE)}, "TENSOR_UNKNOWN", "job.w.source.tensor", "is 99"),
    ({"x": kept(NONE)}, "TENSOR_UNKNOWN", "job.x.source.tensor", "is 99"),
    ({"dw": into(NONE)}, "TENSOR_UNKNOWN", "job.dw.destination.tensor", "is 99"),
    (
        {"w": kept(X)},
        "TENSOR_MISMATCH",
        "job.w.source.tensor",
        "(40, 5)",
        "(5, 4)",
    ),
    ({"x": kept(W)}, "TENSOR_MISMATCH", "job.x.source.tensor", "(5, 4)", "(40, 5)"),
    ({"w": kept(G)}, "TENSOR_MISMATCH", "job.w.source.tensor", "gradient"),
    (
        {"x": kept(OTHER)},
        "TENSOR_MISMATCH",
        "job.x.source.tensor",
        "(2, 3, 4)",
    ),
    (
        {"dw": into(W)},
        "TENSOR_MISMATCH",
        "job.dw.destination.tensor",
        "no gradient",
    ),
    (
        {"dw": into(OTHER)},
        "TENSOR_MISMATCH",
        "job.dw.destination.tensor",
        "(2, 3, 4)",
    ),
    (
        {"dw": into(G, dtype="float64")},
        "TENSOR_MISMATCH",
        "job.dw.destination.tensor",
        "float32",
        "float64",
    ),
    (
        {"x": sent_and_kept(W)},
        "TENSOR_MISMATCH",
        "job.x.keep.tensor",
        "is 1",
        "put",
    ),
    (
        {"dw": into(G, 0, step=3)},
        "STEP_CONFLICT",
        "job.dw.destination.add.step",
        "is 3",
        "0 steps",
    ),
    ({"x": kept(X, last_use=True)}, "OPTION_INVALID", "job.x.source.last_use", "put"),
]


@pytest.mark.parametrize(
    ("fields", "reason", "field", "says"),
    [(row[0], row[1], row[2], row[3:]) for row in MISFITS],
)
@pytest.mark.parametrize("way", ["compute", "stream"])
def test_a_tensor_that_does_not_fit(session, way, fields, reason, field, says) -> None:
    with pytest.raises(CallError) as raised:
        getattr(session, way)(PROBLEM, **fields)
    status = INVALID if reason == "OPTION_INVALID" else FAILED
    assert_refused(raised.value, status, reason, field, *says)
    if reason == "TENSOR_UNKNOWN":
        assert raised.value.metadata["tensor"] == str(NONE)
    assert_exact(session.compute(PROBLEM, w=kept(W)), PROBLEM)


@pytest.mark.parametrize("way", ["compute", "stream"])
def test_a_tensor_of_another_dtype(session, way) -> None:
    problem = whole_numbers(40, 5, 4, "float64")
    with pytest.raises(CallError) as raised:
        getattr(session, way)(problem, w=kept(W))
    assert_refused(
        raised.value,
        FAILED,
        "TENSOR_MISMATCH",
        "job.w.source.tensor",
        "float32",
        "float64",
    )
    problem = whole_numbers(40, 5, 4, "float16")
    with pytest.raises(CallError) as raised:
        getattr(session, way)(problem, x=kept(X))
    assert_refused(
        raised.value,
        FAILED,
        "TENSOR_MISMATCH",
        "job.x.source.tensor",
        "float32 with a copy in bfloat16",
        "float16",
    )


def test_a_job_for_another_step(channel, session) -> None:
    header = job(session.token, w=kept(W), session=session.ref(step=1))
    with Stream(channel) as stream:
        stream.send(header)
        failure = stream.failure()
    assert_refused(
        failure, FAILED, "STEP_CONFLICT", "job.session.step", "is 1", "0 steps"
    )
    assert failure.metadata["step"] == "0"


# Tensors that are refused.

ARRAY = np.arange(12, dtype=np.float32).reshape(3, 4)


def put_header(token: str, **fields: Any) -> pb2.PutTensorRequest:
    given = {"session": token, "tensor": 9} | fields
    return pb2.PutTensorRequest(header=header(ARRAY, **given))


def put_chunk(index: int, data: bytes, **fields: Any) -> pb2.PutTensorRequest:
    return pb2.PutTensorRequest(chunk=pb2.TensorChunk(index=index, data=data, **fields))


PUT_HEADERS = [
    ({"tensor": 0}, INVALID, "OPTION_INVALID", "header.tensor", "is 0"),
    ({"dtype": 0}, INVALID, "DTYPE_INVALID", "header.dtype", "FLOAT32 (3)"),
    ({"dtype": 99}, INVALID, "DTYPE_INVALID", "header.dtype", "is 99"),
    ({"shape": [3, -1]}, INVALID, "SHAPE_INVALID", "header.shape", "-1"),
    ({"shape": [1] * 9}, INVALID, "SHAPE_INVALID", "header.shape", "at most 8"),
    ({"shape": [2**31] * 3}, INVALID, "SHAPE_OVERFLOW", "header.shape", str(2**31)),
    (
        {"shape": [2**62, 2**62, 0]},
        INVALID,
        "SHAPE_OVERFLOW",
        "header.shape",
        str(2**62),
    ),
    ({"name": "é"}, INVALID, "OPTION_INVALID", "header.name", "printable"),
    ({"name": "n" * 129}, INVALID, "OPTION_INVALID", "header.name", "129"),
    (
        {"checksum": 7},
        StatusCode.UNIMPLEMENTED,
        "OPTION_UNKNOWN",
        "header.checksum",
        "is 7",
    ),
    ({"compute_dtype": 3}, INVALID, "DTYPE_INVALID", "header.compute_dtype", "is 3"),
    (
        {"compute_dtype": 1, "dtype": 4},
        INVALID,
        "DTYPE_INVALID",
        "header.compute_dtype",
        "float32",
    ),
    ({"role": 0}, INVALID, "OPTION_INVALID", "header.role", "WEIGHT"),
    (
        {"role": pb2.TENSOR_ROLE_ACTIVATION},
        INVALID,
        "OPTION_INVALID",
        "header.role",
        "is 3",
    ),
    ({"role": 17}, INVALID, "OPTION_INVALID", "header.role", "is 17"),
    (
        {"tensor": W, "role": GRADIENT},
        FAILED,
        "TENSOR_MISMATCH",
        "header.tensor",
        "another role",
    ),
    (
        {"tensor": ACTIVATION},
        FAILED,
        "TENSOR_MISMATCH",
        "header.tensor",
        "another role",
    ),
    (
        {"shape": [2**20]},
        FAILED,
        "SESSION_FULL",
        "keep_bytes",
        str(4 * 2**20),
        str(MIB),
    ),
    ({"keep_states": True}, FAILED, "TENSOR_MISMATCH", "header.keep_states", "no we"),
    (
        {"keep_states": True, "tensor": W},
        FAILED,
        "TENSOR_MISMATCH",
        "header.keep_states",
        "shape",
    ),
    (
        {"idempotency_key": b"k" * 65},
        INVALID,
        "OPTION_INVALID",
        "header.idempotency_key",
        "65 bytes",
    ),
    ({"state": "velocity"}, INVALID, "OPTION_INVALID", "header.state", "exp_avg"),
    ({"state": "exp_avg"}, FAILED, "TENSOR_UNKNOWN", "header.tensor", "is 9"),
    (
        {"state": "exp_avg", "tensor": G},
        FAILED,
        "TENSOR_MISMATCH",
        "header.tensor",
        "no weight",
    ),
    (
        {"state": "exp_avg", "tensor": W},
        FAILED,
        "TENSOR_MISMATCH",
        "header.shape",
        "(3, 4)",
        "(5, 4)",
    ),
    (
        {"state": "exp_avg", "tensor": W, "shape": [5, 4], "dtype": 4},
        FAILED,
        "TENSOR_MISMATCH",
        "header.shape",
        "float64",
    ),
    (
        {"state": "exp_avg", "tensor": W, "shape": [5, 4], "compute_dtype": 1},
        INVALID,
        "DTYPE_INVALID",
        "header.compute_dtype",
        "is 1",
    ),
]


@pytest.mark.parametrize(
    ("fields", "status", "reason", "field", "says"),
    [(row[0], row[1], row[2], row[3], row[4:]) for row in PUT_HEADERS],
)
def test_a_wrong_tensor(session, fields, status, reason, field, says) -> None:
    with pytest.raises(CallError) as raised:
        session.put_messages([put_header(session.token, **fields)])
    assert_refused(raised.value, status, reason, field, *says)


FIRST = put_chunk(0, bytes(16))
PUTS = [
    ([], "END_MISSING", None, "stream", "a header first"),
    ([b"\xff\xff"], "MESSAGE_MALFORMED", None, "PutTensorRequest"),
    ([b""], "MESSAGE_UNEXPECTED", None, "header first"),
    ([FIRST], "MESSAGE_UNEXPECTED", None, "chunk", "header first"),
    (["header"], "PAYLOAD_MISSING", "chunk.data", "48", "0 "),
    (["header", FIRST], "PAYLOAD_MISSING", "chunk.data", "48", "16"),
    (["header", FIRST, "header"], "MESSAGE_UNEXPECTED", None, "header", "a chunk"),
    (["header", b""], "MESSAGE_UNEXPECTED", None, "a chunk"),
    (["header", b"\xff"], "MESSAGE_MALFORMED", None, "PutTensorRequest"),
    (["header", put_chunk(4, bytes(4))], "INDEX_INVALID", "chunk.index", "is 4", "0"),
    (["header", FIRST, FIRST], "INDEX_INVALID", "chunk.index", "is 0", "4"),
    (
        ["header", put_chunk(-1, bytes(4))],
        "INDEX_INVALID",
        "chunk.index",
        "is -1",
    ),
    (["header", put_chunk(0, bytes(5))], "PAYLOAD_INVALID", "chunk.data", "5 bytes"),
    (["header", put_chunk(0, bytes(52))], "PAYLOAD_EXCESS", "chunk.data", "52", "48"),
    (
        ["header", put_chunk(0, bytes(48)), put_chunk(12, bytes(4))],
        "PAYLOAD_EXCESS",
        "chunk.data",
        "52",
    ),
    (
        ["header", put_chunk(0, bytes(4), crc32c=0)],
        "PAYLOAD_INVALID",
        "chunk.crc32c",
        "present",
    ),
    (
        [put_header("", checksum=1), FIRST],
        "PAYLOAD_INVALID",
        "chunk.crc32c",
        "absent",
    ),
    ([put_header("", zeros=True), FIRST], "INDEX_INVALID", "chunk.index", "is 0"),
]


@pytest.mark.parametrize(
    ("messages", "reason", "field", "says"),
    [(row[0], row[1], row[2], row[3:]) for row in PUTS],
)
def test_a_wrong_stream_of_elements(session, messages, reason, field, says) -> None:
    sent = []
    for message in messages:
        if message == "header":
            sent.append(put_header(session.token))
        elif isinstance(message, bytes) or message.HasField("chunk"):
            sent.append(message)
        else:
            named = pb2.PutTensorRequest.FromString(message.SerializeToString())
            named.header.session = session.token
            sent.append(named)
    with pytest.raises(CallError) as raised:
        session.put_messages(sent)
    assert_refused(raised.value, INVALID, reason, field, *says)


@pytest.mark.parametrize(
    ("tensor", "fields", "status", "reason", "field", "says"),
    [
        (NONE, {}, FAILED, "TENSOR_UNKNOWN", "tensor", "is 99"),
        (0, {}, FAILED, "TENSOR_UNKNOWN", "tensor", "is 0"),
        (W, {"state": "exp_avg"}, FAILED, "TENSOR_UNKNOWN", "state", "none"),
        (
            W,
            {"checksum": 5},
            StatusCode.UNIMPLEMENTED,
            "OPTION_UNKNOWN",
            "checksum",
            "5",
        ),
        (
            W,
            {"max_chunk_bytes": -1},
            INVALID,
            "OPTION_INVALID",
            "max_chunk_bytes",
            "-1",
        ),
        (
            W,
            {"max_chunk_bytes": 4 * MIB + 1},
            INVALID,
            "OPTION_INVALID",
            "max_chunk_bytes",
            str(4 * MIB),
        ),
    ],
)
def test_a_wrong_request_for_elements(
    session, tensor, fields, status, reason, field, says
) -> None:
    with pytest.raises(CallError) as raised:
        session.get_messages(tensor, **fields)
    assert_refused(raised.value, status, reason, field, says)


# Steps that are refused.


def group(**optimizer: Any) -> pb2.ParameterGroup:
    parameter = pb2.Parameter(weight=W, gradient=G)
    return pb2.ParameterGroup(parameters=[parameter], **optimizer)


OPTIMIZERS = [
    ("sgd", {"lr": -1.0}, "lr"),
    ("sgd", {"lr": float("nan")}, "lr"),
    ("sgd", {"lr": float("inf")}, "lr"),
    ("sgd", {"momentum": -0.1}, "momentum"),
    ("sgd", {"dampening": float("nan")}, "dampening"),
    ("sgd", {"weight_decay": -1.0}, "weight_decay"),
    ("sgd", {"nesterov": True}, "momentum"),
    ("sgd", {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "dampening"),
    ("adam", {"lr": -1.0}, "lr"),
    ("adam", {"beta1": 1.0}, "beta1"),
    ("adam", {"beta2": -0.1}, "beta2"),
    ("adam", {"eps": -1e-8}, "eps"),
    ("adam", {"weight_decay": float("inf")}, "weight_decay"),
]


@pytest.mark.parametrize(("kind", "options", "name"), OPTIMIZERS)
def test_a_wrong_optimizer(session, kind, options, name) -> None:
    message = {"sgd": pb2.Sgd, "adam": pb2.Adam}[kind](**options)
    with pytest.raises(CallError) as raised:
        session.step(1, sgd((OTHER, X)), group(**{kind: message}))
    assert raised.value.reason == "TENSOR_MISMATCH"  # the first group's first
    with pytest.raises(CallError) as raised:
        session.step(1, group(**{kind: message}))
    field = f"groups[0].{kind}.{name}"
    assert_refused(raised.value, INVALID, "OPTION_INVALID", field, name)


STEPS = [
    ([], {}, INVALID, "OPTION_INVALID", "groups", "at least one"),
    (
        [pb2.ParameterGroup(sgd=pb2.Sgd())],
        {},
        INVALID,
        "OPTION_INVALID",
        "groups",
        "at least one",
    ),
    (
        [group()],
        {},
        StatusCode.UNIMPLEMENTED,
        "OPTION_UNKNOWN",
        "groups[0].optimizer",
        "sgd or adam",
    ),
    (
        [sgd((W, G), (W, OTHER))],
        {},
        INVALID,
        "OPTION_INVALID",
        "groups[0].parameters[1].weight",
        "is 1",
        "twice",
    ),
    (
        [sgd((W, G)), sgd((X, G))],
        {},
        INVALID,
        "OPTION_INVALID",
        "groups[1].parameters[0].gradient",
        "is 3",
        "twice",
    ),
    (
        [sgd((NONE, G))],
        {},
        FAILED,
        "TENSOR_UNKNOWN",
        "groups[0].parameters[0].weight",
        "is 99",
    ),
    (
        [sgd((W, NONE))],
        {},
        FAILED,
        "TENSOR_UNKNOWN",
        "groups[0].parameters[0].gradient",
        "is 99",
    ),
    (
        [sgd((G, W))],
        {},
        FAILED,
        "TENSOR_MISMATCH",
        "groups[0].parameters[0].weight",
        "expected a weight",
    ),
    (
        [sgd((ACTIVATION, G))],
        {},
        FAILED,
        "TENSOR_MISMATCH",
        "groups[0].parameters[0].weight",
        "expected a weight",
    ),
    (
        [sgd((W, X))],
        {},
        FAILED,
        "TENSOR_MISMATCH",
        "groups[0].parameters[0].gradient",
        "expected a gradient",
    ),
    (
        [sgd((W, OTHER))],
        {},
        FAILED,
        "TENSOR_MISMATCH",
        "groups[0].parameters[0].gradient",
        "(2, 3, 4)",
        "(5, 4)",
    ),
    ([sgd((W, G))], {"step": 0}, FAILED, "STEP_CONFLICT", "step", "step is 0"),
    ([sgd((W, G))], {"step": 2}, FAILED, "STEP_CONFLICT", "step", "step is 2"),
    *(
        ([sgd((W, G))], {name: value}, INVALID, "OPTION_INVALID", name, f"{value:g}")
        for name, value in itertools.product(
            ("max_norm", "local_sum_of_squares", "inverse_scale"),
            (-1.0, float("nan"), float("inf")),
        )
    ),
]


@pytest.mark.parametrize(
    ("groups", "fields", "status", "reason", "field", "says"),
    [(*row[:5], row[5:]) for row in STEPS],
)
def test_a_wrong_step(session, groups, fields, status, reason, field, says) -> None:
    fields = dict(fields)
    with pytest.raises(CallError) as raised:
        session.step(fields.pop("step", 1), *groups, **fields)
    assert_refused(raised.value, status, reason, field, *says)
    if reason == "STEP_CONFLICT":
        assert raised.value.metadata["step"] == "0"


def test_a_step_of_16_bit_weights_is_refused(own) -> None:
    own.put(1, np.ones((2, 2), DTYPES["bfloat16"]))
    own.zeros(2, (2, 2), dtype=dtype_number("bfloat16"))
    with pytest.raises(CallError) as raised:
        own.step(1, sgd((1, 2)))
    assert_refused(
        raised.value,
        FAILED,
        "TENSOR_MISMATCH",
        "groups[0].parameters[0].weight",
        "bfloat16",
        "float32 or float64",
    )
