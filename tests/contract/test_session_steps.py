"""Contributions and steps: each counts once, in one order, and none is seen half."""

from __future__ import annotations

import itertools
import math
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest

from gradwire.v1 import session_service_pb2 as pb2
from tests.contract.conftest import assert_untroubled
from tests.support.raw import (
    DTYPES,
    CallError,
    Outcome,
    Problem,
    Stream,
    dtype_number,
    end,
    normal_numbers,
    whole_numbers,
)
from tests.support.serving import ServerProcess, running_server
from tests.support.sessions import (
    MIB,
    SESSION_SERVICE,
    RawSessions,
    into,
    kept,
    refusal,
    sent_and_kept,
    sgd,
    shared,
)
from tests.support.shared_memory import RawRegion

PROBLEM = whole_numbers(40, 5, 4)
DW = PROBLEM.expected()["dw"]
W, G, H = 1, 2, 3
SHAPE = (5, 4)


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with running_server(
        row_block_bytes=1024, allow_shared_memory=True, memory_limit=512 * MIB
    ) as process:
        yield process
        assert_untroubled(process)


@pytest.fixture(scope="module")
def channel(server: ServerProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as opened:
        yield opened


@pytest.fixture
def session(channel: grpc.Channel) -> Iterator[RawSessions]:
    """W, its gradient G, and another gradient H."""
    session = RawSessions(channel).open()
    session.put(W, np.zeros(SHAPE, np.float32))
    session.zeros(G, SHAPE)
    session.zeros(H, SHAPE)
    yield session
    session.close()


@pytest.fixture(params=["compute", "stream", "shared"])
def run(
    request: pytest.FixtureRequest, channel: grpc.Channel
) -> Iterator[Callable[..., Outcome]]:
    """Runs a job of a session in one of the three ways."""
    if request.param != "shared":
        yield lambda session, problem, **fields: getattr(session, request.param)(
            problem, **fields
        )
        return
    with RawRegion(channel, MIB) as region:
        yield lambda session, problem, **fields: shared(
            session, region, problem, **fields
        )


def applied(outcome: Outcome) -> list[tuple[int, bool]]:
    return [(each.tensor, each.again) for each in outcome.receipt.applied]


# Contributions.


def test_a_part_counts_once_however_often_it_is_sent(session, run) -> None:
    for attempt in range(3):
        outcome = run(session, PROBLEM, dw=into(G, 0, parts=2))
        assert applied(outcome) == [(G, attempt > 0)]
        np.testing.assert_array_equal(session.get(G), DW)
    outcome = run(session, PROBLEM, dw=into(G, 1, parts=2))
    assert applied(outcome) == [(G, False)]
    np.testing.assert_array_equal(session.get(G), 2 * DW)
    assert list(session.tensors()[G].parts) == [0, 1]


def test_a_part_that_is_sent_by_many_at_once_counts_once(session, run) -> None:
    with ThreadPoolExecutor(5) as pool:
        for part in range(4):
            jobs = [
                pool.submit(session.compute, PROBLEM, dw=into(G, part))
                for _ in range(4)
            ]
            own = run(session, PROBLEM, dw=into(G, part))
            outcomes = [own, *(job.result() for job in jobs)]
            flags = sorted(again for each in outcomes for _, again in applied(each))
            assert flags == [False, *[True] * 4]
            np.testing.assert_array_equal(session.get(G), (part + 1) * DW)


def test_a_result_without_a_part_replaces_the_gradient(session, run) -> None:
    for _ in range(2):
        outcome = run(session, PROBLEM, dw=into(G))
        assert applied(outcome) == [(G, False)]
        np.testing.assert_array_equal(session.get(G), DW)
    run(session, PROBLEM, dw=into(G, 0))
    np.testing.assert_array_equal(session.get(G), 2 * DW)


def test_both_sums_of_a_job_can_be_parts(session) -> None:
    session.zeros(7, (1, 4))
    session.zeros(8, (4,))
    problem = Problem(PROBLEM.x, PROBLEM.w, PROBLEM.dy, ("dw", "db"))
    for row_or_vector in (7, 8):
        outcome = session.stream(
            problem, dw=into(G, row_or_vector - 7), db=into(row_or_vector, 0)
        )
        assert not outcome.arrays
        assert applied(outcome) == [(G, False), (row_or_vector, False)]
        db = session.get(row_or_vector)
        np.testing.assert_array_equal(db.reshape(1, 4), problem.expected()["db"])


@pytest.mark.parametrize("orders", [25, pytest.param(50, marks=pytest.mark.big)])
def test_parts_give_the_same_bits_in_any_order(channel, server, orders) -> None:
    parts = [normal_numbers(20, 5, 4, seed=seed) for seed in range(8)]
    size = parts[0].w.nbytes
    order = random.Random(1)
    channels = [
        grpc.insecure_channel(server.address, [("grpc.use_local_subchannel_pool", 1)])
        for _ in range(4)
    ]
    session = RawSessions(channel).open()
    over = [session.over(each) for each in channels]
    reference = None
    try:
        with ThreadPoolExecutor(4) as pool:
            for attempt in range(orders + 1):
                session.zeros(G, SHAPE)
                numbers = list(range(8))
                if attempt:
                    order.shuffle(numbers)

                def contribute(worker: int, numbers: list[int] = numbers) -> None:
                    for number in numbers[worker::4]:
                        way = (
                            over[worker].compute if number % 2 else over[worker].stream
                        )
                        way(parts[number], dw=into(G, number, parts=8))

                if attempt:
                    list(pool.map(contribute, range(4)))
                else:
                    for number in numbers:
                        session.compute(parts[number], dw=into(G, number, parts=8))
                bits = session.get(G).tobytes()
                reference = reference or bits
                assert bits == reference
                assert session.used_bytes == size
    finally:
        session.close()
        for each in channels:
            each.close()
    # The order matters to these bits, or this test would show nothing.
    backwards = sum(
        (p.x.T @ p.dy for p in reversed(parts)), np.zeros(SHAPE, np.float32)
    )
    assert backwards.tobytes() != reference


def test_early_parts_count_in_the_sessions_memory(session, run) -> None:
    size = DW.nbytes
    before = session.used_bytes
    for count, part in enumerate((3, 1, 2), 1):
        run(session, PROBLEM, dw=into(G, part, parts=4))
        run(session, PROBLEM, dw=into(G, part, parts=4))
        assert session.used_bytes == before + count * size
        assert list(session.tensors()[G].parts) == sorted((3, 1, 2)[:count])
    run(session, PROBLEM, dw=into(G, 0, parts=4))
    assert session.used_bytes == before
    np.testing.assert_array_equal(session.get(G), 4 * DW)


def test_early_parts_go_with_their_gradient(session) -> None:
    before = session.used_bytes
    session.compute(PROBLEM, dw=into(G, 3))
    session.zeros(G, SHAPE)
    assert session.used_bytes == before
    session.compute(PROBLEM, dw=into(G, 3))
    session.compute(PROBLEM, dw=into(G))
    assert session.used_bytes == before
    session.compute(PROBLEM, dw=into(G, 3))
    assert session.drop(G) == before - DW.nbytes


def test_an_early_part_without_memory_is_refused_and_nothing_is_lost(channel) -> None:
    session = RawSessions(channel).open(2 * DW.nbytes)
    session.zeros(G, SHAPE)
    session.compute(PROBLEM, dw=into(G, 2, parts=3))
    for way in (session.compute, session.stream):
        with pytest.raises(CallError) as raised:
            way(PROBLEM, dw=into(G, 1, parts=3))
        assert raised.value.reason == "SESSION_FULL"
    assert session.used_bytes == 2 * DW.nbytes
    for part in (0, 1):
        session.compute(PROBLEM, dw=into(G, part, parts=3))
    np.testing.assert_array_equal(session.get(G), 3 * DW)
    session.close()


def test_both_sums_of_a_job_are_added_or_none(channel) -> None:
    """There is memory for an early part of dW, and none for one of db."""
    problem = Problem(PROBLEM.x, PROBLEM.w, PROBLEM.dy, ("dw", "db"))
    dw, db = (problem.expected()[name] for name in ("dw", "db"))
    session = RawSessions(channel).open(2 * dw.nbytes + db.nbytes)
    session.zeros(G, dw.shape)
    session.zeros(H, db.shape)
    before = session.describe()
    for way in (session.compute, session.stream):
        early = {"dw": into(G, 1), "db": into(H, 1)}
        assert refusal(lambda w=way, f=early: w(problem, **f)).reason == "SESSION_FULL"
        assert session.describe() == before
        session.compute(problem, dw=into(G, 1))
        session.drop(G)
        session.zeros(G, dw.shape)
    session.close()


@pytest.mark.parametrize("parts", [0, 3])
def test_a_step_needs_every_part(session, parts) -> None:
    session.compute(PROBLEM, dw=into(G, 0, parts=parts))
    session.compute(PROBLEM, dw=into(G, 2, parts=parts))
    with pytest.raises(CallError) as raised:
        session.step(1, sgd((W, G)))
    assert raised.value.reason == "GRADIENT_INCOMPLETE"
    assert list(raised.value.fields) == ["groups[0].parameters[0].gradient"]
    assert "part 1" in raised.value.text
    assert session.describe().step == 0
    session.compute(PROBLEM, dw=into(G, 1, parts=parts))
    assert session.step(1, sgd((W, G))).step == 1
    np.testing.assert_array_equal(session.get(W), -3 * DW)


def test_parts_are_counted_alike(session) -> None:
    session.compute(PROBLEM, dw=into(G, 0, parts=3))
    for parts in (0, 2, 4):
        with pytest.raises(CallError) as raised:
            session.compute(PROBLEM, dw=into(G, 1, parts=parts))
        assert raised.value.reason == "TENSOR_MISMATCH"
        assert list(raised.value.fields) == ["job.dw.destination.add.parts"]
    np.testing.assert_array_equal(session.get(G), DW)


# Steps.


def test_a_gradient_is_empty_after_a_step_and_a_late_part_is_refused(session) -> None:
    session.compute(PROBLEM, dw=into(G, 0))
    session.step(1, sgd((W, G)))
    assert not session.get(G).any()
    assert not session.tensors()[G].parts
    with pytest.raises(CallError) as raised:
        session.compute(PROBLEM, dw=into(G, 0, step=0))
    assert raised.value.reason == "STEP_CONFLICT"
    assert raised.value.metadata["step"] == "1"
    session.compute(PROBLEM, dw=into(G, 0, step=1))
    np.testing.assert_array_equal(session.get(G), DW)


def test_an_empty_gradient_leaves_its_weight_and_its_states(session) -> None:
    adam = pb2.Adam(lr=1.0, beta1=0.9, beta2=0.999, weight_decay=0.5)
    session.put(W, np.ones(SHAPE, np.float32))
    before = session.used_bytes
    group = pb2.ParameterGroup(
        parameters=[pb2.Parameter(weight=W, gradient=G)], adam=adam
    )
    answer = session.step(1, group)
    assert (answer.step, answer.total_norm, answer.skipped) == (1, 0.0, False)
    assert session.get(W).tolist() == np.ones(SHAPE).tolist()
    info = session.tensors()[W]
    assert (info.updates, list(info.states)) == (0, [])
    assert session.used_bytes == before


def test_gradients_that_are_kept_go_on_with_the_parts_of_the_next_step(session) -> None:
    session.compute(PROBLEM, dw=into(G, 0, parts=1))
    session.step(1, sgd((W, G)), keep_gradients=True)
    np.testing.assert_array_equal(session.get(G), DW)
    outcome = session.compute(PROBLEM, dw=into(G, 0, parts=1, step=1))
    assert applied(outcome) == [(G, False)]
    np.testing.assert_array_equal(session.get(G), 2 * DW)
    session.step(2, sgd((W, G)))
    np.testing.assert_array_equal(session.get(W), -3 * DW)
    assert not session.get(G).any()


def test_a_step_that_is_repeated_is_made_once(session) -> None:
    session.compute(PROBLEM, dw=into(G, 0))
    first = session.step(1, sgd((W, G), lr=0.5, momentum=0.9), max_norm=3.0)
    after, described = session.get(W), session.describe()
    for _ in range(3):
        again = session.step(1, sgd((W, G), lr=0.5, momentum=0.9), max_norm=3.0)
        assert again.again
        again.again = False
        assert again == first
    assert session.get(W).tobytes() == after.tobytes()
    assert session.describe() == described
    for fields in ({"max_norm": 4.0}, {"keep_gradients": True}):
        with pytest.raises(CallError) as raised:
            session.step(1, sgd((W, G), lr=0.5, momentum=0.9), **fields)
        assert raised.value.reason == "STEP_CONFLICT"
        assert "another request" in raised.value.text


def test_a_step_that_many_ask_for_at_once_is_made_once(session) -> None:
    session.compute(PROBLEM, dw=into(G, 0))
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: session.step(1, sgd((W, G))), range(8)))
    assert sorted(answer.again for answer in answers) == [False] + [True] * 7
    np.testing.assert_array_equal(session.get(W), -DW)
    assert session.describe().step == 1


def test_a_norm_counts_the_clients_part_and_the_scale(session) -> None:
    session.compute(PROBLEM, dw=into(G, 0))
    exact = DW.astype(np.float64)
    norm = math.sqrt(7.0 + (0.25 * exact**2).sum())
    answer = session.step(
        1,
        sgd((W, G)),
        max_norm=2.0,
        local_sum_of_squares=7.0,
        inverse_scale=0.5,
    )
    assert answer.total_norm == pytest.approx(norm, rel=1e-12)
    expected = -exact * (0.5 * 2.0 / (norm + 1e-6))
    np.testing.assert_allclose(session.get(W), expected, rtol=1e-6)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_step_is_skipped_where_a_gradient_is_not_finite(session, wrong) -> None:
    dy = PROBLEM.dy.copy()
    dy[3, 2] = wrong
    adam = pb2.Adam(lr=1.0, beta1=0.9, beta2=0.999)
    group = pb2.ParameterGroup(
        parameters=[pb2.Parameter(weight=W, gradient=G)], adam=adam
    )
    before = session.used_bytes
    session.compute(Problem(PROBLEM.x, PROBLEM.w, dy), dw=into(G, 0))
    answer = session.step(1, group, skip_nonfinite=True)
    assert (answer.step, answer.skipped) == (1, True)
    assert not math.isfinite(answer.total_norm)
    assert not session.get(W).any()
    assert not session.get(G).any()
    info = session.tensors()[W]
    assert (info.updates, list(info.states)) == (0, [])
    assert session.used_bytes == before
    assert session.step(1, group, skip_nonfinite=True).again


def test_the_largest_scale_overflows_to_a_skipped_step(session) -> None:
    session.compute(PROBLEM, dw=into(G, 0))
    answer = session.step(
        1,
        sgd((W, G)),
        inverse_scale=1e300,
        skip_nonfinite=True,
    )
    assert answer.skipped
    assert answer.total_norm == math.inf
    answer = session.step(2, sgd((W, G)), inverse_scale=1e300)
    assert answer.total_norm == 0.0


def test_momentum_begins_where_it_is_first_used(session) -> None:
    """As in PyTorch: the buffer is the first gradient, undamped."""
    expected = np.zeros(SHAPE)
    for step, (momentum, change) in enumerate([(0.0, 1.0), (0.5, 1.0), (0.5, 0.75)]):
        session.compute(PROBLEM, dw=into(G, 0, step=step))
        options = {"momentum": momentum, "dampening": 0.75} if momentum else {}
        session.step(step + 1, sgd((W, G), **options))
        expected -= change * DW
        np.testing.assert_array_equal(session.get(W), expected)


def test_a_step_without_memory_for_its_states_is_refused_and_works_later(
    channel,
) -> None:
    size = DW.nbytes
    session = RawSessions(channel).open(4 * size + 1)
    session.put(W, np.zeros(SHAPE, np.float32))
    session.zeros(G, SHAPE)
    session.compute(PROBLEM, dw=into(G, 0))
    session.put(9, np.zeros(size + 1, np.float16).reshape(-1)[: size // 2])
    adam = pb2.Adam(lr=1.0, beta1=0.0, beta2=0.0, eps=1.0)
    group = pb2.ParameterGroup(
        parameters=[pb2.Parameter(weight=W, gradient=G)], adam=adam
    )
    before = session.describe()
    with pytest.raises(CallError) as raised:
        session.step(1, group)
    assert raised.value.reason == "SESSION_FULL"
    # Both moments, also where one of them fits.
    needed = session.used_bytes + 2 * size
    assert f"keeps at least {needed} bytes" in raised.value.text
    assert session.describe() == before
    assert not session.get(W).any()
    session.drop(9)
    assert session.step(1, group).step == 1
    assert session.used_bytes == 4 * size
    expected = -DW / (np.abs(DW) + 1)
    np.testing.assert_allclose(session.get(W), expected, rtol=1e-6)
    session.close()


def test_a_copy_for_jobs_is_rounded_within_the_step(session) -> None:
    session.put(W, np.zeros(SHAPE, np.float32), compute_dtype=dtype_number("bfloat16"))
    session.compute(PROBLEM, dw=into(G, 0))
    session.step(1, sgd((W, G), lr=0.1))
    w = session.get(W).astype(DTYPES["bfloat16"])
    problem = Problem(np.eye(5, dtype=DTYPES["bfloat16"]), w, w, ("y",))
    outcome = session.compute(problem, w=kept(W))
    assert outcome.arrays["y"].tobytes() == w.tobytes()


def test_activations_are_dropped_by_the_second_step_after_them(session) -> None:
    before = session.used_bytes
    session.compute(PROBLEM, x=sent_and_kept(10))
    session.step(1, sgd((W, G)))
    session.compute(PROBLEM, x=sent_and_kept(11))
    assert session.used_bytes == before + 2 * PROBLEM.x.nbytes
    session.step(2, sgd((W, G)))
    assert sorted(session.tensors()) == [W, G, H, 11]
    session.step(3, sgd((W, G)))
    assert session.used_bytes == before


def test_a_large_step_has_the_bits_of_a_small_one(channel) -> None:
    """It is made in pieces."""
    size = (1 << 22) + 5
    w, g = np.random.default_rng(3).standard_normal((2, size)).astype(np.float32)
    session = RawSessions(channel, timeout_s=60).open(160 * MIB)
    session.put(W, w, compute_dtype=dtype_number("float16"))
    session.put(G, g, role=pb2.TENSOR_ROLE_GRADIENT)
    session.put(10, w[-9:])
    session.put(11, g[-9:], role=pb2.TENSOR_ROLE_GRADIENT)
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    answer = session.step(1, sgd((W, G), (10, 11), **options))
    g64 = g.astype(np.float64)
    norm = math.sqrt((g64**2).sum() + (g64[-9:] ** 2).sum())
    assert answer.total_norm == pytest.approx(norm, rel=1e-9)
    assert session.get(W)[-9:].tobytes() == session.get(10).tobytes()
    state = session.get(W, state="momentum_buffer")
    assert state[-9:].tobytes() == session.get(10, state="momentum_buffer").tobytes()
    session.close()


# No torn reads.


@pytest.mark.parametrize(
    ("forwards", "steps"),
    [(300, 60), pytest.param(6000, 1000, marks=pytest.mark.big)],
)
def test_a_job_sees_a_weight_before_or_after_a_step_and_never_in_between(
    channel, server, forwards, steps
) -> None:
    """Steps make each element of W the number of the step."""
    n, k = 64, 512
    problem = Problem(
        np.ones((1, n), np.float32),
        np.zeros((n, k), np.float32),
        -np.ones((1, k), np.float32),
    )
    forward = Problem(problem.x, problem.w, problem.dy, ("y",))
    rows = Problem(np.ones((8, n), np.float32), problem.w, problem.dy, ("y",))
    session = RawSessions(channel, timeout_s=60).open()
    session.put(W, problem.w)
    session.zeros(G, (n, k))
    finished = threading.Event()
    counts = [0, 0, 0]

    def read(number: int) -> set[float]:
        seen: set[float] = set()
        with grpc.insecure_channel(
            server.address, [("grpc.use_local_subchannel_pool", 1)]
        ) as own:
            reader = session.over(own)
            while not finished.is_set():
                if number % 2:
                    outcome = reader.compute(forward, w=kept(W))
                else:
                    outcome = reader.stream(rows, w=kept(W))
                values = np.unique(outcome.arrays["y"])
                assert len(values) == 1, values / n
                seen.add(values[0] / n)
                counts[number] += 1
        return seen

    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(read, number) for number in range(3)]
        try:
            backward = Problem(problem.x, problem.w, problem.dy, ("dw",))
            for step in itertools.count():
                session.compute(backward, dw=into(G, 0, step=step))
                session.step(step + 1, sgd((W, G)))
                if step >= steps and sum(counts) >= forwards:
                    break
        finally:
            finished.set()
        seen_by = [reader.result() for reader in readers]
    print(f"{counts} forwards beside {step + 1} steps")
    assert min(counts) > 20
    for seen in seen_by:
        assert len(seen) > 10
        assert seen <= set(range(step + 2))
    session.close()


# What happens beside a step.


def test_a_step_goes_on_if_its_call_is_cancelled(channel) -> None:
    size = 1 << 22
    session = RawSessions(channel, timeout_s=60).open(64 * MIB)
    session.put(W, np.zeros(size, np.float32))
    ones = np.ones(size, np.float32)
    method = channel.unary_unary(f"/{SESSION_SERVICE}/Step")
    for step, delay_s in enumerate((0.0, 0.001, 0.003, 0.006, 0.01, 0.02), 1):
        session.put(G, ones, role=pb2.TENSOR_ROLE_GRADIENT)
        request = pb2.StepRequest(session=session.token, step=step)
        request.groups.append(sgd((W, G)))
        call = method.future(request.SerializeToString())
        threading.Event().wait(delay_s)
        call.cancel()
        answer = session.call("Step", request)
        assert (answer.step, answer.total_norm) == (step, math.sqrt(size))
        w = session.get(W, max_chunk_bytes=2 * MIB)
        assert (w.min(), w.max()) == (-step, -step)
    session.close()


def test_a_gradient_that_is_dropped_beside_a_job_takes_nothing(
    channel, session
) -> None:
    """And its memory is returned when the job has ended."""
    for act in (lambda: session.drop(G), lambda: session.zeros(G, SHAPE)):
        session.zeros(G, SHAPE)
        before = session.used_bytes
        job = PROBLEM.job(session=session.ref(), dw=into(G, 1))
        with Stream(channel) as stream:
            stream.send(job)
            stream.receive_accepted()
            act()
            assert session.used_bytes >= before  # the job still uses it
            stream.send_all(PROBLEM.body(8))
            stream.half_close()
            failure = stream.failure()
        assert failure.reason == "TENSOR_UNKNOWN"
        assert "while the job ran" in failure.text
        session.drop(G)
        assert session.used_bytes == 2 * DW.nbytes


def test_a_job_does_not_replace_a_weight_that_was_put_meanwhile(
    channel, session
) -> None:
    before = session.used_bytes
    with Stream(channel) as stream:
        stream.send(PROBLEM.job(session=session.ref(), x=sent_and_kept(9)))
        stream.receive_accepted()
        session.put(9, PROBLEM.w)
        stream.send_all(PROBLEM.body(8))
        stream.half_close()
        failure = stream.failure()
    assert failure.reason == "TENSOR_MISMATCH"
    assert list(failure.fields) == ["job.x.keep.tensor"]
    assert session.get(9).tobytes() == PROBLEM.w.tobytes()
    assert session.used_bytes == before + PROBLEM.w.nbytes


def test_a_tensor_that_is_dropped_beside_a_job_is_read_to_the_end(
    channel, session
) -> None:
    session.put(W, PROBLEM.w)
    before = session.used_bytes
    forward = Problem(PROBLEM.x, PROBLEM.w, PROBLEM.dy, ("y",))
    with Stream(channel) as stream:
        stream.send(forward.job(session=session.ref(), w=kept(W)))
        outcome = stream.receive_accepted()
        assert session.drop(W) == before
        session.put(W, np.zeros(SHAPE, np.float32))
        stream.send_all(forward.chunks("x", 0, 40))
        stream.send(end(40))
        stream.half_close()
        outcome = stream.receive_results(outcome)
    np.testing.assert_array_equal(outcome.arrays["y"], forward.expected()["y"])
    assert session.used_bytes == before


def test_an_activation_that_was_used_up_is_there_for_a_repeated_job(channel) -> None:
    session = RawSessions(channel).open(PROBLEM.x.nbytes + DW.nbytes)
    session.zeros(G, SHAPE)
    for way in (session.compute, session.stream):
        session.compute(PROBLEM, x=sent_and_kept(7))
        fields: dict[str, Any] = {"x": kept(7, last_use=True), "dw": into(G, 0)}
        first = way(PROBLEM, **fields)
        assert session.used_bytes == DW.nbytes
        assert sorted(session.tensors()) == [G]
        again = way(PROBLEM, **fields)
        assert again.bits == first.bits
        assert session.used_bytes == DW.nbytes
        with pytest.raises(CallError, match="TENSOR_UNKNOWN"):
            way(PROBLEM, x=kept(7), dw=into(G, 0))
        # Its memory is given up when it is needed.
        session.compute(PROBLEM, x=sent_and_kept(8))
        with pytest.raises(CallError, match="TENSOR_UNKNOWN"):
            way(PROBLEM, **fields)
        session.drop(8)
    session.close()


def test_a_repeated_job_keeps_its_operand_again_in_the_same_memory(session) -> None:
    tight = session.open(PROBLEM.x.nbytes)
    for way in (tight.compute, tight.stream, tight.compute):
        way(PROBLEM, x=sent_and_kept(7))
        assert tight.used_bytes == PROBLEM.x.nbytes
        assert tight.get(7).tobytes() == PROBLEM.x.tobytes()
    # One that fails leaves what was there, if its memory was not needed.
    larger = session.open(2 * PROBLEM.x.nbytes)
    larger.compute(PROBLEM, x=sent_and_kept(7))
    with pytest.raises(CallError, match="PAYLOAD"):
        larger.compute(
            Problem(PROBLEM.x, PROBLEM.w[:-1], PROBLEM.dy), x=sent_and_kept(7), n=5
        )
    assert larger.get(7).tobytes() == PROBLEM.x.tobytes()
    assert larger.used_bytes == PROBLEM.x.nbytes
    tight.close()
    larger.close()


def test_a_refused_job_takes_no_memory_of_earlier_activations(channel) -> None:
    """There is memory for one operand in the place of an earlier one, not for both."""
    x, dy = PROBLEM.x, PROBLEM.dy
    session = RawSessions(channel).open(x.nbytes + dy.nbytes - 1)
    session.compute(PROBLEM, x=sent_and_kept(9))
    before = session.describe()
    fields = {"x": sent_and_kept(9), "dy": sent_and_kept(10)}
    for way in (session.compute, session.stream):
        failure = refusal(lambda w=way: w(PROBLEM, **fields))
        assert failure.reason == "SESSION_FULL"
        assert session.describe() == before
    assert session.get(9).tobytes() == x.tobytes()
    session.close()


def test_an_activation_that_was_used_up_stays_so_if_its_repeated_job_fails(
    session,
) -> None:
    session.compute(PROBLEM, x=sent_and_kept(9))
    once = {"x": kept(9, last_use=True)}
    session.compute(PROBLEM, **once)
    before = session.describe()
    failure = refusal(lambda: session.compute(PROBLEM, dw=into(99), **once))
    assert failure.reason == "TENSOR_UNKNOWN"
    assert session.describe() == before
    session.compute(PROBLEM, **once)
