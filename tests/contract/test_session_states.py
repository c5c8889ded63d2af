"""States of sessions that a server saves, and that the next one restores."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from grpc import StatusCode

from gradwire.v1 import session_service_pb2 as pb2
from tests.contract.conftest import assert_untroubled
from tests.support.credentials import authorized, make_tokens
from tests.support.raw import DTYPES, CallError, dtype_number, whole_numbers
from tests.support.serving import ServerProcess, running_server
from tests.support.sessions import (
    GRADIENT,
    MIB,
    RawSessions,
    into,
    kept,
    refusal,
    sent_and_kept,
    sgd,
)

PROBLEM = whole_numbers(40, 5, 4)
DW = PROBLEM.expected()["dw"]
SHAPE = (5, 4)
W, G, X = 1, 2, 3


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("states")


@pytest.fixture(scope="module")
def server(directory: Path) -> Iterator[ServerProcess]:
    with running_server(state_dir=str(directory)) as process:
        yield process
        assert_untroubled(process)


@pytest.fixture
def plain() -> Iterator[ServerProcess]:
    """A server without a directory."""
    with running_server() as process:
        yield process


@pytest.fixture(scope="module")
def sessions(server: ServerProcess) -> Iterator[RawSessions]:
    with grpc.insecure_channel(server.address) as channel:
        yield RawSessions(channel)


@contextmanager
def serving(directory: Path, **settings: Any) -> Iterator[RawSessions]:
    # Without a grace period: nobody closes the sessions.
    with (
        running_server(state_dir=str(directory), grace=0, **settings) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        yield RawSessions(channel)


def opened(
    sessions: RawSessions, restore: str = "", keep_bytes: int = MIB, **fields: Any
) -> tuple[RawSessions, Any]:
    request = pb2.OpenSessionRequest(keep_bytes=keep_bytes, restore=restore, **fields)
    answer = sessions.call("OpenSession", request)
    return RawSessions(sessions.channel, answer.session), answer


def save(own: RawSessions, name: str, **fields: Any) -> Any:
    fields = {"session": own.token} | fields
    return own.call("SaveSession", pb2.SaveSessionRequest(name=name, **fields))


def files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def contents(session: RawSessions) -> dict[tuple[int, str], bytes]:
    """The bits of every tensor, and of every state."""
    found = {}
    for number, info in session.tensors().items():
        for state in ("", *info.states):
            found[number, state] = session.get(number, state=state).tobytes()
    return found


def train(session: RawSessions, first: int, last: int, **fields: Any) -> Any:
    """Make steps, each with one contribution to G."""
    for step in range(first, last + 1):
        session.compute(PROBLEM, dw=into(G, 0, step=step - 1))
        answer = session.step(step, sgd((W, G), lr=0.1, momentum=0.9), **fields)
    return answer


def begun(sessions: RawSessions, **fields: Any) -> RawSessions:
    session, _ = opened(sessions, **fields)
    session.put(W, PROBLEM.w, name="w")
    session.zeros(G, SHAPE, name="w.grad")
    return session


def random_bits(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    size = int(np.prod(shape)) * DTYPES[dtype].itemsize
    data = np.random.default_rng(7).bytes(size)
    return np.frombuffer(data, DTYPES[dtype]).reshape(shape)


# What is saved and restored.


def test_a_server_lists_the_feature_exactly_with_a_directory(
    sessions: RawSessions, plain: ServerProcess
) -> None:
    session, _ = opened(sessions, required_features=["session-state"])
    session.close()
    with grpc.insecure_channel(plain.address) as channel:
        without = RawSessions(channel)
        failure = refusal(lambda: opened(without, required_features=["session-state"]))
        assert failure.reason == "FEATURE_UNKNOWN"
        for field, value in (
            ("restore", "a"),
            ("save_every_steps", 1),
            ("save_name", "a"),
        ):
            failure = refusal(lambda f=field, v=value: opened(without, **{f: v}))
            assert (failure.reason, list(failure.fields)) == (
                "FEATURE_UNKNOWN",
                [field],
            )
        session, _ = opened(without)
        failure = refusal(lambda: save(session, "a"))
        assert failure.reason == "FEATURE_UNKNOWN"
        assert "state_dir" in failure.text
        session.close()


def test_every_tensor_comes_back_with_its_bits_and_its_properties(
    sessions: RawSessions, directory: Path
) -> None:
    session, _ = opened(sessions)
    number = 0
    for dtype in DTYPES:
        for shape in [(), (0,), (7,), (3, 0, 2), (2, 3, 4), (1,) * 8]:
            number += 1
            session.put(number, random_bits(dtype, shape), name=f"{dtype}/{shape}")
    for compute in ("float16", "bfloat16"):
        number += 1
        array = np.random.default_rng(number).standard_normal((9, 5))
        fields = {"compute_dtype": dtype_number(compute), "name": compute}
        session.put(number, array.astype(np.float32), **fields)
        moments = random_bits("float32", (9, 5))
        session.put(number, moments, state="exp_avg", updates=9)
        session.put(number, moments, state="exp_avg_sq", updates=9)
    # Names that are no names, or those of others, or look like numbers.
    for name in ("", "", "same", "same", "#1", 'crc32":"'):
        number += 3
        session.put(number, np.full((2,), number, np.float32), name=name)
    session.zeros(4_000_000_000, (3, 2), name="a gradient")
    session.put(77, np.ones(3, np.float32), role=GRADIENT)
    answer = save(session, "Every.thing_1-")
    (file,) = files(directory)
    assert (answer.step, answer.size_bytes) == (0, file.stat().st_size)

    before, bits = session.describe(), contents(session)
    restored, answer = opened(sessions, "Every.thing_1-")
    after = restored.describe()
    # What was put in a gradient belongs to the step that was not made.
    bits[77, ""] = bytes(12)
    assert contents(restored) == bits
    assert after.tensors == before.tensors
    assert (after.step, after.used_bytes) == (0, before.used_bytes)

    # The package opens the file, and finds the same bits.
    with safetensors.safe_open(file, framework="numpy") as opened_file:
        assert opened_file.metadata()["step"] == "0"
        for dtype in DTYPES:
            if dtype == "bfloat16" and not hasattr(np, "bfloat16"):
                continue
            key = f"model/{dtype}/(2, 3, 4)"
            found = opened_file.get_tensor(key)
            assert found.tobytes() == random_bits(dtype, (2, 3, 4)).tobytes()
        assert "exp_avg_sq/bfloat16" in opened_file.keys()  # noqa: SIM118
    deserialized = dict(safetensors.deserialize(file.read_bytes()))
    tensor = deserialized["model/bfloat16/(2, 3, 4)"]
    assert tensor["dtype"] == "BF16"
    assert bytes(tensor["data"]) == random_bits("bfloat16", (2, 3, 4)).tobytes()
    for each in (session, restored):
        each.close()


def test_a_restored_copy_for_jobs_is_the_weight_rounded(sessions: RawSessions) -> None:
    w = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    session, _ = opened(sessions)
    session.put(W, w, compute_dtype=dtype_number("bfloat16"))
    save(session, "copy")
    restored, _ = opened(sessions, "copy")
    problem = whole_numbers(6, 5, 4, "bfloat16", ("y",))
    for each in (session, restored):
        y = each.compute(problem, w=kept(W)).arrays["y"]
        rounded = w.astype(ml_dtypes.bfloat16).astype(np.float64)
        expected = (problem.x.astype(np.float64) @ rounded).astype(ml_dtypes.bfloat16)
        assert y.tobytes() == expected.tobytes()
        each.close()


def test_the_steps_go_on_with_the_same_bits(sessions: RawSessions) -> None:
    session = begun(sessions)
    train(session, 1, 3)
    # Neither belongs to the state after step 3.
    session.compute(PROBLEM, x=sent_and_kept(X), dw=into(G, 0, step=3))
    assert save(session, "going-on").step == 3
    train(session, 4, 6)
    restored, answer = opened(sessions, "going-on")
    assert answer.step == restored.renew().step == restored.describe().step == 3
    assert set(restored.tensors()) == {W, G}
    assert not restored.get(G).any()
    failure = refusal(lambda: train(restored, 3, 3))
    assert failure.reason == "STEP_CONFLICT"
    train(restored, 4, 6)
    assert contents(restored) == contents(session)
    assert restored.tensors()[W].updates == 6
    for each in (session, restored):
        each.close()


def test_sums_that_a_step_keeps_are_saved(sessions: RawSessions) -> None:
    session = begun(sessions, save_every_steps=1, save_name="sums")
    train(session, 1, 2, keep_gradients=True)
    restored, _ = opened(sessions, "sums")
    np.testing.assert_array_equal(restored.get(G), 2 * DW)
    save(restored, "sums-again")
    again, _ = opened(sessions, "sums-again")
    np.testing.assert_array_equal(again.get(G), 2 * DW)
    again.close()
    for each in (session, restored):
        train(each, 3, 3)
    assert contents(restored) == contents(session)
    train(session, 4, 4, keep_gradients=True)
    session.compute(PROBLEM, dw=into(G, 0, step=4))
    failure = refusal(lambda: save(session, "sums"))
    assert failure.reason == "STATE_NOT_SAVED"
    for each in (session, restored):
        each.close()


def test_a_step_that_is_due_is_saved_before_it_is_answered(
    sessions: RawSessions,
) -> None:
    session = begun(sessions, save_every_steps=3, save_name="due")
    saved = []
    for step in range(1, 8):
        train(session, step, step)
        try:
            other, answer = opened(sessions, "due")
        except CallError as error:
            assert error.reason == "STATE_UNKNOWN"  # noqa: PT017
            saved.append(None)
        else:
            saved.append(answer.step)
            other.close()
    assert saved == [None, None, 3, 3, 3, 6, 6]
    session.close()


def test_a_server_that_drains_saves_steps_and_lets_sessions_be_fetched(
    tmp_path: Path,
) -> None:
    with (
        running_server(state_dir=str(tmp_path), grace=30.0) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        sessions = RawSessions(channel)
        saved = begun(sessions, save_every_steps=100, save_name="saved")
        unsaved, new = begun(sessions), begun(sessions)
        for session in (saved, unsaved):
            train(session, 1, 3)
            session.compute(PROBLEM, dw=into(G, 0, step=3))
        opened(sessions, save_every_steps=1, save_name="untouched")
        server.process.terminate()
        server.wait_for_log("draining")
        for call in (
            sessions.open,
            lambda: unsaved.put(X, PROBLEM.x),
            lambda: unsaved.compute(PROBLEM, w=kept(W)),
        ):
            assert refusal(call).reason == "DRAINING"
        momentum = sgd((W, G), lr=0.1, momentum=0.9)
        for session in (saved, unsaved):
            session.step(4, momentum)
            session.renew()
        expected = contents(unsaved)
        assert contents(saved) == expected
        save(unsaved, "by-hand")
        new.drop(W)
        new.close()
        assert server.process.poll() is None
        unsaved.close()
        server.process.wait(15)  # `saved` and `untouched` are not waited for
        assert server.process.returncode == 0
        assert_untroubled(server)
    with serving(tmp_path) as sessions:
        for name in ("saved", "by-hand"):
            session, answer = opened(sessions, name)
            assert answer.step == 4
            assert contents(session) == expected
        assert refusal(lambda: opened(sessions, "untouched")).reason == "STATE_UNKNOWN"


def test_a_session_that_a_draining_server_cannot_save_is_named_in_the_log(
    tmp_path: Path,
) -> None:
    with (
        running_server(state_dir=str(tmp_path), grace=0.5) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        session = begun(RawSessions(channel), save_every_steps=100, save_name="a")
        train(session, 1, 1)
        (tmp_path / "tenant-" / "a.safetensors").mkdir(parents=True)  # in the way
        server.process.terminate()
        server.process.wait(15)
        (told,) = [r for r in server.records if "was not saved" in r["message"]]
        assert told["levelname"] == "ERROR"
        assert told["session"].startswith("session-")
        assert told["step"] == 1
        assert told["cause"]
        (ended,) = [r for r in server.records if "ended with the" in r["message"]]
        assert (ended["session"], ended["step"]) == (told["session"], 1)
        serving = server.wait_for_log("state_dir")
        assert serving["state_dir"] == str(tmp_path)


def test_sessions_whose_last_step_is_saved_end_without_a_warning(
    tmp_path: Path,
) -> None:
    with (
        running_server(state_dir=str(tmp_path), grace=0.2) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        sessions = RawSessions(channel)
        saved = begun(sessions, save_every_steps=9, save_name="a")
        by_hand = begun(sessions)
        begun(sessions)  # has made no step
        for session in (saved, by_hand):
            train(session, 1, 1)
        save(by_hand, "b")
        server.process.terminate()
        server.process.wait(15)
        assert not [r for r in server.records if "ended with the" in r["message"]]


def test_no_state_is_half_of_a_step(sessions: RawSessions) -> None:
    session, _ = opened(sessions, keep_bytes=16 * MIB)
    count = 500_000
    session.put(W, np.zeros(count, np.float32))
    ones, going = np.ones(count, np.float32), threading.Event()

    def step_on() -> int:
        step = 0
        while not going.is_set():
            step += 1
            session.put(G, ones, role=GRADIENT)
            session.step(step, sgd((W, G)))
        return step

    with ThreadPoolExecutor(1) as pool:
        steps = pool.submit(step_on)
        saved = [save(session, f"torn-{index}").step for index in range(25)]
        going.set()
        assert steps.result(20) >= saved[-1]
    assert len(set(saved)) > 5
    for index, step in enumerate(saved):
        restored, answer = opened(sessions, f"torn-{index}", keep_bytes=16 * MIB)
        assert answer.step == step
        assert (restored.get(W) == -step).all()
        restored.close()
    session.close()


def test_a_session_is_saved_by_its_name_for_people(sessions: RawSessions) -> None:
    session, answer = opened(sessions)
    session.put(W, PROBLEM.w)
    save(session, "by-id", session="", id=answer.id)
    restored, _ = opened(sessions, "by-id")
    assert restored.get(W).tobytes() == PROBLEM.w.tobytes()
    for each in (session, restored):
        each.close()
    for fields in ({"id": answer.id}, {"id": "session-x"}, {}):
        failure = refusal(
            lambda f=fields: save(session, "by-id", **({"session": ""} | f))
        )
        assert failure.reason == "SESSION_UNKNOWN"


# What is refused.

BAD_NAMES = ["", ".", "..", "../x", "a/b", "/etc/x", "a" * 65, "a\0", "a b", "é", "a\n"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_is_no_path(sessions: RawSessions, directory: Path, name: str) -> None:
    session, _ = opened(sessions)
    session.put(W, PROBLEM.w)
    before = {path: path.stat().st_mtime_ns for path in directory.parent.rglob("*")}
    if name in {".", ".."}:
        # With the suffix of the files, these are names like others.
        there = set(files(directory))
        save(session, name)
        restored, _ = opened(sessions, name)
        restored.close()
        (file,) = set(files(directory)) - there
        assert file.parent.parent == directory
        file.unlink()
        session.close()
        return
    failure = refusal(lambda: save(session, name))
    assert (failure.status, failure.reason, list(failure.fields)) == (
        StatusCode.INVALID_ARGUMENT,
        "OPTION_INVALID",
        ["name"],
    )
    if name:
        failure = refusal(lambda: opened(sessions, name))
        assert (failure.reason, list(failure.fields)) == ("OPTION_INVALID", ["restore"])
        fields = {"save_name": name, "save_every_steps": 1}
        failure = refusal(lambda: opened(sessions, **fields))
        assert list(failure.fields) == ["save_name"]
    after = {path: path.stat().st_mtime_ns for path in directory.parent.rglob("*")}
    assert after == before
    session.close()


def test_requests_that_are_repeated_at_once_restore_one_session(
    sessions: RawSessions,
) -> None:
    session = begun(sessions)
    save(session, "once")
    session.close()
    with ThreadPoolExecutor(8) as threads:

        def restore(_: int) -> str:
            return opened(sessions, "once", idempotency_key=b"k" * 64)[0].token

        (token,) = set(threads.map(restore, range(8)))
    restored = RawSessions(sessions.channel, token)
    assert restored.get(W).tobytes() == PROBLEM.w.tobytes()
    restored.close()


def test_a_wrong_request_opens_no_session(sessions: RawSessions) -> None:
    def listed() -> list[str]:
        found = sessions.call("ListSessions", pb2.ListSessionsRequest())
        return [each.id for each in found.sessions]

    session = begun(sessions)
    save(session, "small")
    session.close()
    before = listed()
    for fields, reason, field in (
        ({"restore": "none"}, "STATE_UNKNOWN", "restore"),
        ({"save_every_steps": 1}, "OPTION_INVALID", "save_name"),
        ({"save_name": "a"}, "OPTION_INVALID", "save_every_steps"),
        ({"restore": "small", "keep_bytes": 159}, "SESSION_FULL", "keep_bytes"),
    ):
        failure = refusal(lambda f=fields: opened(sessions, **f))
        assert (failure.reason, list(failure.fields)) == (reason, [field])
    assert listed() == before
    session, _ = opened(sessions, "small", 160)
    assert session.used_bytes == 160
    session.close()


def test_a_damaged_file_is_refused_whole(tmp_path: Path) -> None:
    with serving(tmp_path) as sessions:
        session = begun(sessions)
        train(session, 1, 2)
        save(session, "a")
        (file,) = files(tmp_path)
        good = file.read_bytes()
        length = int.from_bytes(good[:8], "little")
        damaged = [good[:at] for at in (0, 7, 8, 40, 8 + length, len(good) - 1)]
        damaged += [good + b"\0", b"\xff" * 8 + good[8:], bytes(1000)]
        for at in np.linspace(0, len(good) - 1, 60).astype(int):
            flipped = bytearray(good)
            flipped[at] ^= 1 << int(at) % 8
            damaged.append(bytes(flipped))
        # Of the package, but not of a session; and of formulas to come.
        damaged.append(safetensors.numpy.save({"model/w": PROBLEM.w}))
        damaged.append(good.replace(b'"gradwire.v1"', b'"gradwire.v2"'))
        for data in damaged:
            file.write_bytes(data)
            failure = refusal(lambda: opened(sessions, "a"))
            assert (failure.reason, list(failure.fields)) == (
                "STATE_INVALID",
                ["restore"],
            )
            assert str(tmp_path) not in failure.text
        assert "gradwire.v2" in failure.text
        listed = sessions.call("ListSessions", pb2.ListSessionsRequest())
        assert len(listed.sessions) == 1
        file.write_bytes(good)
        restored, _ = opened(sessions, "a")
        assert contents(restored) == contents(session)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with serving(tmp_path) as sessions:
        session = begun(sessions)
        save(session, "a")
        (file,) = files(tmp_path)
        elsewhere = tmp_path / "elsewhere"
        file.rename(elsewhere)
        for make in (
            lambda: file.symlink_to(elsewhere),
            lambda: os.mkfifo(file),
            file.mkdir,
        ):
            make()
            assert refusal(lambda: opened(sessions, "a")).reason == "STATE_INVALID"
            file.rmdir() if file.is_dir() and not file.is_symlink() else file.unlink()


def test_files_are_for_the_servers_user_alone(tmp_path: Path) -> None:
    directory = tmp_path / "not" / "there"
    with serving(directory) as sessions:
        save(begun(sessions), "a")
    (file,) = files(directory)
    assert file.stat().st_mode & 0o777 == 0o600
    for folder in (file.parent, directory):
        assert folder.stat().st_mode & 0o777 == 0o700


def listed(sessions: RawSessions) -> dict[str, Any]:
    answer = sessions.call("ListSavedStates", pb2.ListSavedStatesRequest())
    assert [each.name for each in answer.states] == sorted(
        each.name for each in answer.states
    )
    return {each.name: each for each in answer.states}


def delete(sessions: RawSessions, name: str) -> None:
    sessions.call("DeleteSavedState", pb2.DeleteSavedStateRequest(name=name))


def test_states_are_listed_and_deleted(tmp_path: Path) -> None:
    with serving(tmp_path) as sessions:
        assert not listed(sessions)
        session = begun(sessions, save_every_steps=2, save_name="due")
        train(session, 1, 2)
        size = save(session, "b.c").size_bytes
        save(session, "a")
        (damaged,) = tmp_path.rglob("a.safetensors")
        damaged.write_bytes(b"no state")
        (damaged.parent / "a note").write_text("no state either")
        found = listed(sessions)
        assert {name: each.size_bytes for name, each in found.items()} == {
            "a": 8,
            "b.c": size,
            "due": size,
        }
        assert [each.HasField("step") for each in found.values()] == [False, True, True]
        assert found["due"].step == 2
        assert 0 <= found["due"].age_seconds < 60
        for name in ("b", "b-c", ".", "..", "...", "-rf", "b.safetensors"):
            save(session, name)
        found = listed(sessions)
        assert len(found) == 10
        for name in found:
            delete(sessions, name)
            assert refusal(lambda n=name: delete(sessions, n)).reason == "STATE_UNKNOWN"
        assert not listed(sessions)
        assert [path.name for path in files(tmp_path)] == ["a note"]
        for name in ("", "../a", "a/b"):
            failure = refusal(lambda n=name: delete(sessions, n))
            assert (failure.reason, *failure.fields) == ("OPTION_INVALID", "name")
        # The session goes on, and a repetition of the step that was saved saves again.
        train(session, 3, 3)
        assert not listed(sessions)
        train(session, 4, 4)
        delete(sessions, "due")
        again = session.step(4, sgd((W, G), lr=0.1, momentum=0.9))
        assert again.again
        assert listed(sessions)["due"].step == 4


def test_a_tenant_has_its_own_states(tmp_path: Path) -> None:
    tenants = ["alice", "Alice", "../alice", "a/b", "/" * 128, "a%2fb"]
    tokens, text = make_tokens(*tenants)
    (tmp_path / "tokens.toml").write_text(text)
    directory = tmp_path / "states"
    with serving(directory, auth_tokens=str(tmp_path / "tokens.toml")) as plain:
        owners = {
            tenant: RawSessions(authorized(plain.channel, tokens[tenant]))
            for tenant in tenants
        }
        for index, owner in enumerate(owners.values()):
            failure = refusal(lambda o=owner: opened(o, "run"))
            assert failure.reason == "STATE_UNKNOWN"
            session, _ = opened(owner)
            session.put(W, np.full(SHAPE, index, np.float32))
            save(session, "run")
        for index, owner in enumerate(owners.values()):
            restored, _ = opened(owner, "run")
            assert (restored.get(W) == index).all()
        owners["alice"].call(
            "DeleteSavedState", pb2.DeleteSavedStateRequest(name="run")
        )
        for tenant, owner in owners.items():
            assert list(listed(owner)) == ([] if tenant == "alice" else ["run"])
        # Whoever knows a session's names cannot have it saved.
        session, answer = opened(owners["alice"])
        other = RawSessions(owners["a/b"].channel, session.token)
        for fields in ({}, {"session": "", "id": answer.id}):
            failure = refusal(lambda f=fields: save(other, "b", **f))
            assert failure.reason == "SESSION_UNKNOWN"
    folders = {path.name.casefold() for path in directory.iterdir()}
    assert len(folders) == len(tenants)
    assert all(path.parent.parent == directory for path in files(directory))


# Saving that fails.


def test_a_full_disk_leaves_the_earlier_state(tmp_path: Path) -> None:
    with serving(tmp_path, file_bytes=256 * 1024) as sessions:
        session = begun(sessions, save_every_steps=1, save_name="a")
        train(session, 1, 1)
        (file,) = files(tmp_path)
        before = file.read_bytes()
        session.put(9, np.ones(100_000, np.float32))
        session.compute(PROBLEM, dw=into(G, 0, step=1))
        group = sgd((W, G), lr=0.1, momentum=0.9)
        for _ in range(2):
            failure = refusal(lambda: session.step(2, group))
            assert failure.reason == "STATE_NOT_SAVED"
            assert failure.status is StatusCode.RESOURCE_EXHAUSTED
            assert failure.retry_after_s is None
            assert os.strerror(27) in failure.text
        assert refusal(lambda: save(session, "b")).reason == "STATE_NOT_SAVED"
        assert files(tmp_path) == [file]
        assert file.read_bytes() == before
        # The step was made; the same request saves it as soon as there is room.
        assert session.renew().step == 2
        session.drop(9)
        answer = session.step(2, group)
        assert (answer.step, answer.again) == (2, True)
        restored, answer = opened(sessions, "a")
        assert answer.step == 2
        assert contents(restored) == contents(session)


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    with serving(tmp_path) as sessions:
        session = begun(sessions)
        folder = tmp_path / "tenant-"
        folder.write_text("in the way")
        failure = refusal(lambda: save(session, "a"))
        assert failure.reason == "STATE_NOT_SAVED"
        assert str(tmp_path) not in failure.text
        folder.unlink()
        save(session, "a")


def test_a_server_that_is_killed_before_the_rename_leaves_the_earlier_state(
    tmp_path: Path,
) -> None:
    with serving(tmp_path, dies_at_rename=3) as sessions:
        session = begun(sessions, save_every_steps=1, save_name="a")
        train(session, 1, 2)
        expected = contents(session)
        failure = refusal(lambda: train(session, 3, 3))
        assert failure.status is StatusCode.UNAVAILABLE
    assert len(files(tmp_path)) == 2  # the state, and what was not renamed
    with serving(tmp_path) as sessions:
        restored, answer = opened(sessions, "a", save_every_steps=1, save_name="a")
        assert answer.step == 2
        assert contents(restored) == expected
        train(restored, 3, 3)
        assert len(files(tmp_path)) == 1
        again, answer = opened(sessions, "a")
        assert answer.step == 3
        assert contents(again) == contents(restored)


def test_a_tenant_has_64_states(tmp_path: Path) -> None:
    with serving(tmp_path) as sessions:
        session = begun(sessions)
        for index in range(64):
            save(session, f"run-{index}")
        failure = refusal(lambda: save(session, "one-more"))
        assert failure.reason == "STATE_NOT_SAVED"
        assert "64" in failure.text
        save(session, "run-0")
    assert len(files(tmp_path)) == 64


def test_sessions_that_save_under_one_name_do_not_mix(tmp_path: Path) -> None:
    with serving(tmp_path) as sessions:
        own = []
        for index in range(4):
            session, _ = opened(sessions, keep_bytes=4 * MIB)
            for number in range(1, 5):
                session.put(number, np.full(100_000 + index, index, np.float32))
            own.append(session)
        with ThreadPoolExecutor(4) as pool:
            for _ in range(10):
                list(pool.map(lambda each: save(each, "one"), own))
                restored, _ = opened(sessions, "one", keep_bytes=4 * MIB)
                tensors = [restored.get(number) for number in range(1, 5)]
                assert len({each.tobytes() for each in tensors}) == 1
                restored.close()
    assert len(files(tmp_path)) == 1


def test_a_directory_that_cannot_be_used_is_told_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(RuntimeError, match=r"state_dir is .*/file"),
        running_server(state_dir=str(tmp_path / "file")),
    ):
        pass


def test_a_call_that_is_cancelled_while_it_saves_leaves_the_earlier_state(
    tmp_path: Path,
) -> None:
    with serving(tmp_path, memory_limit=512 * MIB) as sessions:
        session, _ = opened(sessions, keep_bytes=80 * MIB)
        session.put(W, PROBLEM.w)
        save(session, "a")
        (file,) = files(tmp_path)
        before = hashlib.sha256(file.read_bytes()).digest()
        session.put(W, np.ones(70 * MIB // 4, np.float32))
        request = pb2.SaveSessionRequest(session=session.token, name="a")
        failure = refusal(lambda: session.call("SaveSession", request, timeout_s=0.01))
        assert failure.status is StatusCode.DEADLINE_EXCEEDED
        # The session can be used once its turn is given back.
        save(session, "b")
        after = hashlib.sha256(file.read_bytes()).digest()
        assert len(files(tmp_path)) == 2
        if after != before:  # it was saved before the deadline was seen
            restored, _ = opened(sessions, "a", keep_bytes=80 * MIB)
            assert restored.get(W).all()
