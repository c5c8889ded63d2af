"""Sessions where calls break, clients leave, leases end and servers stop."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from gradwire.v1 import session_service_pb2 as pb2
from gradwire_server import Server, Settings
from gradwire_server.api.job_service import IDLE_TRIM_S
from tests.contract.conftest import assert_untroubled
from tests.support.credentials import authorized, make_tokens
from tests.support.observing import resident
from tests.support.proxy import Direction, Fault, Proxy
from tests.support.raw import (
    CallError,
    Problem,
    Stream,
    end,
    matrix_number,
    server_info,
    whole_numbers,
)
from tests.support.serving import ServerProcess, running_server
from tests.support.sessions import (
    GRADIENT,
    MIB,
    SESSION_SERVICE,
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

PROBLEM = whole_numbers(40, 5, 4)
RESULTS = PROBLEM.expected()
DW = RESULTS["dw"]
SHAPE = (5, 4)
W, G, X = 1, 2, 3
OWN = [("grpc.use_local_subchannel_pool", 1)]


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
    session = RawSessions(channel).open()
    session.put(W, PROBLEM.w)
    session.zeros(G, SHAPE)
    yield session
    session.close()


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# Connections that are cut.


@pytest.fixture(params=[12, pytest.param(300, marks=pytest.mark.big)])
def count(request: pytest.FixtureRequest) -> int:
    """In how many places a connection is cut, one after the other."""
    return int(request.param)


def cuts(
    proxy: Proxy, of: Direction, run: Callable[[], None], count: int
) -> Iterator[Fault]:
    """Cut a call's connection: just behind its last message, then at byte positions.

    There are bytes behind the last message too. Those of HTTP/2 alone differ from call
    to call, so that a few of the positions may not be reached.
    """
    proxy.arm(None)
    run()
    size, messages = proxy.bytes[of], proxy.messages[of]
    # All positions, if there are no more bytes than that.
    positions = np.unique(np.linspace(1, size, count - 1).astype(int))
    faults = [Fault(of=of, cut_after_messages=messages)]
    faults += [Fault(of=of, cut_after_bytes=int(each)) for each in positions]
    behind = 0
    for fault in faults:
        before = proxy.faults
        proxy.arm(fault)
        yield fault
        proxy.arm(None)
        behind += proxy.faults > before and proxy.passed == messages
    print(f"{of}: {proxy.faults} cuts in {size} bytes, {behind} behind all messages")
    assert proxy.faults > 2 * len(faults) // 3
    assert behind > 0


def retried(proxy: Proxy, run: Callable[[grpc.Channel], Any]) -> tuple[Any, int]:
    """The result of the first attempt that succeeds, and the attempts."""
    for attempt in range(1, 5):
        try:
            with grpc.insecure_channel(proxy.address, OWN) as channel:
                return run(channel), attempt
        except CallError as error:
            if error.status is not grpc.StatusCode.UNAVAILABLE:
                raise
    raise AssertionError("no attempt succeeded")


@pytest.mark.parametrize("of", ["requests", "responses"])
@pytest.mark.parametrize("way", ["compute", "stream", "shared"])
def test_a_backward_that_is_cut_anywhere_counts_once(
    server, channel, session, way, of, count
) -> None:
    with Proxy(server.address) as proxy, RawRegion(channel, MIB) as region:

        def backward(channel: grpc.Channel) -> Any:
            own = session.over(channel)
            fields = {"x": kept(X, last_use=True), "w": kept(W), "dw": into(G, 0)}
            problem = Problem(PROBLEM.x, PROBLEM.w, PROBLEM.dy, ("dx", "dw"))
            if way == "shared":
                return shared(own, region, problem, **fields)
            return getattr(own, way)(problem, **fields)

        def prepare() -> None:
            session.zeros(G, SHAPE)
            session.compute(PROBLEM, x=sent_and_kept(X))

        prepare()
        repeated = 0
        for fault in cuts(proxy, of, lambda: retried(proxy, backward), count):
            prepare()
            outcome, attempts = retried(proxy, backward)
            repeated += attempts > 1
            np.testing.assert_array_equal(outcome.arrays["dx"], RESULTS["dx"])
            np.testing.assert_array_equal(session.get(G), DW, str(fault))
            if of == "responses" and fault.cut_after_messages:  # the receipt came
                assert [each.again for each in outcome.receipt.applied] == [True]
            wait_until(lambda: session.used_bytes == 2 * DW.nbytes)
        assert repeated > count // 2


@pytest.mark.parametrize("of", ["requests", "responses"])
def test_a_step_that_is_cut_anywhere_is_made_once(server, session, of, count) -> None:
    session.put(W, np.zeros(SHAPE, np.float32))
    steps = [0]
    with Proxy(server.address) as proxy:

        def step(channel: grpc.Channel) -> Any:
            return session.over(channel).step(steps[0], sgd((W, G)))

        def prepared() -> Any:
            steps[0] += 1
            session.compute(PROBLEM, dw=into(G, 0, step=steps[0] - 1))
            return retried(proxy, step)[0]

        for fault in cuts(proxy, of, prepared, count):
            answer = prepared()
            assert session.describe().step == answer.step == steps[0]
            np.testing.assert_array_equal(session.get(W), -steps[0] * DW)
            if of == "responses" and fault.cut_after_messages:  # the answer came
                assert answer.again


@pytest.mark.parametrize("of", ["requests", "responses"])
def test_a_tensor_whose_connection_is_cut_is_there_or_not(
    server, session, of, count
) -> None:
    session.drop(W, G)
    array = np.arange(500, dtype=np.float32)
    with Proxy(server.address) as proxy:

        def put(channel: grpc.Channel) -> Any:
            return session.over(channel).put(9, array)

        for fault in cuts(proxy, of, lambda: retried(proxy, put), count):
            session.drop(9)
            with (
                contextlib.suppress(CallError),
                grpc.insecure_channel(proxy.address, OWN) as own,
            ):
                put(own)
            proxy.arm(None)
            wait_until(lambda: session.used_bytes in {0, array.nbytes})
            if of == "responses" and fault.cut_after_messages:  # the answer came
                assert session.get(9).tobytes() == array.tobytes()
            retried(proxy, put)
            assert session.get(9).tobytes() == array.tobytes()
            # The server may notice the cut of the first attempt after the second.
            wait_until(lambda: session.used_bytes == array.nbytes)


def test_a_repeated_put_needs_no_memory_for_a_second_tensor(server, channel) -> None:
    array = np.arange(1000, dtype=np.float32)
    session = RawSessions(channel).open(array.nbytes)
    key = b"k" * 16
    first = header(array, session=session.token, tensor=9, idempotency_key=key)
    goes_on = threading.Event()

    def half() -> Iterator[Any]:
        yield pb2.PutTensorRequest(header=first)
        yield pb2.PutTensorRequest(chunk=pb2.TensorChunk(index=0, data=bytes(400)))
        goes_on.wait(20)

    with grpc.insecure_channel(server.address, OWN) as own, ThreadPoolExecutor() as do:
        attempt = do.submit(
            lambda: refusal(lambda: session.over(own).put_messages(half()))
        )
        wait_until(lambda: session.used_bytes == array.nbytes)
        assert refusal(lambda: session.put(9, array)).reason == "SESSION_FULL"
        assert session.put(9, array, idempotency_key=key) == array.nbytes
        failure = attempt.result(20)
        assert failure.reason == "JOB_CANCELLED"
        goes_on.set()
    # Now it is there, and no elements are needed.
    assert session.put(9, array, idempotency_key=key) == array.nbytes
    only = session.put_messages([pb2.PutTensorRequest(header=first)])
    assert only.used_bytes == array.nbytes
    assert session.get(9).tobytes() == array.tobytes()
    for key in (b"", b"l" * 16):
        another = refusal(lambda key=key: session.put(9, array, idempotency_key=key))
        assert another.reason == "SESSION_FULL"
    session.drop(9)
    missing = refusal(
        lambda: session.put_messages([pb2.PutTensorRequest(header=first)])
    )
    assert missing.reason == "PAYLOAD_MISSING"
    session.close()


def test_a_gradient_that_is_put_again_keeps_its_contributions(channel) -> None:
    session = RawSessions(channel).open()
    session.put(W, PROBLEM.w)
    fields = {"idempotency_key": b"k" * 16}
    session.zeros(G, PROBLEM.w.shape, **fields)
    session.compute(PROBLEM, dw=into(G, 0))
    session.zeros(G, PROBLEM.w.shape, **fields)
    np.testing.assert_array_equal(session.get(G), DW)
    session.zeros(G, PROBLEM.w.shape, idempotency_key=b"another" * 3)
    assert not session.get(G).any()
    session.close()


# Memory that is given back.


def test_what_repeatable_requests_carry_beside_is_not_held(server, channel) -> None:
    # A field that this version does not know: valid, and not counted by any limit.
    later = pb2.TensorChunk(data=bytes(3_900_000)).SerializeToString()
    calls = 12

    def request(message: Any) -> bytes:
        size = len(later)
        length = bytes(
            [size & 127 | 128, size >> 7 & 127 | 128, size >> 14 & 127 | 128]
        )
        length += bytes([size >> 21])
        return message.SerializeToString() + b"\xc2\x3e" + length + later

    sessions = RawSessions(channel)
    session = sessions.open()
    opened = []

    def open_one(number: int) -> None:
        key = b"%16d" % number
        asked = pb2.OpenSessionRequest(keep_bytes=1, idempotency_key=key)
        answers = [sessions.call("OpenSession", request(asked)) for _ in range(2)]
        assert answers[0] == answers[1]
        opened.append(RawSessions(channel, answers[0].session))

    def put_one(number: int) -> None:
        first = header(
            np.zeros(0, np.float32),
            session=session.token,
            tensor=number + 1,
            idempotency_key=b"%16d" % number,
        )
        carried = pb2.TensorHeader.FromString(request(first))
        session.put_messages([pb2.PutTensorRequest(header=carried)])

    for one in (open_one, put_one):
        one(calls)
        before = resident(server)
        for number in range(calls):
            one(number)
        assert resident(server) - before < calls * len(later) // 3, one.__name__
    for each in (session, *opened):
        each.close()


def test_a_cancelled_put_gives_its_memory_back(server, channel, session) -> None:
    before, logged = session.describe(), len(server.records)
    method = channel.stream_unary(f"/{SESSION_SERVICE}/PutTensor")
    array = np.zeros(1000, np.float32)
    for number in (W, 9):
        came, goes_on = threading.Event(), threading.Event()

        def messages(
            number: int = number,
            came: threading.Event = came,
            goes_on: threading.Event = goes_on,
        ) -> Iterator[bytes]:
            first = header(array, session=session.token, tensor=number)
            yield pb2.PutTensorRequest(header=first).SerializeToString()
            part = pb2.TensorChunk(index=0, data=bytes(400))
            yield pb2.PutTensorRequest(chunk=part).SerializeToString()
            came.set()
            goes_on.wait(20)

        call = method.future(messages())
        came.wait(20)
        wait_until(lambda: session.used_bytes == before.used_bytes + array.nbytes)
        call.cancel()
        goes_on.set()
        wait_until(lambda: session.describe() == before)
    puts = [
        record["reason"]
        for record in server.records[logged:]
        if record.get("method") == "PutTensor" and "reason" in record
    ]
    assert set(puts) == {"JOB_CANCELLED"}


@pytest.mark.parametrize("how", ["cancel", "connection", "refusal"])
def test_a_keeping_job_that_fails_gives_its_memory_back(server, session, how) -> None:
    before = session.describe()
    with (
        Proxy(server.address) as proxy,
        grpc.insecure_channel(proxy.address, OWN) as own,
        Stream(own) as stream,
    ):
        job = PROBLEM.job(
            session=session.ref(),
            x=sent_and_kept(7),
            dy=sent_and_kept(8),
            dw=into(G, 3),
        )
        stream.send(job)
        stream.receive_accepted()
        stream.send_all(PROBLEM.chunks("w", 0, 5))
        stream.send_all(PROBLEM.chunks("x", 0, 20))
        stream.send_all(PROBLEM.chunks("dy", 0, 20))
        kept_bytes = PROBLEM.x.nbytes + PROBLEM.dy.nbytes
        assert session.used_bytes == before.used_bytes + kept_bytes
        assert stream.receive() is not None
        if how == "cancel":
            stream.call.cancel()
        elif how == "connection":
            proxy.cut()
        else:
            stream.send(end(20))
            assert stream.failure().reason == "M_MISMATCH"
        wait_until(lambda: session.describe() == before)


@pytest.mark.parametrize("way", ["compute", "stream"])
def test_a_job_without_memory_to_keep_its_operand_changes_nothing(channel, way) -> None:
    session = RawSessions(channel).open(PROBLEM.x.nbytes + DW.nbytes - 1)
    session.put(W, PROBLEM.w)
    before = session.describe()
    for fields in (
        {"x": sent_and_kept(7)},
        {"dy": sent_and_kept(8), "x": sent_and_kept(7)},
    ):
        failure = refusal(lambda f=fields: getattr(session, way)(PROBLEM, **f))
        assert failure.reason == "SESSION_FULL"
        assert list(failure.fields) == ["keep_bytes"]
        assert session.describe() == before
    session.drop(W)
    session.compute(PROBLEM, x=sent_and_kept(7))
    session.close()


@contextlib.contextmanager
def serving(**settings: Any) -> Iterator[tuple[Server, grpc.Channel]]:
    """A server in this process."""
    server = Server(Settings(listen=("127.0.0.1:0",), backend="numpy", **settings))
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(server.start(), loop).result(10)
        try:
            with grpc.insecure_channel(server.addresses[0]) as channel:
                yield server, channel
        finally:
            asyncio.run_coroutine_threadsafe(server.drain(), loop).result(20)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def test_sessions_leave_nothing_reserved() -> None:
    with serving(grace=1.0) as (server, channel):
        assert server._service is not None
        admission = server._service.admission
        wait_until(lambda: admission.held_bytes == 0)
        for _ in range(10):
            session = RawSessions(channel).open(5 * MIB)
            session.put(W, PROBLEM.w)
            session.zeros(G, SHAPE)
            session.compute(PROBLEM, x=sent_and_kept(X), dw=into(G, 0))
            session.step(1, sgd((W, G), momentum=0.9))
            wait_until(lambda: admission.held_bytes == 5 * MIB)
            session.close()
            wait_until(lambda: admission.held_bytes == 0)
        assert not len(server._service.sessions)


def resident_bytes(pid: int) -> int:
    pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    return int(pages) * 4096


def test_sessions_leave_no_memory_behind(server, channel) -> None:
    array = np.ones(50_000, np.float32)

    def one() -> None:
        session = RawSessions(channel).open(MIB)
        session.put(W, array)
        session.put(G, array, role=GRADIENT)
        session.step(1, sgd((W, G), momentum=0.9))
        session.close()

    for _ in range(50):
        one()
    before = resident_bytes(server.pid)
    for _ in range(150):
        one()
    assert resident_bytes(server.pid) - before < 8 * MIB


@pytest.mark.big
@pytest.mark.parametrize("end", ["closed", "expired"])
def test_a_thousand_sessions_leave_less_than_a_mebibyte(end: str) -> None:
    """What is resident is compared when the server has returned what is free.

    Expired sessions are remembered, up to a number that the first ones reach.
    """
    array = np.ones(20_000, np.float32)
    with running_server(memory_limit=512 * MIB) as server:
        with grpc.insecure_channel(server.address) as channel:

            def sessions(count: int) -> None:
                for number in range(count):
                    lease_s = 1.0 if end == "expired" else 0.0
                    session = RawSessions(channel).open(MIB // 2, lease_seconds=lease_s)
                    session.put(W, array)
                    session.put(G, array, role=GRADIENT)
                    session.step(1, sgd((W, G), momentum=0.9))
                    if end == "closed":
                        session.close()
                    elif number % 200 == 199:
                        time.sleep(2)  # there are at most 256 at once

            def settled_bytes() -> int:
                time.sleep(IDLE_TRIM_S + 2)
                return resident_bytes(server.pid)

            sessions(400 if end == "closed" else 1200)
            before = settled_bytes()
            sessions(1000)
            grown = settled_bytes() - before
            print(f"{grown / 1024:.0f} KiB of {before / MIB:.1f} MiB")
        assert grown < MIB
        assert_untroubled(server)


@pytest.mark.big
def test_a_client_that_is_killed_gives_its_memory_back_with_its_lease() -> None:
    lease_s, late_s = 3.0, []
    with running_server() as server, grpc.insecure_channel(server.address) as channel:
        code = (
            "import gradwire, numpy, sys, threading\n"
            f"client = gradwire.connect({server.address!r}, transport='grpc')\n"
            f"session = client.session(keep=1 << 20, lease_s={lease_s})\n"
            "session.__enter__()\n"
            "w = session.put(numpy.ones((400, 300), numpy.float32))\n"
            "print('ready', flush=True)\n"
            "x = numpy.ones((50, 400), numpy.float32)\n"
            "while True:\n"
            "    session.forward(x, w, keep=False)\n"
        )
        listing = pb2.ListSessionsRequest()
        for _ in range(5):
            with subprocess.Popen(
                [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
            ) as client:
                assert client.stdout is not None
                assert client.stdout.readline() == "ready\n"
                time.sleep(2 * lease_s)  # it renews its lease
                assert RawSessions(channel).call("ListSessions", listing).sessions
                client.kill()
                killed = time.monotonic()
            while RawSessions(channel).call("ListSessions", listing).sessions:
                assert time.monotonic() < killed + lease_s + 5
                time.sleep(0.02)
            late_s.append(time.monotonic() - killed - lease_s)
        print("seconds after the lease:", [f"{each:+.2f}" for each in late_s])
        assert_untroubled(server)


def test_memory_for_sessions_is_refused_when_they_are_opened() -> None:
    with running_server(memory_limit=64 * MIB, keep_limit=20 * MIB) as server:
        with grpc.insecure_channel(server.address) as channel:
            sessions = RawSessions(channel)
            failure = refusal(lambda: sessions.open(21 * MIB))
            assert failure.reason == "JOB_TOO_LARGE"
            assert failure.metadata["limit"] == "keep_limit"
            assert failure.text.endswith(f"keeps at most {20 * MIB} (keep_limit)")
            first = sessions.open(12 * MIB)
            failure = refusal(lambda: sessions.open(9 * MIB))
            assert failure.reason == "BUSY"
            assert failure.metadata["limit"] == "keep_limit"
            assert failure.retry_after_s is not None
            second = sessions.open(8 * MIB)
            first.close()
            third = sessions.open(12 * MIB)
            for each in (second, third):
                each.close()
        assert_untroubled(server)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"memory_limit": 64 * MIB},
        {"memory_limit": 64 * MIB, "keep_limit": 20 * MIB},
        {"memory_limit": 64 * MIB, "keep_limit": 64 * MIB},
        {"keep_limit": 0},
    ],
    ids=str,
)
def test_a_session_may_keep_what_the_server_says(settings: dict[str, int]) -> None:
    with running_server(**settings, session_lease_max=20) as server:
        with grpc.insecure_channel(server.address) as channel:
            sessions, limits = RawSessions(channel), server_info(channel).limits
            most = limits.max_keep_bytes
            assert refusal(lambda: sessions.open(most + 1)).reason == "JOB_TOO_LARGE"
            if most:
                sessions.open(most).close()
            assert most <= settings.get("keep_limit", limits.memory_bytes // 2)
            assert limits.max_sessions == 256
            assert limits.max_lease_seconds == 20
        assert_untroubled(server)


@pytest.mark.parametrize("keep_limit", [None, 60 * MIB])
def test_a_refusal_names_the_settings_that_count(keep_limit: int | None) -> None:
    """Of memory, a part is for sessions."""
    settings = {} if keep_limit is None else {"keep_limit": keep_limit}
    with running_server(memory_limit=64 * MIB, **settings) as server:
        with grpc.insecure_channel(server.address) as channel:
            failure = refusal(lambda: RawSessions(channel).open(60 * MIB))
        assert failure.text.endswith("(keep_limit, memory_limit)")
        assert_untroubled(server)


def test_there_are_at_most_256_sessions(channel) -> None:
    sessions = [RawSessions(channel).open(1) for _ in range(256)]
    failure = refusal(lambda: RawSessions(channel).open(1))
    assert (failure.reason, failure.metadata["limit"]) == ("BUSY", "sessions")
    for each in sessions:
        each.close()
    RawSessions(channel).open(1).close()


# Leases.


def test_a_session_expires_and_says_when_and_by_which_setting(channel) -> None:
    session = RawSessions(channel).open(lease_seconds=2)
    session.put(W, PROBLEM.w)
    for _ in range(3):  # each call renews it
        time.sleep(0.8)
        session.renew()
    time.sleep(2.2)
    for call in (
        session.renew,
        session.describe,
        lambda: session.get(W),
        lambda: session.put(W, PROBLEM.w),
        lambda: session.step(1, sgd((W, G))),
        lambda: session.compute(PROBLEM, w=kept(W)),
    ):
        failure = refusal(call)
        assert failure.reason == "SESSION_EXPIRED"
        assert failure.status is grpc.StatusCode.FAILED_PRECONDITION
        assert "lease_seconds" in failure.text
        assert "after 2 s" in failure.text
        assert re.search(r"that was \d+ s ago", failure.text)
        assert failure.metadata["server_instance"]
    session.close()


def test_a_servers_lease_is_named_and_jobs_keep_a_session_alive() -> None:
    with running_server(session_lease_max=1.0, idle_timeout=20) as server:
        with grpc.insecure_channel(server.address) as channel:
            session = RawSessions(channel).open(lease_seconds=1000)
            assert session.renew().lease_seconds == 1
            session.put(W, PROBLEM.w)
            with Stream(channel) as stream:
                stream.send(PROBLEM.job(session=session.ref(), w=kept(W)))
                outcome = stream.receive_accepted()
                time.sleep(1.5)
                stream.send_all(PROBLEM.chunks("x", 0, 40))
                stream.send_all(PROBLEM.chunks("dy", 0, 40))
                stream.send(end(40))
                stream.half_close()
                stream.receive_results(outcome)
            session.renew()
            time.sleep(1.6)
            failure = refusal(session.renew)
            assert failure.reason == "SESSION_EXPIRED"
            assert "session_lease_max" in failure.text
        assert_untroubled(server)


# Tenants.


def test_a_session_of_another_tenant_is_answered_like_none(tmp_path) -> None:
    tokens, text = make_tokens("one", "other")
    file = tmp_path / "tokens.toml"
    file.write_text(text)
    with running_server(auth_tokens=str(file)) as server:
        with grpc.insecure_channel(server.address) as plain:
            channels = {name: authorized(plain, tokens[name]) for name in tokens}
            session = RawSessions(channels["one"]).open(lease_seconds=1)
            session.put(W, PROBLEM.w)
            for token in (session.token, "x" * len(session.token)):
                foreign = RawSessions(channels["other"], token)
                for call in (
                    foreign.renew,
                    foreign.describe,
                    lambda f=foreign: f.drop(W),
                    lambda f=foreign: f.step(1, sgd((W, G))),
                    lambda f=foreign: f.get(W),
                    lambda f=foreign: f.put(W, PROBLEM.w),
                    lambda f=foreign: f.stream(PROBLEM, w=kept(W)),
                    lambda f=foreign: f.compute(PROBLEM, w=kept(W)),
                ):
                    failure = refusal(call)
                    assert failure.reason == "SESSION_UNKNOWN"
                    assert token not in failure.text
                foreign.close()
            unknown = RawSessions(channels["other"], "x" * len(session.token))
            foreign = RawSessions(channels["other"], session.token)

            def told(failure: CallError) -> tuple[Any, ...]:
                return (
                    failure.status,
                    failure.text,
                    failure.fields,
                    failure.metadata,
                )

            assert told(refusal(foreign.renew)) == told(refusal(unknown.renew))
            key = b"k" * 16
            own, others = (
                RawSessions(channels[name]).open(idempotency_key=key) for name in tokens
            )
            assert own.token != others.token
            assert session.get(W).tobytes() == PROBLEM.w.tobytes()
            time.sleep(2.0)
            assert refusal(session.renew).reason == "SESSION_EXPIRED"
            assert told(refusal(foreign.renew)) == told(refusal(unknown.renew))
            assert session.token not in server.logs
        assert_untroubled(server)


def test_a_tenant_has_a_part_of_the_sessions_or_limits_of_its_own(tmp_path) -> None:
    tokens, text = make_tokens("greedy", "modest", "small", "none")
    text += "[tenants.small]\nkeep-limit = 1000\nmax-sessions = 2\n"
    text += "[tenants.none]\nkeep-limit = 0\n"
    file = tmp_path / "tokens.toml"
    file.write_text(text)

    def told(owner: RawSessions, keep_bytes: int) -> tuple[str, str]:
        failure = refusal(lambda: owner.open(keep_bytes))
        return failure.reason, failure.metadata["limit"]

    settings = {"tenant_keep_limit": 3000, "grace": 0}
    with running_server(auth_tokens=str(file), **settings) as server:
        with grpc.insecure_channel(server.address) as plain:
            greedy, modest, small, none = (
                RawSessions(authorized(plain, tokens[name])) for name in tokens
            )
            for name, owner, most, count in (
                ("greedy", greedy, 3000, 64),
                ("small", small, 1000, 2),
            ):
                limits = server_info(authorized(plain, tokens[name])).limits
                assert (limits.max_keep_bytes, limits.max_sessions) == (most, count)
                assert told(owner, most + 1) == ("JOB_TOO_LARGE", "tenant_keep_limit")
                first = owner.open(most - 1)
                assert told(owner, 2) == ("BUSY", "tenant_keep_limit")
                first.close()
                for _ in range(count):
                    owner.open(1)
                assert told(owner, 1) == ("BUSY", "tenant_max_sessions")
            assert told(none, 1) == ("JOB_TOO_LARGE", "tenant_keep_limit")
            failure = refusal(lambda: small.open(1001))
            assert failure.text.endswith("keeps at most 1000 (tenant_keep_limit)")
            modest.open(3000)
        assert_untroubled(server)


# Closing, stalling, stopping.


def test_closing_waits_for_jobs_and_refuses_others_at_once(channel) -> None:
    session = RawSessions(channel).open()
    session.put(W, PROBLEM.w)
    with Stream(channel) as stream, ThreadPoolExecutor(1) as pool:
        stream.send(PROBLEM.job(session=session.ref(), w=kept(W), x=sent_and_kept(7)))
        outcome = stream.receive_accepted()
        closed = pool.submit(session.close)
        wait_until(lambda: _is_unknown(session))
        assert not closed.done()
        stream.send_all(message for message in PROBLEM.body(8) if not _has_w(message))
        stream.half_close()
        stream.receive_results(outcome)
        closed.result(20)
    for name, array in outcome.arrays.items():
        np.testing.assert_array_equal(array, RESULTS[name])


def _has_w(message: Any) -> bool:
    return bool(message.chunk.matrix == matrix_number("w"))


def _is_unknown(session: RawSessions) -> bool:
    try:
        session.renew()
    except CallError as error:
        return error.reason == "SESSION_UNKNOWN"
    return False


def test_a_stalled_stream_holds_up_the_steps_of_its_own_session_only(
    channel, session
) -> None:
    other = session.open()
    other.put(W, np.zeros(SHAPE, np.float32))
    other.zeros(G, SHAPE)
    session.compute(PROBLEM, dw=into(G, 0))
    with ThreadPoolExecutor(2) as pool:
        with Stream(channel) as stream:
            stream.send(PROBLEM.job(session=session.ref(), w=kept(W)))
            stream.receive_accepted()
            step = pool.submit(session.step, 1, sgd((W, G)))
            # The next job waits for the step, so that steps are not starved.
            late = pool.submit(session.compute, PROBLEM, w=kept(W))
            for number in range(1, 20):
                other.compute(PROBLEM, dw=into(G, 0, step=number - 1))
                other.step(number, sgd((W, G)))
            assert not step.done()
            assert not late.done()
        assert step.result(20).step == 1
        late.result(20)
    np.testing.assert_array_equal(other.get(W), -19 * DW)
    other.close()


def test_chunks_without_elements_are_no_progress() -> None:
    with running_server(idle_timeout=1.0) as server:
        with grpc.insecure_channel(server.address) as channel:
            session = RawSessions(channel).open()
            over = threading.Event()

            def messages() -> Iterator[Any]:
                first = header(PROBLEM.w, session=session.token, tensor=1)
                yield pb2.PutTensorRequest(header=first)
                while not over.wait(0.1):
                    yield pb2.PutTensorRequest(chunk=pb2.TensorChunk())

            try:
                failure = refusal(lambda: session.put_messages(messages()))
            finally:
                over.set()
            assert failure.reason == "CLIENT_IDLE"
        assert_untroubled(server)


def test_a_server_stops_in_time_whatever_its_sessions_do() -> None:
    size = 1 << 22
    with running_server(grace=0.2, memory_limit=1024 * MIB) as server:
        stop = threading.Event()
        with (
            grpc.insecure_channel(server.address) as channel,
            ThreadPoolExecutor(8) as pool,
        ):
            sessions = [RawSessions(channel).open(80 * MIB) for _ in range(3)]
            for each in sessions:
                each.put(W, np.zeros(size, np.float32))
                each.put(G, np.ones(size, np.float32), role=GRADIENT)

            def step(session: RawSessions) -> int:
                number = 0
                with contextlib.suppress(CallError):
                    while not stop.is_set():
                        session.step(number + 1, sgd((W, G)), keep_gradients=True)
                        number += 1
                return number

            def put(session: RawSessions) -> None:
                array = np.zeros(1000, np.float32)

                def messages() -> Iterator[Any]:
                    first = header(array, session=session.token, tensor=9)
                    yield pb2.PutTensorRequest(header=first)
                    stop.wait(20)

                with contextlib.suppress(CallError):
                    session.put_messages(messages())

            def keep(session: RawSessions) -> None:
                with Stream(channel) as stream, contextlib.suppress(CallError):
                    job = PROBLEM.job(session=session.ref(), x=sent_and_kept(8))
                    stream.send(job)
                    stream.receive_accepted()
                    stream.receive()

            tasks = [pool.submit(put, sessions[1]), pool.submit(keep, sessions[2])]
            tasks += [pool.submit(step, each) for each in sessions[:2]]
            time.sleep(0.5)
            begun = time.monotonic()
            server.process.terminate()
            try:
                server.process.wait(10)
            finally:
                stop.set()
            assert time.monotonic() - begun < 8
            assert tasks[2].result(20) > 0
            for task in tasks:
                task.result(20)
        assert server.process.returncode == 0
        assert_untroubled(server)
        assert "Traceback" not in server.logs


@pytest.mark.parametrize("seed", range(3))
def test_memory_is_exact_whatever_calls_do_beside_each_other(server, seed) -> None:
    """Calls of every kind, cancelled or not, on few tensors and little memory."""
    expected = {
        "SESSION_FULL",
        "TENSOR_UNKNOWN",
        "TENSOR_MISMATCH",
        "STEP_CONFLICT",
        "GRADIENT_INCOMPLETE",
        "OPTION_INVALID",  # last_use of a tensor that was put meanwhile
    }
    with grpc.insecure_channel(server.address, OWN) as channel:
        session = RawSessions(channel).open(6 * PROBLEM.x.nbytes)

        def act(number: int) -> set[str]:
            choose = random.Random(100 * seed + number)
            reasons = set()
            with grpc.insecure_channel(server.address, OWN) as own:
                mine = session.over(own)
                for _ in range(60):
                    try:
                        _any_call(mine, own, choose)
                    except CallError as error:
                        reasons.add(error.reason)
            return reasons

        with ThreadPoolExecutor(6) as pool:
            reasons = set().union(*pool.map(act, range(6)))
        assert reasons <= expected

        def is_exact() -> bool:
            described = session.describe()
            early = sum(
                info.size_bytes
                for info in described.tensors
                for position, part in enumerate(info.parts)
                if part != position
            )
            sizes = sum(info.size_bytes for info in described.tensors)
            return bool(described.used_bytes == sizes + early)

        wait_until(is_exact)  # cancelled calls end a moment later
        session.drop(*range(1, 10))
        assert session.used_bytes == 0
        session.put(1, np.zeros(6 * PROBLEM.x.size, np.float32))
        session.close()


def _any_call(
    session: RawSessions, channel: grpc.Channel, choose: random.Random
) -> None:
    number, step = choose.randint(1, 4), session.renew().step
    fields: dict[str, Any] = {}
    if choose.random() < 0.5:
        last = choose.random() < 0.3
        fields["x"] = choose.choice(
            [kept(number, last_use=last), sent_and_kept(number)]
        )
    if choose.random() < 0.5 or not fields:
        part = choose.choice([None, 0, 1, 2])
        fields["dw"] = into(choose.randint(5, 6), part, step=step)
    match choose.randrange(10):
        case 0:
            session.drop(number, choose.randint(5, 7))
        case 1:
            session.zeros(choose.randint(5, 6), SHAPE)
        case 2:
            session.put(7, PROBLEM.w)
        case 3:
            session.get(choose.randint(1, 7))
        case 4:
            adam = pb2.Adam(lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8)
            group = pb2.ParameterGroup(
                parameters=[pb2.Parameter(weight=7, gradient=5)], adam=adam
            )
            session.step(step + 1, choose.choice([group, sgd((7, 5), momentum=0.5)]))
        case 5:
            with Stream(channel) as stream:  # cancelled somewhere
                stream.send(PROBLEM.job(session=session.ref(), **fields))
                with contextlib.suppress(CallError):
                    stream.receive_accepted()
                    stream.send_all(PROBLEM.chunks("w", 0, 5))
        case 6:
            first = header(PROBLEM.x, session=session.token, tensor=number)
            method = channel.stream_unary(f"/{SESSION_SERVICE}/PutTensor")
            message = pb2.PutTensorRequest(header=first).SerializeToString()
            method.future(iter([message])).cancel()
        case 7 | 8:
            session.compute(PROBLEM, **fields)
        case _:
            session.stream(PROBLEM, **fields)
