"""One client of several servers: jobs are spread, and go on without the dead."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradwire
from tests.cli.conftest import gradwire as gradwire_command
from tests.scenarios.test_threads_and_forks import run_script
from tests.support import oracle
from tests.support.serving import ServerProcess, running_server

X, W, DY = oracle.operands(400, 30, 20)
SOON = gradwire.RetryPolicy(initial_backoff_s=0.02, max_backoff_s=0.2)


class Sync:
    """A client of several servers."""

    def __init__(self, addresses: Any, **options: Any) -> None:
        self.client: Any = gradwire.connect(
            addresses, **({"timeout_s": 60, "retries": SOON} | options)
        )

    def run(self, called: Any) -> Any:
        return called

    def stream(self, rows: Any, *args: Any, **options: Any) -> Any:
        with self.client.stream(rows, *args, **options) as stream:
            list(stream)
        return stream.receipt

    def close(self) -> None:
        self.client.close()


class Async(Sync):
    """The same for asyncio."""

    def __init__(self, addresses: Any, **options: Any) -> None:
        self._runner = asyncio.Runner()
        self.client = gradwire.AsyncClient(
            addresses, **({"timeout_s": 60, "retries": SOON} | options)
        )
        try:
            self.run(self.client.__aenter__())
        except BaseException:
            self._runner.close()
            raise

    def run(self, called: Any) -> Any:
        return self._runner.run(called)

    def stream(self, rows: Any, *args: Any, **options: Any) -> Any:
        async def collect() -> Any:
            async with self.client.stream(rows, *args, **options) as stream:
                async for _ in stream:
                    pass
            return stream.receipt

        return self.run(collect())

    def close(self) -> None:
        self.run(self.client.close())
        self._runner.close()


KINDS = {"sync": Sync, "async": Async}


@contextmanager
def several(count: int, **settings: Any) -> Iterator[list[ServerProcess]]:
    with ExitStack() as stack, ThreadPoolExecutor(count) as pool:
        made = [running_server(**settings) for _ in range(count)]
        yield list(pool.map(stack.enter_context, made))


def addresses(servers: Sequence[ServerProcess]) -> list[str]:
    return [server.address for server in servers]


@pytest.fixture(scope="module")
def three() -> Iterator[list[ServerProcess]]:
    """Servers that all tests share which leave them unharmed."""
    with several(3, row_block_bytes=4096) as servers:
        yield servers


Joined = Callable[..., Any]


@pytest.fixture(params=KINDS)
def joined(request: pytest.FixtureRequest) -> Iterator[Joined]:
    """Makes clients of each kind in turn."""
    made: list[Any] = []

    def make(servers: Any, **options: Any) -> Any:
        made.append(KINDS[request.param](servers, **options))
        return made[-1]

    yield make
    for client in made:
        client.close()


def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_jobs_are_spread_over_the_servers(
    three: list[ServerProcess], joined: Joined
) -> None:
    caller = joined(addresses(three))
    expected = caller.run(caller.client.gradients(X, W, DY))
    seen = Counter([expected.receipt.server_address])
    instances = set()
    for number in range(8):
        if number % 2:
            receipt = caller.stream([(X, DY)], W)
        else:
            result = caller.run(caller.client.gradients(X, W, DY))
            assert all(map(oracle.same_bits, result, expected))
            receipt = result.receipt
        seen[receipt.server_address] += 1
        instances.add(receipt.server_instance)
    assert seen == dict.fromkeys(addresses(three), 3)
    assert len(instances) == 3


def test_a_server_that_is_busy_with_this_clients_jobs_gets_fewer(
    three: list[ServerProcess],
) -> None:
    go_on, runs = threading.Event(), threading.Event()

    def rows() -> Iterator[Any]:
        yield X, DY
        runs.set()
        go_on.wait(60)

    with gradwire.connect(addresses(three), timeout_s=60) as client:
        long = client.stream(rows(), W)
        consumer = threading.Thread(target=lambda: list(long))
        consumer.start()
        assert runs.wait(30)
        others = [client.gradients(X, W, DY).receipt for _ in range(6)]
        go_on.set()
        consumer.join()
        seen = Counter(receipt.server_address for receipt in others)
        assert sorted(seen.values()) == [3, 3]
        assert long.receipt.server_address not in seen


class Dying:
    """Three servers that are killed one after the other, and their client."""

    def __init__(self, kind: str, servers: list[ServerProcess]) -> None:
        self.kind = kind
        self.servers = servers
        self.caller = KINDS[kind](addresses(servers))
        self.killed: list[str] = []

    def kill_whose_job_runs(self) -> None:
        (member,) = [
            m for m in self.caller.client._engine._servers.members if m.running
        ]
        self.killed.append(member.address)
        next(s for s in self.servers if s.address == member.address).kill()

    def used(self, jobs: int = 4) -> Counter[str]:
        """Who computes small jobs, none of which is tried in vain."""
        seen: Counter[str] = Counter()
        for _ in range(jobs):
            receipt = self.caller.stream([(X, DY)], W)
            assert receipt.attempts == 1
            seen[receipt.server_address] += 1
        return seen

    def moves(self, x: Any, w: Any, dy: Any, expected: Any) -> None:
        """A job of arrays whose server is killed when results come."""

        def kill(progress: gradwire.Progress) -> None:
            if progress.bytes_received and len(self.killed) == before:
                self.kill_whose_job_runs()

        before = len(self.killed)
        call = self.caller.client.gradients(x, w, dy, on_progress=kill)
        moved = self.caller.run(call)
        assert moved.receipt.attempts == 2
        assert moved.receipt.server_address not in self.killed
        assert moved.receipt.fingerprint == expected.receipt.fingerprint
        assert all(map(oracle.same_bits, moved, expected))

    def goes_on(self, x: Any, w: Any, dy: Any, expected: Any) -> None:
        """A stream whose server is killed after it has handed out blocks."""
        blocks: list[Any] = []

        def rows() -> Iterator[Any]:
            step = len(x) // 20
            for first in range(0, len(x), step):
                if first == 10 * step:
                    until(lambda: len(blocks) > 2)
                    self.kill_whose_job_runs()
                yield x[first : first + step], dy[first : first + step]

        def sync() -> Any:
            with self.caller.client.stream(rows(), w) as stream:
                blocks.extend(stream)
            return stream

        async def collect() -> Any:
            async with self.caller.client.stream(beside(rows()), w) as stream:
                async for block in stream:
                    blocks.append(block)  # noqa: PERF401 - seen while others come
            return stream

        async def beside(items: Iterator[Any]) -> Any:
            while (item := await asyncio.to_thread(next, items, None)) is not None:
                yield item

        stream = sync() if self.kind == "sync" else self.caller.run(collect())
        assert stream.receipt.attempts == 2
        assert stream.receipt.server_address not in self.killed
        assert oracle.same_bits(np.concatenate([b.y for b in blocks]), expected.y)
        assert oracle.same_bits(np.concatenate([b.dx for b in blocks]), expected.dx)
        assert oracle.same_bits(stream.dw, expected.dw)


@pytest.mark.big
@pytest.mark.parametrize("kind", KINDS)
def test_jobs_go_on_as_servers_die_and_come_back_until_none_is_left(kind: str) -> None:
    """With the same bits as those that nothing happened to."""
    operands = oracle.operands(20_000, 60, 40)
    with several(3, row_block_bytes=65536) as servers:
        dying = Dying(kind, servers)
        caller = dying.caller
        expected = caller.run(caller.client.gradients(*operands))
        dying.moves(*operands, expected)
        # From then on it is left out.
        assert sorted(dying.used().values()) == [2, 2]
        dying.goes_on(*operands, expected)
        assert list(dying.used().values()) == [4]
        assert not set(dying.used()) & set(dying.killed)
        (last,) = [s for s in servers if s.address not in dying.killed]
        with running_server(listen=[dying.killed[0]], row_block_bytes=65536) as back:
            until(lambda: back.address in dying.used(2))
            for server in (last, back):
                server.kill()
            with pytest.raises(gradwire.ConnectError) as caught:
                caller.run(caller.client.gradients(X, W, DY, timeout_s=1))
        assert "none of the 3 servers is available" in str(caught.value)
        for address in addresses(servers):
            assert f"nothing listens at {address}" in str(caught.value)
        with pytest.raises(gradwire.ConnectError, match="none of the 3"):
            KINDS[kind](addresses(servers), connect_timeout_s=5)
        caller.close()


def test_one_that_is_dead_from_the_beginning_is_left_out(
    three: list[ServerProcess], joined: Joined
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    dead = f"127.0.0.1:{port}"
    caller = joined([dead, three[0].address], retries=False)
    for _ in range(3):
        result = caller.run(caller.client.gradients(X, W, DY))
        assert result.receipt.server_address == three[0].address
    assert caller.run(caller.client.server_info()).limits.max_jobs
    with pytest.raises(gradwire.ConnectError, match="nothing listens"):
        caller.run(caller.client.server_info(address=dead))


def test_a_busy_or_draining_server_sends_its_jobs_to_another() -> None:
    """At once: not when it said that it may have room again."""
    go_on, runs = threading.Event(), threading.Event()

    def rows() -> Iterator[Any]:
        yield X, DY
        runs.set()
        go_on.wait(60)

    with (
        running_server(max_jobs=1, max_queue=0, grace=60) as small,
        running_server() as other,
        gradwire.connect(small.address, transport="grpc") as occupant,
    ):
        thread = threading.Thread(target=lambda: list(occupant.stream(rows(), W)))
        thread.start()
        assert runs.wait(30)
        both = [small.address, other.address]
        for kind in KINDS.values():
            caller = kind(both)
            results = [caller.run(caller.client.gradients(X, W, DY)) for _ in range(2)]
            assert {r.receipt.server_address for r in results} == {other.address}
            assert {r.receipt.retried for r in results} <= {(), ("BUSY",)}
            caller.close()
        small.process.terminate()
        small.wait_for_log("draining")
        for kind in KINDS.values():
            late = kind(both, retries=False)
            for _ in range(2):
                result = late.run(late.client.gradients(X, W, DY))
                assert result.receipt.server_address == other.address
            late.close()
        go_on.set()
        thread.join()


def test_a_name_stands_for_all_of_its_addresses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And for those that it has now: as where a service's hosts change."""
    hosts = ["127.0.0.1", "127.0.0.2"]
    real = socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        if host != "gradwire.test":
            return real(host, port, *args, **kwargs)
        kind, proto = socket.SOCK_STREAM, socket.IPPROTO_TCP
        return [(socket.AF_INET, kind, proto, "", (each, port)) for each in hosts]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with ExitStack() as stack:
        one = stack.enter_context(running_server())
        port = one.address.rpartition(":")[2]
        for host in ("127.0.0.2", "127.0.0.3"):
            stack.enter_context(running_server(listen=[f"{host}:{port}"]))
        name = f"dns:///gradwire.test:{port}"
        callers = [kind(name) for kind in KINDS.values()]

        def hosts_used(caller: Any) -> set[str]:
            results = [caller.run(caller.client.gradients(X, W, DY)) for _ in range(4)]
            return {r.receipt.server_address.split(":")[0] for r in results}

        assert all(hosts_used(caller) == set(hosts) for caller in callers)
        hosts[:] = ["127.0.0.2", "127.0.0.3"]
        one.kill()
        for caller in callers:
            until(lambda caller=caller: hosts_used(caller) == set(hosts))
            caller.close()


def test_a_client_says_which_servers_it_has(three: list[ServerProcess]) -> None:
    names = addresses(three)
    with gradwire.connect(names) as client:
        assert repr(client) == f"<gradwire.Client of {', '.join(names)}>"
        assert client.address == ", ".join(names)
        infos = [client.server_info(address=name) for name in names]
        assert len({info.server_instance for info in infos}) == 3
        with pytest.raises(
            gradwire.InputError, match="expected one of the client's servers"
        ):
            client.server_info(address="127.0.0.1:1")
        assert client.empty((3, 4)).shape == (3, 4)
    with pytest.raises(gradwire.ClientStateError, match="is closed"):
        client.gradients(X, W, DY)


@pytest.mark.parametrize(
    ("given", "options", "said"),
    [
        ([], {}, "is empty"),
        (["127.0.0.1:1", "nowhere"], {}, "'nowhere' has no port"),
        (["127.0.0.1:1", 7], {}, "the address is a int"),
        ("dns:///nowhere", {}, "has no port"),
        ("dns:///unix:/a/b", {}, "."),
        (["127.0.0.1:1", "127.0.0.1:2"], {"transport": "shm"}, "with one server"),
        (["127.0.0.1:1", "example.org:2"], {"token": "secret"}, "example.org:2"),
    ],
)
def test_addresses_have_to_be_some(given: Any, options: Any, said: str) -> None:
    for kind in (gradwire.Client, gradwire.AsyncClient):
        with pytest.raises(gradwire.InputError, match=said):
            kind(given, **options)


FORK = """
    import os, sys
    import numpy as np
    import gradwire
    x = np.ones((3, 3))

    def used(client):
        results = [client.gradients(x, x, x) for _ in range(3)]
        return {result.receipt.server_address for result in results}

    with gradwire.connect(sys.argv[1:]) as client:
        assert used(client) == set(sys.argv[1:])
        child = os.fork()
        if child == 0:
            os._exit(0 if used(client) == set(sys.argv[1:]) else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert used(client) == set(sys.argv[1:])
"""


def test_the_child_of_a_fork_has_all_servers(three: list[ServerProcess]) -> None:
    run_script(FORK, *addresses(three))


def test_compute_takes_several_addresses(
    three: list[ServerProcess], tmp_path: Path
) -> None:
    for name, operand in zip(("x", "w", "dy"), (X, W, DY), strict=True):
        np.save(tmp_path / f"{name}.npy", operand)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        dead = f"127.0.0.1:{taken.getsockname()[1]}"
    files = [tmp_path / f"{name}.npy" for name in ("x", "w", "dy")]
    done = gradwire_command(
        *("compute", *files, "--out", tmp_path / "out"),
        *("--address", dead, f"--address={three[1].address}"),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{three[1].address}, over tcp" in done.stdout


def test_a_session_stays_on_its_server_when_the_client_has_others(
    three: list[ServerProcess], joined: Joined
) -> None:
    first, second, _ = three
    client = joined([first.address])
    session = client.client.session(keep="1MiB")
    client.run(session.open())
    w = client.run(session.put(W))
    client.run(client.client.set_servers([second.address]))
    client.run(client.client.set_servers([second.address]))
    assert client.run(client.client.gradients(X, W, DY)).receipt.server_address == (
        second.address
    )
    y, _ = client.run(session.forward(X, w, keep=False))
    np.testing.assert_allclose(y, X @ W, rtol=1e-4, atol=1e-4)
    client.run(session.close())
    with gradwire.connect(first.address) as other:
        assert not other.sessions()
    client.run(client.client.set_servers([second.address]))
    assert client.run(client.client.gradients(X, W, DY)).receipt.server_address == (
        second.address
    )
