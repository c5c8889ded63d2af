"""Tensors of sessions on direct connections, through the SDK."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import gradwire
from gradwire import Tls
from tests.support import oracle
from tests.support.certificates import Authority
from tests.support.metrics import scrape
from tests.support.observing import (
    forget_peak,
    forget_peak_of,
    memory_of,
    peak,
    resident,
    wait_until,
)
from tests.support.proxy import Fault, Proxy
from tests.support.serving import ServerProcess, running_server

MIB = 1 << 20
LARGE = (1030, 1024)
"""A little more than 4 MiB."""
SMALL = (100, 40)
QUICK = gradwire.RetryPolicy(initial_backoff_s=0.01, max_backoff_s=0.02)


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with running_server(metrics_listen="0") as process:
        yield process


def matrix(seed: int, shape: tuple[int, ...] = LARGE) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


class Counts:
    """Bytes of elements that travelled since the last look."""

    def __init__(self, server: ServerProcess) -> None:
        self._server = server
        self._before = self._now()

    def _now(self) -> dict[tuple[str, str], float]:
        metrics = scrape(self._server.metrics_url)
        return {
            (method, transport): metrics.sum(name, method=method, transport=transport)
            for name, method in (
                ("received_bytes_total", "PutTensor"),
                ("sent_bytes_total", "GetTensor"),
            )
            for transport in ("tcp", "direct")
        }

    def expect(self, **put_and_get: float) -> None:
        """Check the bytes of puts and gets on each transport."""
        methods = {"put": "PutTensor", "get": "GetTensor"}
        expected = dict.fromkeys(self._before, 0.0)
        for name, size in put_and_get.items():
            which, transport = name.split("_")
            expected[methods[which], transport] = size

        def moved() -> dict[tuple[str, str], float]:
            now = self._now()
            return {key: now[key] - self._before[key] for key in now}

        wait_until(lambda: moved() == expected, f"{moved()} is {expected}")
        self._before = self._now()


def there_and_back(
    address: str, arrays: list[Any], *, asynchronous: bool, **options: Any
) -> list[Any]:
    """Put arrays into a session, and get them."""
    options = {"timeout_s": 60} | options

    async def with_tasks() -> list[Any]:
        async with (
            gradwire.AsyncClient(address, **options) as client,
            client.session("64MiB") as session,
        ):
            weights = [await session.put(each) for each in arrays]
            return [await session.get(each) for each in weights]

    if asynchronous:
        return asyncio.run(with_tasks())
    with (
        gradwire.connect(address, **options) as client,
        client.session("64MiB") as session,
    ):
        handles = [session.put(each) for each in arrays]
        return [session.get(each) for each in handles]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_tensors_from_4_mib_travel_directly_and_demanded_all(
    server: ServerProcess, *, asynchronous: bool
) -> None:
    large, small = matrix(0), matrix(1, SMALL)
    odd = np.asfortranarray(matrix(2, (700, 3000)))[::2, ::-1]
    single, none = np.float64(3.5), np.empty((0, 4))
    arrays = [large, small, odd, np.asarray(single), none]
    sizes = [each.nbytes for each in arrays]
    counts = Counts(server)
    for transport, direct in (
        ("auto", {0, 2}),
        ("direct", set(range(5))),
        ("grpc", ()),
    ):
        got = there_and_back(
            server.address, arrays, asynchronous=asynchronous, transport=transport
        )
        for array, copy in zip(arrays, got, strict=True):
            assert oracle.same_bits(copy, array)
        on_direct = sum(sizes[at] for at in direct)
        in_call = sum(sizes) - on_direct
        counts.expect(
            put_direct=on_direct,
            get_direct=on_direct,
            put_tcp=in_call,
            get_tcp=in_call,
        )


def test_files_and_states_travel_directly_too(
    server: ServerProcess, tmp_path: Path
) -> None:
    w = matrix(0)
    path = tmp_path / "saved"
    with (
        gradwire.connect(server.address, timeout_s=60) as client,
        client.session("64MiB") as session,
    ):
        weight = session.put(w, name="w")
        session.put_state(weight, "momentum_buffer", -w, updates=3)
        counts = Counts(server)
        session.save(path)
        counts.expect(get_direct=2 * w.nbytes)
        back = session.restore(path)["w"]
        counts.expect(put_direct=2 * w.nbytes)
        assert oracle.same_bits(session.get(back), w)
        assert oracle.same_bits(session.get(back, state="momentum_buffer"), -w)


def test_a_frozen_weight_is_sent_once(server: ServerProcess) -> None:
    w, counts = matrix(7), Counts(server)
    with (
        gradwire.connect(server.address, timeout_s=60) as client,
        client.session("16MiB") as one,
        client.session("16MiB") as other,
    ):
        for session in one, other:
            assert oracle.same_bits(session.get(session.put(w, frozen=True)), w)
    counts.expect(put_direct=w.nbytes, get_direct=2 * w.nbytes)


@pytest.mark.thorough
def test_under_tls(tmp_path: Path) -> None:
    authority = Authority()
    cert, key = authority.issue("localhost", "127.0.0.1").write(tmp_path, "server")
    w = matrix(0)
    with running_server(tls_cert=cert, tls_key=key) as server:
        for asynchronous in False, True:
            (got,) = there_and_back(
                server.address,
                [w],
                asynchronous=asynchronous,
                transport="direct",
                tls=Tls(ca=authority.write(tmp_path)),
            )
            assert oracle.same_bits(got, w)


@contextlib.contextmanager
def behind_proxy() -> Iterator[tuple[ServerProcess, Proxy]]:
    """A server, and a proxy that stands before its port for direct connections."""
    with (
        Proxy("127.0.0.1:1") as proxy,
        running_server(data_advertise=proxy.address, metrics_listen="0") as server,
    ):
        of_process = psutil.Process(server.pid).net_connections("tcp")
        listening = {each.laddr.port for each in of_process if each.status == "LISTEN"}
        known = {server.address, server.metrics_url.removesuffix("/metrics")}
        (port,) = listening - {int(each.rpartition(":")[2]) for each in known}
        proxy.target = f"127.0.0.1:{port}"
        yield server, proxy


@pytest.fixture(scope="module")
def proxied() -> Iterator[tuple[ServerProcess, Proxy]]:
    with behind_proxy() as both:
        yield both


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_tensor_whose_connection_is_cut_comes_again_and_counts_once(
    proxied: tuple[ServerProcess, Proxy], *, asynchronous: bool
) -> None:
    server, proxy = proxied
    w = matrix(3)
    faults = [
        Fault("requests", cut_after_bytes=1000),
        Fault("requests", cut_after_bytes=3 * MIB),
        Fault("responses", cut_after_bytes=2 * MIB),
    ]

    async def with_tasks(fault: Fault) -> None:
        async with (
            gradwire.AsyncClient(
                server.address, transport="direct", retries=QUICK, timeout_s=60
            ) as client,
            client.session(w.nbytes) as session,
        ):
            proxy.arm(fault)
            assert oracle.same_bits(await session.get(await session.put(w)), w)
            assert (await session.describe()).used_bytes == w.nbytes

    def with_threads(fault: Fault) -> None:
        with (
            gradwire.connect(
                server.address, transport="direct", retries=QUICK, timeout_s=60
            ) as client,
            client.session(w.nbytes) as session,
        ):
            proxy.arm(fault)
            assert oracle.same_bits(session.get(session.put(w)), w)
            assert session.describe().used_bytes == w.nbytes

    before = proxy.faults
    for fault in faults:
        if asynchronous:
            asyncio.run(with_tasks(fault))
        else:
            with_threads(fault)
    assert proxy.faults - before == len(faults)


def test_connections_that_break_again_are_left_for_messages(
    proxied: tuple[ServerProcess, Proxy], caplog: pytest.LogCaptureFixture
) -> None:
    server, proxy = proxied
    w, counts = matrix(4), Counts(server)
    with (
        gradwire.connect(server.address, retries=QUICK, timeout_s=60) as client,
        client.session("64MiB") as session,
    ):
        for at in range(2):
            proxy.arm(Fault("requests", cut_after_bytes=1000))
            weight = session.put(w + at)
            counts = Counts(server)
        proxy.arm(None)
        assert oracle.same_bits(session.get(weight), w + 1)
        counts.expect(get_tcp=w.nbytes)
    assert sum("broke 2 times" in each.getMessage() for each in caplog.records) == 1


def test_a_port_that_cannot_be_reached_costs_nothing_but_speed() -> None:
    w = matrix(5)
    with socket.socket() as unused:  # bound, and nobody listens
        unused.bind(("127.0.0.1", 0))
        nowhere = f"127.0.0.1:{unused.getsockname()[1]}"
        with running_server(data_advertise=nowhere, metrics_listen="0") as server:
            for asynchronous in False, True:
                counts = Counts(server)
                (got,) = there_and_back(server.address, [w], asynchronous=asynchronous)
                assert oracle.same_bits(got, w)
                counts.expect(put_tcp=w.nbytes, get_tcp=w.nbytes)
                with pytest.raises(gradwire.ConnectError, match="cannot be reached"):
                    there_and_back(
                        server.address,
                        [w],
                        asynchronous=asynchronous,
                        transport="direct",
                        retries=False,
                    )


@pytest.mark.thorough
def test_many_tensors_travel_at_once(server: ServerProcess) -> None:
    arrays = [matrix(seed) for seed in range(6)]

    async def all_at_once() -> list[Any]:
        async with (
            gradwire.AsyncClient(server.address, timeout_s=60) as client,
            client.session("64MiB") as session,
        ):
            weights = await asyncio.gather(*(session.put(each) for each in arrays))
            return await asyncio.gather(*(session.get(each) for each in weights))

    counts = Counts(server)
    for array, got in zip(arrays, asyncio.run(all_at_once()), strict=True):
        assert oracle.same_bits(got, array)
    size = sum(each.nbytes for each in arrays)
    counts.expect(put_direct=size, get_direct=size)


async def until(condition: Callable[[], bool]) -> None:
    await asyncio.to_thread(wait_until, condition, "a cancelled put")


def used_bytes(server: ServerProcess) -> int:
    """Bytes of the tensors of a server's only session."""
    with gradwire.connect(server.address) as client:
        (only,) = client.sessions()
        return only.used_bytes


@pytest.mark.thorough
async def test_a_cancelled_put_keeps_nothing(
    proxied: tuple[ServerProcess, Proxy],
) -> None:
    server, proxy = proxied
    w = matrix(6, (4096, 1024))
    async with (
        gradwire.AsyncClient(
            server.address, transport="direct", timeout_s=60
        ) as client,
        client.session(w.nbytes) as session,
    ):
        proxy.arm(None)
        before = proxy.bytes["requests"]
        putting = asyncio.create_task(session.put(w))
        await until(lambda: proxy.bytes["requests"] > before + MIB)
        proxy.pause()
        putting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await putting
        proxy.resume()
        await until(lambda: not used_bytes(server))
        assert oracle.same_bits(await session.get(await session.put(w)), w)


@pytest.mark.thorough
def test_neither_end_holds_a_tensor_twice(server: ServerProcess) -> None:
    w = matrix(8, (96 << 10, 256))
    most = 16 * MIB
    with (
        gradwire.connect(server.address, transport="direct", timeout_s=60) as client,
        client.session("128MiB") as session,
    ):
        session.get(session.put(matrix(9)))  # whatever is made once
        before, here = resident(server), memory_of(os.getpid(), "VmRSS")
        forget_peak(server)
        forget_peak_of(os.getpid())
        weight = session.put(w)
        assert peak(server) - before < w.nbytes + most
        assert memory_of(os.getpid(), "VmHWM") - here < most
        before = resident(server)
        forget_peak(server)
        got = session.get(weight)
        assert peak(server) - before < most
        assert memory_of(os.getpid(), "VmHWM") - here < w.nbytes + most
        assert oracle.same_bits(got, w)
