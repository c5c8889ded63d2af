"""Sessions whose tensors lie in the memory of a device."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

import gradwire
from gradwire.v1 import session_service_pb2 as pb2
from gradwire_protocol.limits import MAX_PAYLOAD_BYTES
from gradwire_server import Server
from gradwire_server.backends.async_device.kept_memory import DeviceKeptMemory
from gradwire_server.backends.base import DeviceLostError
from tests.contract.test_session_bits import NUMBERS, bits, keeping
from tests.support.credentials import authorized, make_tokens
from tests.support.in_process import serving
from tests.support.observing import wait_until
from tests.support.raw import (
    DTYPES,
    CallError,
    Outcome,
    dtype_number,
    normal_numbers,
    result,
    server_info,
    stream_job,
    whole_numbers,
)
from tests.support.sessions import (
    GRADIENT,
    MIB,
    RawSessions,
    header,
    into,
    kept,
    refusal,
    sent_and_kept,
    sgd,
    shared,
)
from tests.support.shared_memory import RawRegion
from tests.support.simulated_backend import SimulatedBackend

PROBLEM = whole_numbers(40, 5, 4)
DW = PROBLEM.expected()["dw"]
W, G, H = 1, 2, 3
SHAPE = (5, 4)
MEMORY = 64 * MIB
DEVICE_MEMORY_LIMIT = 32 * MIB


@pytest.fixture(scope="module")
def backend() -> SimulatedBackend:
    return SimulatedBackend(MEMORY)


@pytest.fixture(scope="module")
def server(
    backend: SimulatedBackend, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """Row blocks are so small that a job has several."""
    with serving(
        backend,
        row_block_bytes=1024,
        allow_shared_memory=True,
        memory_limit=512 * MIB,
        device_memory_limit=DEVICE_MEMORY_LIMIT,
        state_dir=tmp_path_factory.mktemp("states"),
    ) as running:
        yield running


@pytest.fixture(scope="module")
def channel(server: Server) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.addresses[0]) as opened:
        yield opened


@pytest.fixture
def session(channel: grpc.Channel) -> Iterator[RawSessions]:
    """W and its gradient G."""
    session = RawSessions(channel).open()
    session.put(W, np.zeros(SHAPE, np.float32))
    session.zeros(G, SHAPE)
    yield session
    session.close()


@pytest.fixture
def device(backend: SimulatedBackend) -> Iterator[Any]:
    """The device, on which nothing fails after the test."""
    (device,) = backend.simulated
    device.uploads.clear()
    yield device
    device.fail = lambda method: None


def failing(method: str, error: Exception) -> Callable[[str], None]:
    def fail(called: str) -> None:
        if called == method:
            raise error

    return fail


# What is the same wherever tensors lie.


@pytest.fixture
def ways(channel: grpc.Channel) -> Iterator[list[Callable[..., Outcome]]]:
    """Run a job of a session in each of the three ways."""
    with RawRegion(channel, MIB) as region:
        yield [
            lambda session, problem, **fields: session.compute(problem, **fields),
            lambda session, problem, **fields: session.stream(problem, **fields),
            lambda session, problem, **fields: shared(
                session, region, problem, **fields
            ),
        ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_kept_matrices_give_the_bits_of_sent_ones(
    session, channel, ways, dtype
) -> None:
    problem = normal_numbers(150, 6, 5, dtype)
    wide = {"dw": "float64", "y": "float64", "dx": "float32"}
    for run, dtypes in zip(ways, ({}, wide, {}), strict=True):
        options = {name: result(each) for name, each in dtypes.items()}
        expected = stream_job(channel, problem, **options).bits
        for names in (("x", "dw"), ("x", "w", "dy", "dw")):
            fields = keeping(session, problem, names, **dtypes)
            outcome = run(session, problem, **(options | fields))
            assert bits(session, outcome, "dw") == expected, names
        session.drop(20)
        rest = {"w": kept(NUMBERS["w"]), "x": sent_and_kept(20)}
        assert run(session, problem, **(options | rest)).bits == expected
        assert session.get(20).tobytes() == problem.x.tobytes()


@pytest.mark.parametrize("shape", [(150, 6, 0), (150, 0, 5), (0, 6, 5)])
def test_rows_are_kept_also_if_nothing_is_computed_with_them(
    session, ways, shape
) -> None:
    problem = normal_numbers(*shape)
    for number, run in enumerate(ways, 20):
        run(session, problem, x=sent_and_kept(number))
        assert session.get(number).tobytes() == problem.x.tobytes()


def test_parts_that_come_early_wait_there_and_are_counted(session) -> None:
    used = session.used_bytes
    for part in (2, 1):
        session.stream(PROBLEM, dw=into(G, part, parts=3))
    assert session.used_bytes == used + 2 * DW.nbytes
    session.stream(PROBLEM, dw=into(G, 0, parts=3))
    assert session.used_bytes == used
    np.testing.assert_array_equal(session.get(G), 3 * DW)
    session.stream(PROBLEM, dw=into(G))
    np.testing.assert_array_equal(session.get(G), DW)


def test_large_tensors_travel_in_pieces_and_come_back(channel, device, backend) -> None:
    with_gaps = np.random.default_rng(0).integers(0, 1 << 16, 2_250_001, np.uint16)
    array = with_gaps.view(DTYPES["float16"]).reshape(1, -1)
    session = RawSessions(channel).open(8 * MIB)
    session.put(W, array)
    assert sum(device.uploads) == array.nbytes
    assert max(device.uploads) <= MAX_PAYLOAD_BYTES
    for size in (0, 300_001, MAX_PAYLOAD_BYTES - 999):
        found = session.get(W, max_chunk_bytes=size)
        assert found.tobytes() == array.tobytes()
    assert sum(device.uploads) == array.nbytes
    session.close()


def adam(*pairs: tuple[int, int]) -> pb2.ParameterGroup:
    parameters = [pb2.Parameter(weight=w, gradient=g) for w, g in pairs]
    options = pb2.Adam(lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8)
    return pb2.ParameterGroup(parameters=parameters, adam=options)


def test_steps_clip_update_and_round_as_the_formulas_say(session) -> None:
    """Against the first steps of Adam, worked out in float64."""
    start = np.arange(20, dtype=np.float32).reshape(SHAPE)
    session.put(W, start, compute_dtype=dtype_number("bfloat16"))
    p, m, v = start.astype(np.float64), 0.0, 0.0
    for t in (1, 2, 3):
        session.stream(PROBLEM, dw=into(G, 0, step=t - 1))
        norm = np.linalg.norm(DW.astype(np.float64))
        answer = session.step(t, adam((W, G)), max_norm=float(norm) / 2)
        assert abs(answer.total_norm - norm) <= 1e-12 * norm
        g = DW.astype(np.float64) * (norm / 2 / (norm + 1e-6))
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        root = np.sqrt(v / (1 - 0.99**t)) + 1e-8
        p = p - 0.1 * (m / (1 - 0.9**t)) / root
        np.testing.assert_allclose(session.get(W), p, rtol=1e-5)
    assert list(session.tensors()[W].states) == ["exp_avg", "exp_avg_sq"]
    np.testing.assert_allclose(session.get(W, state="exp_avg"), m, rtol=1e-5)
    # Jobs of bfloat16 read the copy that the step has rounded.
    rows = whole_numbers(40, 5, 4, "bfloat16", results=("y",))
    outcome = session.stream(rows, w=kept(W))
    copy = session.get(W).astype(rows.x.dtype).astype(np.float64)
    exact = rows.x.astype(np.float64) @ copy
    np.testing.assert_allclose(
        outcome.arrays["y"].astype(np.float64), exact, rtol=1e-2, atol=1e-1
    )


def test_a_saved_session_comes_back_on_the_device(session, channel) -> None:
    rng = np.random.default_rng(0)
    large = rng.standard_normal((600, 1000)).astype(np.float32)
    saved = RawSessions(channel).open(12 * MIB)
    saved.put(W, large, name="w", compute_dtype=dtype_number("float16"))
    saved.put(G, large, role=GRADIENT)
    saved.step(1, sgd((W, G), momentum=0.5))
    request = pb2.SaveSessionRequest(session=saved.token, name="one")
    assert saved.call("SaveSession", request).step == 1
    expected = [saved.get(W), saved.get(W, state="momentum_buffer")]
    saved.close()
    request = pb2.OpenSessionRequest(keep_bytes=12 * MIB, restore="one")
    answer = saved.call("OpenSession", request)
    assert (answer.step, answer.device.backend) == (1, "simulated")
    restored = RawSessions(channel, answer.session)
    found = [restored.get(W), restored.get(W, state="momentum_buffer")]
    for one, other in zip(found, expected, strict=True):
        assert one.tobytes() == other.tobytes()
    rows = dataclasses.replace(normal_numbers(4, 600, 1000, "float16"), results=("y",))
    outcome = restored.stream(rows, w=kept(W))
    exact = rows.x.astype(np.float64) @ expected[0].astype(np.float64)
    assert np.abs(outcome.arrays["y"].astype(np.float64) - exact).max() < 1
    restored.close()


# What goes to the device.


def test_w_goes_to_the_device_once_in_forty_steps(server, device) -> None:
    m, n, k = 8, 100, 90
    x, w, dy = normal_numbers(m, n, k).x, normal_numbers(m, n, k).w, None
    target = x @ (w + 1)
    exact = w.astype(np.float64)
    with (
        gradwire.connect(server.addresses[0], timeout_s=60) as client,
        client.session(keep="1MiB") as session,
    ):
        kept_w = session.put(w)
        gradient = session.zeros_like(kept_w)
        assert device.uploads.count(w.nbytes) == 1
        device.uploads.clear()
        for _ in range(40):
            y, context = session.forward(x, kept_w)
            dy = (y - target) / m
            session.backward(context, dy, into=gradient)
            session.step(gradwire.SGD(lr=1e-2), {kept_w: gradient})
            exact -= 1e-2 * x.T.astype(np.float64) @ ((x @ exact - target) / m)
        # X and dY once a step, and never W, dW or an X that was kept.
        assert sum(device.uploads) == 40 * (x.nbytes + dy.nbytes)
        found = session.get(kept_w)
    np.testing.assert_allclose(found, exact, rtol=1e-3, atol=1e-4)


def test_the_memory_of_a_session_is_cleared_before_another_gets_it(channel) -> None:
    """It lies where the memory of the one before lay, or where nobody's did."""
    secret = np.full(MIB, 3.0, np.float32)
    for _ in range(2):
        session = RawSessions(channel).open(8 * MIB)
        state = pb2.SaveSessionRequest(session=session.token, name="cleared")
        session.zeros(G, (MIB,))
        assert not session.get(G).any()
        session.put(W, secret)
        # An average that no step has written is all zeros.
        session.step(1, adam((W, G)))
        session.call("SaveSession", state)
        session.close()


# Accounts.


def test_what_a_session_reserves_on_a_device_is_refused_to_others(
    channel, backend
) -> None:
    (device,) = backend.simulated
    before = device.taken_bytes
    sessions = RawSessions(channel)
    assert sessions.open(1).call("ListSessions", pb2.ListSessionsRequest())
    failure = refusal(lambda: sessions.open(DEVICE_MEMORY_LIMIT))
    assert (failure.reason, failure.metadata["limit"]) == (
        "JOB_TOO_LARGE",
        "keep_limit",
    )
    first = sessions.open(10 * MIB)
    # Half of the device's memory may be kept, and that is told at once.
    failure = refusal(lambda: sessions.open(7 * MIB))
    assert (failure.reason, failure.metadata["limit"]) == ("BUSY", "keep_limit")
    assert device.taken_bytes - before >= 10 * MIB
    # A job that needs most of the rest runs.
    first.put(W, np.ones((1 << 20, 2), np.float32))
    problem = whole_numbers(20, 500, 400)
    outcome = stream_job(channel, problem)
    np.testing.assert_array_equal(outcome.arrays["y"], problem.expected()["y"])
    assert first.used_bytes == 8 * MIB
    failure = refusal(lambda: first.put(G, np.ones(3 * MIB // 4, np.float32)))
    assert failure.reason == "SESSION_FULL"
    first.close()
    sessions.open(12 * MIB).close()


def test_a_job_that_open_sessions_leave_no_room_for_is_told_so() -> None:
    """It would wait until they end."""
    with (
        serving(
            SimulatedBackend(MEMORY), device_memory_limit=16 * MIB, keep_limit=12 * MIB
        ) as server,
        grpc.insecure_channel(server.addresses[0]) as channel,
    ):
        problem = whole_numbers(8, 1200, 1000)
        stream_job(channel, problem)
        session = RawSessions(channel).open(8 * MIB)
        failure = refusal(lambda: stream_job(channel, problem))
        assert (failure.reason, failure.metadata["limit"]) == (
            "BUSY",
            "device_memory_limit",
        )
        session.close()
        stream_job(channel, problem)


def test_a_tenant_has_half_of_a_device_and_its_own_limit(tmp_path: Path) -> None:
    tokens, text = make_tokens("greedy", "modest")
    file = tmp_path / "tokens.toml"
    file.write_text(text)
    backend = SimulatedBackend(MEMORY, MEMORY)
    with (
        serving(
            backend, auth_tokens=file, device_memory_limit=32 * MIB, keep_limit=20 * MIB
        ) as server,
        grpc.insecure_channel(server.addresses[0]) as plain,
    ):
        greedy = RawSessions(authorized(plain, tokens["greedy"]))
        most = server_info(authorized(plain, tokens["greedy"])).limits.max_keep_bytes
        assert 9 * MIB < most < 16 * MIB
        greedy.open(most).close()
        failure = refusal(lambda: greedy.open(most + 1))
        assert failure.reason == "JOB_TOO_LARGE"
        # Sessions go to the device with the fewest.
        opened = [greedy.open(9 * MIB) for _ in range(2)]
        devices = {each.describe().device.index for each in opened}
        assert devices == {0, 1}
        failure = refusal(lambda: greedy.open(9 * MIB))
        assert (failure.reason, failure.metadata["limit"]) == (
            "BUSY",
            "device_memory_limit",
        )
        RawSessions(authorized(plain, tokens["modest"])).open(9 * MIB).close()
        for each in opened:
            each.close()
        greedy.open(9 * MIB).close()


# What fails on the device.


def test_a_device_without_memory_refuses_a_session_and_goes_on(
    session, channel, device
) -> None:
    """Somebody else has the memory that the server reckons with."""
    sessions = RawSessions(channel)
    for method in ("allocate", "clear"):
        device.fail = failing(method, MemoryError("somebody else has it"))
        failure = refusal(lambda: sessions.open(12 * MIB))
        assert failure.reason == "DEVICE_OUT_OF_MEMORY"
        device.fail = lambda method: None
        sessions.open(12 * MIB).close()  # nothing stays reserved
    np.testing.assert_array_equal(session.get(W), np.zeros(SHAPE))


@pytest.mark.parametrize("method", ["upload", "multiply", "download"])
def test_a_call_that_fails_for_memory_changes_nothing(session, device, method) -> None:
    used = session.used_bytes
    device.fail = failing(method, MemoryError("cuBLAS"))
    calls = {
        "upload": lambda: session.put(H, PROBLEM.w),
        "multiply": lambda: session.stream(PROBLEM, w=kept(W), dw=into(G, 0)),
        "download": lambda: session.get(W),
    }
    assert refusal(calls[method]).reason == "DEVICE_OUT_OF_MEMORY"
    device.fail = lambda method: None
    assert session.used_bytes == used
    calls[method]()
    session.stream(PROBLEM, dw=into(G, 0))
    np.testing.assert_array_equal(session.get(G), DW)


def test_a_step_that_fails_before_weights_change_can_be_made_again(
    session, device
) -> None:
    session.stream(PROBLEM, dw=into(G, 0))
    used = session.used_bytes
    device.fail = failing("sum_squares", MemoryError("none left"))
    failure = refusal(lambda: session.step(1, sgd((W, G), momentum=0.5)))
    assert failure.reason == "DEVICE_OUT_OF_MEMORY"
    device.fail = lambda method: None
    assert (session.describe().step, session.used_bytes) == (0, used)
    session.step(1, sgd((W, G), momentum=0.5))
    np.testing.assert_array_equal(session.get(W), -DW)


def test_a_step_that_fails_in_the_middle_ends_its_session(
    channel, device, session
) -> None:
    broken = RawSessions(channel).open()
    broken.put(W, np.zeros(SHAPE, np.float32))
    broken.put(G, DW, role=GRADIENT)
    device.fail = failing("update", MemoryError("none left"))
    failure = refusal(lambda: broken.step(1, sgd((W, G))))
    assert failure.reason == "SESSION_EXPIRED"
    device.fail = lambda method: None
    assert refusal(lambda: broken.get(W)).reason == "SESSION_EXPIRED"
    np.testing.assert_array_equal(session.get(W), np.zeros(SHAPE))


@pytest.mark.parametrize(
    ("method", "call"),
    [
        ("upload", lambda session: session.put(H, PROBLEM.w)),
        ("download", lambda session: session.get(W)),
        ("sum_squares", lambda session: session.step(1, sgd((W, G)))),
        ("update", lambda session: session.step(1, sgd((W, G)))),
        ("clear", lambda session: session.open()),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_a_lost_device_ends_the_server(method, call) -> None:
    backend = SimulatedBackend(MEMORY)
    with (
        serving(backend) as server,
        grpc.insecure_channel(server.addresses[0]) as channel,
    ):
        session = RawSessions(channel).open()
        session.put(W, np.zeros(SHAPE, np.float32))
        session.put(G, DW, role=GRADIENT)
        backend.simulated[0].fail = failing(method, DeviceLostError("gone"))
        assert refusal(lambda: call(session)).reason == "DEVICE_LOST"
        wait_until(lambda: server.lost is not None, "the server knows")
        assert refusal(session.open).reason == "DRAINING"


def test_a_tensor_is_copied_to_its_end_while_its_session_closes(
    channel: grpc.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only session that has a frozen tensor ends while another one asks for it."""
    copying, go_on = threading.Event(), threading.Event()
    copy = DeviceKeptMemory.copy

    def slow(memory: DeviceKeptMemory, *arrays: Any) -> None:
        copying.set()
        assert go_on.wait(20)
        copy(memory, *arrays)

    monkeypatch.setattr(DeviceKeptMemory, "copy", slow)
    array = PROBLEM.w
    one, other = (RawSessions(channel).open(array.nbytes) for _ in range(2))
    digest = hashlib.sha256(array.tobytes()).digest()
    one.put(W, array, frozen=True, sha256=digest)
    fields = {"session": other.token, "tensor": W, "frozen": True, "sha256": digest}
    question = pb2.PutTensorRequest(header=header(array, **fields))

    def is_over() -> bool:
        try:
            one.renew()
        except CallError as error:
            return error.reason == "SESSION_UNKNOWN"
        return False

    with ThreadPoolExecutor(2) as threads:
        asked = threads.submit(other.put_messages, [question])
        assert copying.wait(20)
        closed = threads.submit(one.close)
        wait_until(is_over, "the session's end")
        go_on.set()
        assert asked.result().used_bytes == array.nbytes
        closed.result()
    assert np.array_equal(other.get(W), array)
    other.close()
