"""Load test of a server: ``python -m bench.load``.

A closed loop first measures the capacity, in calls a second. Open loops then send calls
by the clock (Poisson arrivals, timed from their due time) at fractions and multiples of
the capacity. Finally the test waits until the server answers as fast as before. The
SDK's retries are off, so each call counts with its own outcome. The server is a
separate process with the settings given here.

Prints a table, and writes JSON lines: the machine and the settings; for each part its
rates and the resources of both sides; for each kind of call and each outcome the number
of calls and percentiles.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import gradwire
from bench import machine
from bench.contenders.server_process import HOST, ServerProcess
from bench.load.generator import Kind, Load, Made, endings, outcomes, rate_of
from bench.report import tables
from bench.work import Shape, operands
from bench.worker import forget_peak, peak_bytes

MIX = "32*8,256*3,1024"
TIMES = "0.5,3"
RECOVERED = 2.0
"""A call at most this many times slower than before the load counts as recovered."""
HEAD = ("load", "call", "ended with", "calls", "p50 ms", "p90", "p99", "p99.9", "max")


def main() -> int:
    options = _parser().parse_args()
    command = [str(Path(sys.executable).with_name("gradwire")), "serve"]
    command += ["--listen", f"{HOST}:0", "--backend", "numpy"]
    command += ["--max-jobs", str(options.max_jobs)]
    command += ["--max-queue", str(options.max_queue)]
    command += ["--memory-limit", options.memory_limit, "--log-level", "error"]
    out = options.out or Path("bench/out", time.strftime("load-%Y%m%d-%H%M%S.jsonl"))
    out.parent.mkdir(parents=True, exist_ok=True)
    about = machine.describe(os.cpu_count() or 1)
    print(tables.heading(about))
    server = ServerProcess.start(command)
    try:
        with out.open("w") as lines:
            _write(lines, "run", **about, **_settings(options))
            body = asyncio.run(_measure(server, options, lines))
    finally:
        server.stop()
    print(tables.table(body, HEAD, texts=3))
    print(f"\n{out}")
    return 0


async def _measure(
    server: ServerProcess, options: argparse.Namespace, lines: IO[str]
) -> list[tuple[str, ...]]:
    body: list[tuple[str, ...]] = []

    async def part(name: str, load: Load, run: Callable[[], Awaitable[Any]]) -> float:
        forget_peak(server.pid)
        made: list[Made] = await run()
        rate = rate_of(made)
        held = {
            "server_peak_bytes": peak_bytes(server.pid),
            "server_descriptors": descriptors(server.pid),
            "client_descriptors": descriptors("self"),
            "left_out": load.left_out,
            "late_p99_s": sorted(m.began_s - m.due_s for m in made)[
                len(made) * 99 // 100
            ],
        }
        _write(lines, "part", load=name, calls_per_second=rate, **held)
        for outcome in outcomes(made):
            _write(lines, "outcome", load=name, **asdict(outcome))
            percentiles = map(tables.milliseconds, outcome.percentiles_s.values())
            body.append(
                (
                    name,
                    outcome.call,
                    outcome.reason or outcome.status,
                    str(outcome.count),
                    *percentiles,
                    tables.milliseconds(outcome.max_s),
                )
            )
        print(f"{name}: {rate:.1f} calls/s, {dict(endings(made))}, {held}", flush=True)
        return rate

    async with gradwire.AsyncClient(
        server.address, transport="grpc", retries=False, timeout_s=options.deadline
    ) as client:
        mix = kinds(client, options.mix)
        probe = mix[0].call
        for kind in mix:
            await kind.call()
        before_s = min([await _seconds(probe) for _ in range(20)])
        load = Load(mix)
        rate = await part(
            f"{options.callers} callers",
            load,
            lambda: load.closed(options.callers, options.seconds),
        )
        for times in options.times:
            load = Load(mix)
            await part(
                f"{times:g}x",
                load,
                lambda load=load, times=times: load.open(times * rate, options.seconds),
            )
            began = time.perf_counter()
            while await _seconds(probe) > RECOVERED * before_s + 0.005:
                pass
            _write(
                lines,
                "recovered",
                load=f"{times:g}x",
                after_s=time.perf_counter() - began,
            )
            print(f"as fast as before after {time.perf_counter() - began:.3f} s")
    return body


def kinds(
    client: gradwire.AsyncClient, mix: Sequence[tuple[Shape, float]]
) -> list[Kind]:
    """The kinds of calls: gradients of each shape."""

    def call(shape: Shape) -> Callable[[], Awaitable[Any]]:
        given = operands(shape)
        return lambda: client.gradients(*given)

    return [Kind(shape.label, weight, call(shape)) for shape, weight in mix]


def parse_mix(text: str) -> list[tuple[Shape, float]]:
    """Parse shapes and their weights: ``32*8,256*3,1024``.

    Raises:
        ValueError: The text has another form.
    """
    mix = []
    for part in text.split(","):
        shape, _, weight = part.partition("*")
        mix.append((Shape.parse(shape), float(weight or 1)))
    if not all(weight > 0 for _, weight in mix):
        raise ValueError(f"a mix has weights above 0: {text!r}")
    return mix


def descriptors(pid: int | str) -> int:
    """The number of open file descriptors of a process."""
    return len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208 - names alone


async def _seconds(call: Callable[[], Awaitable[Any]]) -> float:
    began = time.perf_counter()
    await call()
    return time.perf_counter() - began


def _write(lines: IO[str], kind: str, **fields: Any) -> None:
    lines.write(json.dumps({"kind": kind, **fields}) + "\n")
    lines.flush()


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    shown = vars(options) | {"mix": [(str(s), w) for s, w in options.mix]}
    shown.pop("out")
    return {"options": shown}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.load", description="Latencies and refusals under load."
    )
    parser.add_argument(
        "--mix",
        type=parse_mix,
        default=MIX,
        help=f"shapes and their weights ({MIX})",
    )
    parser.add_argument(
        "--times",
        type=lambda text: [float(part) for part in text.split(",")],
        default=TIMES,
        help=f"rates of the open loops, as multiples of the capacity ({TIMES})",
    )
    parser.add_argument(
        "--callers", type=int, default=8, help="of the closed loop, at once (8)"
    )
    parser.add_argument(
        "--seconds", type=float, default=20, help="of each of the parts (20)"
    )
    parser.add_argument(
        "--deadline", type=float, default=10, help="of each call, in seconds (10)"
    )
    parser.add_argument("--max-jobs", type=int, default=4, help="of the server (4)")
    parser.add_argument("--max-queue", type=int, default=16, help="of the server (16)")
    parser.add_argument("--memory-limit", default="1GiB", help="of the server (1GiB)")
    parser.add_argument(
        "--out", type=Path, help="file of JSON lines (bench/out/load-TIME.jsonl)"
    )
    return parser
