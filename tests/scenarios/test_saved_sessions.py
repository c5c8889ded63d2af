"""Training that goes on after its server was killed: with the same bits."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

import gradwire
from tests.support import oracle
from tests.support.credentials import make_tokens
from tests.support.proxy import Fault, Proxy
from tests.support.serving import ServerProcess, running_server

PATIENT = gradwire.RetryPolicy(
    attempts=100, initial_backoff_s=0.02, max_backoff_s=0.2, budget=10_000
)
BIG = (pytest.mark.big, pytest.mark.timeout(400))
"""A server takes seconds to start on a busy machine, 20 times."""

SIZES = (48, 40, 24)
"""Features, hidden units, outputs."""


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("states")


@pytest.fixture(scope="module")
def serving(states: Path) -> Iterator[ServerProcess]:
    with running_server(state_dir=str(states)) as process:
        yield process


@pytest.fixture
def client(serving: ServerProcess) -> Iterator[gradwire.Client]:
    with gradwire.connect(serving.address, timeout_s=60) as connected:
        yield connected


def same(one: Any, other: Any) -> bool:
    return oracle.same_bits(np.asarray(one), np.asarray(other))


class MortalServer:
    """A server that is killed now and then, and started anew at its address."""

    def __init__(self, directory: Path) -> None:
        self._settings: dict[str, Any] = {
            "listen": [f"unix:{directory / 'socket'}"],
            "state_dir": str(directory / "states"),
        }
        self.address = self._settings["listen"][0]
        self._running = ExitStack()
        self._deaths: list[Future[None]] = []
        self._pool = ThreadPoolExecutor(1)
        self._start()

    def __enter__(self) -> MortalServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        self._running.close()

    def _start(self) -> None:
        self._server = self._running.enter_context(running_server(**self._settings))

    def die_after(self, seconds: float) -> None:
        """Be killed after a while, and started again; beside the caller."""
        self._deaths.append(self._pool.submit(self._die, seconds))

    def _die(self, seconds: float) -> None:
        threading.Event().wait(seconds)
        self._server.kill()
        self._running.close()
        self._start()

    def deaths(self) -> int:
        """How often it was killed, and came back."""
        for death in self._deaths:
            death.result(60)
        return len(self._deaths)


def one_step(session: gradwire.Session, number: int) -> None:
    """A step of a network with two layers, on data that depend on its number."""
    rng = np.random.default_rng(number)
    x = rng.standard_normal((64, SIZES[0]), np.float32)
    target = rng.standard_normal((64, SIZES[2]), np.float32)
    first, second = (session.tensors[name] for name in ("first", "second"))
    grads = {each: session.tensors[f"{each.name}.grad"] for each in (first, second)}
    hidden, context = session.forward(x, first, wire_dtype="bfloat16")
    y, context_2 = session.forward(np.maximum(hidden, 0), second)
    d_hidden = session.backward(context_2, (y - target) / 64, into=grads[second])
    session.backward(
        context,
        d_hidden * (hidden > 0),
        into=grads[first],
        dx=False,
        result_dtype={"dw": "float32"},
    )
    session.step(gradwire.AdamW(lr=0.01), grads, max_norm=1.0)


def begin(session: gradwire.Session) -> None:
    """Put the weights of a new run."""
    rng = np.random.default_rng(0)
    for name, shape, compute in (
        ("first", SIZES[:2], "bfloat16"),
        ("second", SIZES[1:], None),
    ):
        w = rng.standard_normal(shape, np.float32)
        weight = session.put(w, name=name, compute_dtype=compute)
        session.tensors[name] = weight
        session.tensors[f"{name}.grad"] = session.zeros_like(weight)


def elements(session: gradwire.Session) -> dict[str, Any]:
    found = {}
    for name in ("first", "second"):
        for state in ("", "exp_avg", "exp_avg_sq"):
            found[name, state] = session.get(session.tensors[name], state=state)
    return found


def train(
    server: MortalServer, steps: int, deaths: dict[int, float], save_every: int
) -> dict[str, Any]:
    """The loop of docs/failing.md, with a server that is killed in given steps."""
    begun = False
    with gradwire.connect(server.address, retries=PATIENT, timeout_s=60) as client:
        while True:
            restore = "run" if begun else None
            try:
                with client.session(
                    "1MiB", restore=restore, save_every=save_every, save_as="run"
                ) as session:
                    if not begun:
                        begin(session)
                        assert session.save_on_server("run") == 0
                        begun = True
                    while session.step_count < steps:
                        if session.step_count in deaths:
                            server.die_after(deaths.pop(session.step_count))
                        one_step(session, session.step_count)
                    return elements(session)
            except gradwire.SessionLostError:
                continue


@pytest.mark.parametrize(
    ("steps", "kills", "save_every"),
    [
        (20, 4, 2),
        pytest.param(100, 20, 1, marks=BIG),
        pytest.param(100, 20, 4, marks=BIG),
    ],
)
def test_a_run_whose_server_is_killed_ends_with_the_same_bits(
    steps: int, kills: int, save_every: int
) -> None:
    rng = np.random.default_rng(steps + save_every)
    when = rng.choice(np.arange(1, steps), kills, replace=False)
    deaths = {int(step): float(rng.uniform(0, 0.02)) for step in when}
    with (
        TemporaryDirectory(prefix="gw-") as directory,
        MortalServer(Path(directory)) as server,
    ):
        expected = train(server, steps, {}, save_every)
        assert server.deaths() == 0
        found = train(server, steps, deaths, save_every)
        assert server.deaths() == kills
    assert not deaths
    for key, array in expected.items():
        assert same(found[key], array), key


def test_a_restored_session_has_its_named_tensors(client: gradwire.Client) -> None:
    with client.session("1MiB") as session:
        begin(session)
        assert session.tensors["first.grad"].name == "first.grad"
        for number in range(3):
            one_step(session, number)
        unnamed = session.put(np.ones(3))
        session.put(np.zeros(3, np.float32), name="twice")
        session.put(np.ones(3, np.float32), name="twice")
        assert session.save_on_server("a") == 3
        expected = elements(session)
        numbers = {each.number for each in session.describe().tensors}
    with client.session("1MiB", restore="a") as session:
        assert session.step_count == 3
        assert set(session.tensors) == {
            "first",
            "first.grad",
            "second",
            "second.grad",
            "twice",
        }
        assert session.tensors["first"].compute_dtype == "bfloat16"
        assert session.tensors["first"].shape == SIZES[:2]
        assert session.tensors["first"].role == "weight"
        assert session.tensors["first.grad"].role == "gradient"
        assert not session.get(session.tensors["twice"]).any()
        for key, array in elements(session).items():
            assert same(array, expected[key]), key
        # A new tensor takes the place of none.
        assert session.put(np.ones(3)).number not in numbers | {unnamed.number}


def test_a_state_is_what_the_file_of_the_client_is(
    client: gradwire.Client, states: Path
) -> None:
    with client.session("1MiB") as session:
        begin(session)
        one_step(session, 0)
        session.save_on_server("a-file")
        expected = elements(session)
        (file,) = states.rglob("a-file.safetensors")
    with client.session("1MiB") as session:
        session.tensors.update(session.restore(file))
        for key, array in elements(session).items():
            assert same(array, expected[key]), key


def test_training_goes_on_after_a_step_that_was_not_saved(tmp_path: Path) -> None:
    x, w, dy = oracle.operands(20, 40, 30)
    with (
        running_server(state_dir=str(tmp_path), file_bytes=1000) as server,
        gradwire.connect(server.address) as client,
        client.session("1MiB", save_every=1, save_as="a") as session,
        client.session("1MiB") as other,
    ):
        weights = []
        for each in (session, other):
            weight = each.put(w)
            pairs = {weight: each.zeros_like(weight)}
            for step in range(3):
                _, context = each.forward(x, weight)
                each.backward(context, dy, into=pairs[weight], dx=False)
                if each is other:
                    each.step(gradwire.SGD(), pairs)
                    continue
                for _ in range(step + 1):  # the same step again saves it, if it can
                    with pytest.raises(gradwire.StateNotSavedError):
                        each.step(gradwire.SGD(), pairs)
            weights.append(each.get(weight))
            assert each.step_count == 3
        assert same(*weights)


def test_a_session_is_described_to_other_clients_of_its_tenant(tmp_path: Path) -> None:
    tokens, text = make_tokens("alice", "bob")
    (tmp_path / "tokens.toml").write_text(text)
    with (
        running_server(auth_tokens=str(tmp_path / "tokens.toml")) as server,
        gradwire.connect(server.address, token=tokens["alice"]) as client,
        gradwire.connect(server.address, token=tokens["alice"]) as operator,
        gradwire.connect(server.address, token=tokens["bob"]) as other,
        client.session("1MiB") as session,
    ):
        begin(session)
        (found,) = operator.sessions()
        time.sleep(0.1)
        assert operator.describe_session(found.id) == session.describe()
        idle_s = operator.sessions()[0].idle_s
        time.sleep(0.1)
        operator.describe_session(found.id)
        # The lease is its client's to renew.
        assert operator.sessions()[0].idle_s >= idle_s + 0.1
        for name in (found.id, "session-x"):
            with pytest.raises(gradwire.SessionLostError):
                other.describe_session(name)
        for call in (
            other.describe_session,
            other.close_session,
            lambda name: other.save_session(name, "a"),
        ):
            with pytest.raises(gradwire.InputError, match="id is '': expected that"):
                call("")


def test_a_session_is_saved_by_another_client(
    client: gradwire.Client, serving: ServerProcess
) -> None:
    with client.session("1MiB", label="to be saved") as session:
        begin(session)
        with gradwire.connect(serving.address) as operator:
            (found,) = (
                each for each in operator.sessions() if each.label == "to be saved"
            )
            assert operator.save_session(found.id, "by-another") == 0
            with pytest.raises(gradwire.SessionLostError):
                operator.save_session("session-x", "by-another")
    with client.session("1MiB", restore="by-another") as session:
        assert "first" in session.tensors


def test_states_are_listed_and_deleted(
    client: gradwire.Client, serving: ServerProcess
) -> None:
    def names() -> list[str]:
        return [each.name for each in client.saved_states()]

    with client.session("1MiB") as session:
        begin(session)
        one_step(session, 0)
        for name in ("listed-1", "listed-2", "listed-3"):
            session.save_on_server(name)
    (state,) = (each for each in client.saved_states() if each.name == "listed-2")
    assert state.step == 1
    assert state.size_bytes > 4 * SIZES[0] * SIZES[1]
    assert 0 <= state.age_s < 60
    client.delete_saved_state("listed-1")
    with pytest.raises(gradwire.StateUnknownError, match="listed-1"):
        client.delete_saved_state("listed-1")
    with pytest.raises(gradwire.InputError, match="name"):
        client.delete_saved_state("a/b")

    async def delete() -> None:
        async with gradwire.AsyncClient(serving.address) as client:
            await client.delete_saved_state("listed-2")
            assert "listed-3" in [each.name for each in await client.saved_states()]

    asyncio.run(delete())
    patient = gradwire.RetryPolicy(initial_backoff_s=0.01, max_backoff_s=0.02)
    with (
        Proxy(serving.address) as proxy,
        gradwire.connect(proxy.address, transport="grpc", retries=patient) as cut,
    ):
        proxy.arm(Fault("responses", cut_after_bytes=20))
        cut.delete_saved_state("listed-3")
        assert proxy.faults == 1
    assert not [name for name in names() if name.startswith("listed")]


def test_what_cannot_be_restored_is_named(client: gradwire.Client) -> None:
    with (
        pytest.raises(gradwire.StateUnknownError, match="none-such"),
        client.session("1MiB", restore="none-such"),
    ):
        pass
    with client.session("1MiB") as session:
        begin(session)
        session.save_on_server("large")
    with (
        pytest.raises(gradwire.SessionFullError, match="large"),
        client.session("1KiB", restore="large"),
    ):
        pass


def test_a_server_without_a_directory_says_so(server: ServerProcess) -> None:
    with gradwire.connect(server.address) as client:
        for options in ({"restore": "a"}, {"save_every": 1, "save_as": "a"}):
            with (
                pytest.raises(gradwire.UnsupportedError, match="state_dir"),
                client.session("1MiB", **options),  # type: ignore[arg-type]
            ):
                pass
        with (
            client.session("1MiB") as session,
            pytest.raises(gradwire.UnsupportedError, match="state_dir"),
        ):
            session.save_on_server("a")
        with pytest.raises(gradwire.UnsupportedError, match="state_dir"):
            client.saved_states()


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"restore": "../x"}, "restore"),
        ({"restore": ""}, "restore"),
        ({"restore": "a" * 65}, "restore"),
        ({"save_every": 1}, "save_as"),
        ({"save_as": "a"}, "save_every"),
        ({"save_every": 0, "save_as": "a"}, "save_every"),
        ({"save_every": True, "save_as": "a"}, "save_every"),
        ({"save_every": 1, "save_as": "a/b"}, "save_as"),
    ],
)
def test_bad_options_are_named(
    client: gradwire.Client, options: dict[str, Any], names: str
) -> None:
    with pytest.raises(gradwire.InputError, match=names):
        client.session("1MiB", **options)


async def test_the_async_session_does_the_same(serving: ServerProcess) -> None:
    w = np.ones((3, 2), np.float32)
    async with gradwire.AsyncClient(serving.address) as client:
        async with client.session("1MiB", save_every=1, save_as="async") as session:
            weight = await session.put(w, name="w")
            gradient = await session.zeros_like(weight)
            _, context = await session.forward(w.T, weight)
            await session.backward(context, np.ones((2, 2)).astype("f"), into=gradient)
            await session.step(gradwire.SGD(lr=1.0), {weight: gradient})
            expected = await session.get(weight)
        async with client.session("1MiB", restore="async") as session:
            assert session.step_count == 1
            assert same(await session.get(session.tensors["w"]), expected)
