"""Small calls, alone and beside a large job: ``python -m bench.small``.

It answers three questions about a 32³ call through ``client.gradients``:

- How much longer does the call take than a unary call with the same bytes and no
  work (to an asyncio grpcio echo server)? The two take turns.
- How many calls a second does the server answer if `CALLERS` threads of one client
  call again as soon as they have an answer?
- At half that rate, beside another process with large jobs without a pause: how
  long do the small calls take, and the large ones? Calls start by the clock and are
  timed from their due time, so a delayed call counts as slow. The number of busy
  processors of each of the three processes shows whether the machine had enough.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import grpc

import gradwire
from bench.contenders.gradwire_sdk import Gradwire
from bench.contenders.server_process import HOST, ServerProcess, say_ready
from bench.report import bound
from bench.report.bound import Bound
from bench.work import Shape, operands
from bench.worker import cpu_s

SMALL = Shape(32, 32, 32)
LARGE = Shape(16384, 1024, 1024)
CALLERS = 4
WARM_UP = 200
_ECHO = "/bench.Echo/Call"


def main() -> int:
    options = _parser().parse_args()
    if options.serve_echo:
        asyncio.run(_serve_echo())
        return 0
    server = Gradwire()
    echo = ServerProcess.of_module("bench.small", "--serve-echo")
    try:
        server.start()
        with gradwire.connect(server.address, transport="grpc") as client:
            found = _questions(client, server, echo.address, options.seconds)
    finally:
        server.close()
        echo.stop()
    print(json.dumps({name: round(value, 6) for name, value in found.items()}))
    print(bound.table(bars(found)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.small", description="Seconds of small calls."
    )
    parser.add_argument(
        "--seconds", type=float, default=10, help="of each of the parts (10)"
    )
    parser.add_argument("--serve-echo", action="store_true", help=argparse.SUPPRESS)
    return parser


def _questions(
    client: gradwire.Client, server: Gradwire, echo: str, seconds: float
) -> dict[str, float]:
    given = operands(SMALL)

    def small() -> None:
        client.gradients(*given)

    with grpc.insecure_channel(echo) as channel:
        method = channel.unary_unary(_ECHO)
        body = b"".join(array.tobytes() for array in given)
        empty_s, alone_s = _in_turns([lambda: method(body), small], seconds)
    rate = _saturation(small, seconds)
    solo_s = _large_jobs(server.address, lambda _: time.sleep(seconds))
    busy: dict[str, float] = {}
    ours = {"server": server.server_pid, "small_client": os.getpid()}
    with _processors_busy(busy, "half_rate_alone", ours):
        _by_the_clock(small, rate / 2, seconds)
    beside: list[float] = []

    def beside_large(pid: int) -> None:
        with _processors_busy(busy, "beside", ours | {"large_client": pid}):
            beside.extend(_by_the_clock(small, rate / 2, seconds))

    large_s = _large_jobs(server.address, beside_large)
    return {
        "empty_call_s": statistics.median(empty_s),
        "small_call_s": statistics.median(alone_s),
        "calls_per_second": rate,
        "beside_median_s": statistics.median(beside),
        "beside_p99_s": statistics.quantiles(beside, n=100)[98],
        "large_alone_s": statistics.median(solo_s),
        "large_beside_s": statistics.median(large_s),
    } | busy


@contextmanager
def _processors_busy(
    found: dict[str, float], when: str, pids: dict[str, int]
) -> Iterator[None]:
    """Measure the busy processors of each process in this context."""
    before = {name: cpu_s(pid) for name, pid in pids.items()}
    began = time.perf_counter()
    yield
    took = time.perf_counter() - began
    for name, pid in pids.items():
        found[f"{when}_{name}_processors"] = (cpu_s(pid) - before[name]) / took


def bars(found: dict[str, float]) -> list[Bound]:
    """Bounds on the slowdown of the calls."""
    return [
        Bound(
            "small call over empty one",
            found["small_call_s"] / found["empty_call_s"],
            1.6,
        ),
        Bound(
            "small call's 99th percentile beside a large job over its median alone",
            found["beside_p99_s"] / found["small_call_s"],
            5.0,
        ),
        Bound(
            "large job beside small calls over alone",
            found["large_beside_s"] / found["large_alone_s"],
            1.5,
        ),
    ]


def _in_turns(calls: list[Callable[[], Any]], seconds: float) -> list[list[float]]:
    took: list[list[float]] = [[] for _ in calls]
    until = time.perf_counter() + seconds
    for number in itertools.count():
        if number >= WARM_UP and time.perf_counter() > until:
            return [each[WARM_UP // 2 :] for each in took]
        for call, times in zip(calls, took, strict=True):
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
    raise AssertionError


def _saturation(call: Callable[[], None], seconds: float) -> float:
    """Calls a second if every caller calls again at once."""
    until = time.perf_counter() + seconds

    def ask(_: int) -> int:
        for number in itertools.count():
            if time.perf_counter() > until:
                return number
            call()
        raise AssertionError

    with ThreadPoolExecutor(CALLERS) as callers:
        return sum(callers.map(ask, range(CALLERS))) / seconds


def _by_the_clock(call: Callable[[], None], rate: float, seconds: float) -> list[float]:
    """Seconds from each call's due time to its end."""
    start = time.perf_counter()
    due = iter([start + number / rate for number in range(int(rate * seconds))])
    lock = threading.Lock()

    def ask(_: int) -> list[float]:
        took = []
        while True:
            with lock:
                begins = next(due, None)
            if begins is None:
                return took
            time.sleep(max(0, begins - time.perf_counter()))
            call()
            took.append(time.perf_counter() - begins)

    with ThreadPoolExecutor(CALLERS) as callers:
        return [s for each in callers.map(ask, range(CALLERS)) for s in each]


def _large_jobs(address: str, meanwhile: Callable[[int], None]) -> list[float]:
    """Run large jobs in another process, and return their seconds.

    Args:
        address: The server's address.
        meanwhile: Called with the other process's id while it runs.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_compute_large, args=(address, theirs))
    process.start()
    try:
        ours.recv()  # warmed up
        assert process.pid is not None
        meanwhile(process.pid)
        ours.send(None)
        took: list[float] = ours.recv()
    finally:
        process.join(30)
        process.kill()
    return took


def _compute_large(address: str, driver: Connection) -> None:
    given = operands(LARGE)
    with gradwire.connect(address, transport="grpc") as client:
        out = tuple(client.gradients(*given))
        driver.send(None)
        driver.send(
            list(_until_told(driver, lambda: client.gradients(*given, out=out)))
        )


def _until_told(driver: Connection, call: Callable[[], Any]) -> Iterator[float]:
    while not driver.poll():
        began = time.perf_counter()
        call()
        yield time.perf_counter() - began


async def _serve_echo() -> None:
    async def answer(request: bytes, _: object) -> bytes:
        return request

    server = grpc.aio.server()
    _, service, method = _ECHO.split("/")
    handler = grpc.unary_unary_rpc_method_handler(answer)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service, {method: handler}),)
    )
    port = server.add_insecure_port(f"{HOST}:0")
    await server.start()
    say_ready(f"{HOST}:{port}")
    await server.wait_for_termination()


if __name__ == "__main__":
    sys.exit(main())
