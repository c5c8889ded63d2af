"""Frozen tensors of one tenant: sent once, never changed, never another tenant's."""

from __future__ import annotations

import hashlib
import itertools
import queue
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from gradwire.v1 import session_service_pb2 as pb2
from gradwire.v1.gradient_service_pb2 import GetServerInfoRequest
from gradwire.v1.gradient_service_pb2_grpc import GradientServiceStub
from tests.contract.conftest import assert_untroubled
from tests.support.credentials import authorized, make_tokens
from tests.support.metrics import Samples, scrape
from tests.support.observing import wait_until
from tests.support.raw import CallError, Stream, dtype_number, whole_numbers
from tests.support.serving import ServerProcess, running_server
from tests.support.sessions import (
    GRADIENT,
    MIB,
    SESSION_SERVICE,
    RawSessions,
    body,
    chunks,
    header,
    kept,
    receive,
    refusal,
    sgd,
)

PROBLEM = whole_numbers(40, 5, 4)
W, G, V = 1, 2, 3
NUMBERS = itertools.count()


@dataclass
class Shared:
    """A server, and two tenants of it."""

    server: ServerProcess
    backend: str
    alice: RawSessions
    bob: RawSessions

    def scrape(self) -> Samples:
        return scrape(self.server.metrics_url)

    def received(self) -> float:
        """Bytes of the elements of all puts so far."""
        return self.scrape().sum("received_bytes_total", method="PutTensor")


@pytest.fixture(scope="module", params=["numpy", "simulated"])
def shared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shared]:
    directory = tmp_path_factory.mktemp("shared")
    tokens, text = make_tokens("alice", "bob")
    (directory / "tokens.toml").write_text(text)
    with (
        running_server(
            backend=request.param,
            auth_tokens=str(directory / "tokens.toml"),
            state_dir=str(directory),
            metrics_listen="0",
            row_block_bytes=1024,
        ) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        tenants = [
            RawSessions(authorized(channel, tokens[name])) for name in ("alice", "bob")
        ]
        yield Shared(server, request.param, *tenants)
        assert_untroubled(server)


@pytest.fixture(autouse=True)
def _closed(shared: Shared) -> Iterator[None]:
    """Ends what a test leaves, so that the next one can count."""
    yield
    for tenant in (shared.alice, shared.bob):
        for each in tenant.call("ListSessions", pb2.ListSessionsRequest()).sessions:
            tenant.call("CloseSession", pb2.CloseSessionRequest(id=each.id))


def fresh(shape: tuple[int, ...] = (5, 4), dtype: str = "float32") -> np.ndarray:
    """A matrix that no other test has."""
    return np.random.default_rng(next(NUMBERS)).integers(-99, 99, shape).astype(dtype)


def frozen(array: np.ndarray, **fields: Any) -> dict[str, Any]:
    """The fields of a frozen tensor's header."""
    return {"frozen": True, "sha256": hashlib.sha256(array.tobytes()).digest()} | fields


def put(session: RawSessions, number: int, array: np.ndarray, **fields: Any) -> int:
    return session.put(number, array, **frozen(array, **fields))


def question(
    session: RawSessions, number: int, array: np.ndarray, **fields: Any
) -> pb2.PutTensorRequest:
    given = {"session": session.token, "tensor": number} | frozen(array) | fields
    return pb2.PutTensorRequest(header=header(array, **given))


def ask(session: RawSessions, number: int, array: np.ndarray, **fields: Any) -> bool:
    """Whether a put without elements was enough."""
    try:
        session.put_messages([question(session, number, array, **fields)])
    except CallError as error:
        if error.reason != "PAYLOAD_MISSING":
            raise
        return False
    return True


class Put:
    """A put that goes on as told.

    Args:
        session: The session.
        array: The frozen tensor's elements.
    """

    def __init__(self, session: RawSessions, number: int, array: np.ndarray) -> None:
        self._messages: queue.SimpleQueue[pb2.PutTensorRequest | None] = (
            queue.SimpleQueue()
        )
        method = session.channel.stream_unary(f"/{SESSION_SERVICE}/PutTensor")
        encoded = (each.SerializeToString() for each in iter(self._messages.get, None))
        self.call = method.future(encoded, timeout=session.timeout_s)
        self._messages.put(question(session, number, array))
        self._rest = list(chunks(array, array.nbytes // 2))

    def send(self) -> None:
        """Send one half of the elements."""
        self._messages.put(self._rest.pop(0))

    def end(self) -> None:
        """Send the rest."""
        while self._rest:
            self.send()
        self._messages.put(None)
        self.call.result()

    def cancel(self) -> None:
        self.call.cancel()
        self._messages.put(None)


def test_two_sessions_with_one_tensor_send_it_once(shared: Shared) -> None:
    info = GradientServiceStub(shared.alice.channel).GetServerInfo(
        GetServerInfoRequest(), timeout=20
    )
    assert "frozen-tensors" in info.features
    array, before = fresh(), shared.received()
    one, other = shared.alice.open(), shared.alice.open()
    assert not ask(one, W, array)
    assert put(one, W, array, name="a name") == array.nbytes
    assert ask(other, V, array, name="another name")
    assert shared.received() - before == array.nbytes
    assert np.array_equal(other.get(V), array)
    problem = whole_numbers(40, 5, 4)
    problem = type(problem)(problem.x, array, problem.dy)
    y = other.stream(problem, w=kept(V)).arrays["y"]
    assert np.array_equal(y, problem.expected()["y"])

    # It counts for each session, and is there once.
    assert one.used_bytes == other.used_bytes == array.nbytes
    in_host_memory = shared.backend == "numpy"
    count = 2 if in_host_memory else 1
    used = shared.scrape().sum("session_used_bytes")
    assert used == array.nbytes * (1 if in_host_memory else 2)
    for session, number, name in ((one, W, "a name"), (other, V, "another name")):
        about = session.tensors()[number]
        assert about.header.frozen
        assert not about.header.sha256
        assert about.sharers == count
        assert about.header.name == name

    # It is there as long as a session has it.
    one.close()
    assert np.array_equal(other.get(V), array)
    assert other.tensors()[V].sharers == 1
    assert shared.scrape().sum("session_used_bytes") == array.nbytes
    again = shared.alice.open()
    assert ask(again, W, array)
    again.drop(W)
    other.drop(V)
    assert shared.scrape().sum("session_used_bytes") == 0
    assert not ask(again, W, array)


def test_only_the_same_tensor_of_the_same_tenant_is_found(shared: Shared) -> None:
    array = fresh()
    one, other, foreign = shared.alice.open(), shared.alice.open(), shared.bob.open()
    put(one, W, array)
    same = frozen(array)
    assert not ask(other, W, array, shape=(4, 5))
    assert not ask(other, W, array, shape=(20,))
    assert not ask(other, W, array, dtype=dtype_number("float64"), shape=(5, 2))
    assert not ask(other, W, array, compute_dtype=dtype_number("bfloat16"))
    assert not ask(other, W, fresh())
    assert not ask(other, W, array, sha256=bytes(32))
    asked = refusal(lambda: foreign.put_messages([question(foreign, W, array)]))
    unknown = refusal(lambda: foreign.put_messages([question(foreign, W, fresh())]))
    assert str(asked) == str(unknown)
    # Tensors that may change are not found, whatever they have.
    plain = fresh()
    one.put(V, plain)
    assert not ask(other, W, plain)
    # The other tenant's own is its own.
    foreign.put(W, array, **same)
    assert foreign.tensors()[W].sharers == 1
    one.drop(W)
    assert not ask(other, W, array)


def test_a_hash_of_other_elements_is_refused(shared: Shared) -> None:
    array, wrong = fresh(), fresh()
    one, other = shared.alice.open(), shared.alice.open()
    error = refusal(lambda: one.put(W, wrong, **frozen(array)))
    assert error.reason == "CHECKSUM_MISMATCH"
    assert list(error.fields) == ["header.sha256"]
    assert one.used_bytes == 0
    assert not ask(one, V, array)
    assert not ask(other, V, wrong)
    # Nor does a tensor that is there make up for wrong elements.
    put(one, W, array)
    error = refusal(lambda: other.put(W, wrong, **frozen(array)))
    assert error.reason == "CHECKSUM_MISMATCH"
    assert other.used_bytes == 0


def test_a_frozen_tensor_never_changes(shared: Shared) -> None:
    array = fresh()
    one, other = shared.alice.open(), shared.alice.open()
    put(one, W, array)
    assert ask(other, W, array)
    one.zeros(G, array.shape)
    ones = np.ones_like(array)
    one.put(G, ones, role=GRADIENT)
    assert refusal(lambda: one.step(1, sgd((W, G)))).reason == "TENSOR_MISMATCH"
    state = {"state": "exp_avg", "updates": 1}
    assert refusal(lambda: one.put(W, ones, **state)).reason == "TENSOR_MISMATCH"
    # A put replaces it in its own session, where it can be trained then.
    one.put(W, array)
    one.step(1, sgd((W, G)))
    assert np.array_equal(one.get(W), array - ones)
    assert np.array_equal(other.get(W), array)
    put(one, W, array)
    put(other, W, ones)
    assert np.array_equal(one.get(W), array)
    assert np.array_equal(other.get(W), ones)
    one.close()
    other.close()


@pytest.mark.parametrize(
    "fields",
    [
        {"frozen": False},
        {"sha256": bytes(31)},
        {"role": GRADIENT},
        {"zeros": True},
        {"keep_states": True},
        {"state": "exp_avg"},
    ],
    ids=str,
)
def test_wrong_headers_are_named(shared: Shared, fields: dict[str, Any]) -> None:
    array = fresh()
    one = shared.alice.open()
    one.put(W, array)
    error = refusal(lambda: one.put_messages([question(one, W, array, **fields)]))
    assert error.reason == "OPTION_INVALID"
    assert set(error.fields) <= {"header.frozen", "header.sha256"}


def test_a_16_bit_copy_is_shared_too(shared: Shared) -> None:
    array, half = fresh(), dtype_number("bfloat16")
    one, other = shared.alice.open(), shared.alice.open()
    put(one, W, array, compute_dtype=half)
    assert ask(other, W, array, compute_dtype=half)
    one.close()
    problem = whole_numbers(40, 5, 4, "bfloat16")
    problem = type(problem)(problem.x, array.astype(problem.x.dtype), problem.dy)
    y = other.stream(problem, w=kept(W)).arrays["y"]
    assert np.array_equal(y, problem.expected()["y"])


def test_a_session_needs_the_room_that_it_needs_alone(shared: Shared) -> None:
    array = fresh((16, 16))
    one = shared.alice.open(array.nbytes)
    small, full = shared.alice.open(array.nbytes - 1), shared.alice.open(array.nbytes)
    put(one, W, array)
    error = refusal(lambda: small.put_messages([question(small, W, array)]))
    assert error.reason == "SESSION_FULL"
    # Whoever sends elements that are there needs no second room for them.
    assert put(full, W, array) == array.nbytes
    assert full.tensors()[W].sharers == (2 if shared.backend == "numpy" else 1)
    one.close()
    assert np.array_equal(full.get(W), array)


def test_a_running_job_keeps_what_the_last_session_drops(shared: Shared) -> None:
    array = fresh()
    one, other = shared.alice.open(), shared.alice.open()
    put(one, W, array)
    assert ask(other, W, array)
    problem = type(PROBLEM)(PROBLEM.x, array, PROBLEM.dy, ("y",))
    job = problem.job(session=other.ref(), w=kept(W))
    with Stream(other.channel, timeout_s=20) as stream:
        stream.send(job)
        outcome = stream.receive_accepted()
        one.close()
        other.drop(W)
        put(other, V, fresh())
        rows = outcome.accepted.block_rows
        stream.send_all(body(problem, job, rows, MIB))
        stream.half_close()
        y = receive(stream, outcome, problem).arrays["y"]
    assert np.array_equal(y, problem.expected()["y"])
    assert not ask(other, W, array)


def test_workers_that_start_together_send_one_tensor(shared: Shared) -> None:
    array, before = fresh((64, 64)), shared.received()
    sessions = [shared.alice.open() for _ in range(4)]
    begun = time.monotonic()
    with ThreadPoolExecutor(4) as threads:

        def work(session: RawSessions) -> bool:
            there = ask(session, W, array)
            if not there:
                put(session, W, array)
            return there

        assert sorted(threads.map(work, sessions)) == [False, True, True, True]
    assert time.monotonic() - begun < 8  # they are told, not left to wait 10 s
    assert shared.received() - before == array.nbytes
    for session in sessions:
        assert np.array_equal(session.get(W), array)
        session.close()


def test_who_waits_for_a_put_goes_on_when_it_fails(shared: Shared) -> None:
    array, before = fresh(), shared.received()
    one, other, third = (shared.alice.open() for _ in range(3))
    running = Put(one, W, array)
    running.send()
    wait_until(lambda: shared.received() > before, "the first half")
    with ThreadPoolExecutor(2) as threads:
        waiting = threads.submit(ask, other, W, array)
        closed = threads.submit(ask, third, W, array)
        third.close()  # does not wait for the put
        assert refusal(closed.result).reason in {"SESSION_UNKNOWN", "SESSION_EXPIRED"}
        running.cancel()
        assert not waiting.result()
        # The one that was told so is waited for now.
        following = threads.submit(ask, one, W, array)
        put(other, W, array)
        assert following.result()
    assert np.array_equal(one.get(W), array)


def test_equal_puts_at_once_are_both_kept(shared: Shared) -> None:
    array = fresh()
    one, other = shared.alice.open(), shared.alice.open()
    puts = [Put(one, W, array), Put(other, W, array)]
    for running in puts:
        running.send()
    puts[0].end()
    puts[1].end()
    for session in (one, other):
        assert np.array_equal(session.get(W), array)
        assert session.used_bytes == array.nbytes
        assert session.tensors()[W].sharers == (2 if shared.backend == "numpy" else 1)


def test_a_restored_frozen_tensor_is_frozen(shared: Shared, tmp_path: Path) -> None:
    array = fresh()
    one = shared.alice.open()
    put(one, W, array)
    name = f"state-{next(NUMBERS)}"
    one.call("SaveSession", pb2.SaveSessionRequest(session=one.token, name=name))
    one.close()
    again = shared.alice.open(restore=name)
    about = again.tensors()[W]
    assert about.header.frozen
    assert about.sharers == 0
    assert np.array_equal(again.get(W), array)
    again.put(G, np.ones_like(array), role=GRADIENT)
    assert refusal(lambda: again.step(1, sgd((W, G)))).reason == "TENSOR_MISMATCH"


def uses(session: RawSessions, size_bytes: int) -> bool:
    return bool(session.used_bytes == size_bytes)


def test_threads_find_what_they_have_put(shared: Shared) -> None:
    """Random calls of several sessions: each has the elements that it has put."""
    arrays = [fresh((32, 32)) for _ in range(3)]
    begin = threading.Barrier(4)

    def work(seed: int) -> None:
        rng = random.Random(seed)
        begin.wait()
        for _ in range(4):
            session = shared.alice.open(2 * arrays[0].nbytes)
            has: dict[int, np.ndarray] = {}
            for _ in range(8):
                number, array = rng.choice((W, V)), rng.choice(arrays)
                if rng.random() < 0.2:
                    session.drop(number)
                    has.pop(number, None)
                elif number not in has or rng.random() < 0.5:
                    session.drop(number)
                    if not ask(session, number, array):
                        put(session, number, array)
                    has[number] = array
                for each, expected in has.items():
                    assert np.array_equal(session.get(each), expected)
                # Another session may still copy what was dropped here.
                expected_bytes = sum(each.nbytes for each in has.values())
                wait_until(
                    partial(uses, session, expected_bytes), "the memory is released"
                )
            session.close()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    now = shared.scrape()
    assert now.sum("session_used_bytes") == now.sum("session_reserved_bytes") == 0
