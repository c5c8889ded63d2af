"""Complete jobs of one client, with the server in a separate process."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradwire
from bench.contenders.server_process import ServerProcess, Used
from bench.gpu import device_worker
from bench.gpu.parts import Answer, Options, median
from bench.report.bound import Bound
from bench.work import Array, Shape, copied, empty_results, operands, products

TRANSPORT_ONLY = Shape(65536, 4096, 1)
"""Sends X and receives dX, with almost no arithmetic."""

SIDES = (256, 512, 1024, 2048, 4096, 8192)

LEAST_OF_WORKER = 0.7
"""Minimum rate over shared memory, relative to the device worker's."""

LEAST_DIRECT_GB_PER_S, MOST_DIRECT_CPU_S = 5.0, 0.3
"""Minimum rate of direct connections each way, and maximum processor time of each end
for 10⁹ bytes of operands and results."""

Job = Callable[[], gradwire.Receipt]


def measure_transports(options: Options) -> Answer:
    """Measure GB/s of each transport, and the time of each stage."""
    shape = device_worker.scaled(device_worker.END_TO_END[0], options)
    empty = device_worker.scaled(TRANSPORT_ONLY, options)
    rows = []
    with _server(options) as (server, unix):
        for name, address, transport in (
            ("shm", unix, "shm"),
            ("unix", unix, "grpc"),
            ("tcp", server.address, "grpc"),
            ("direct", server.address, "direct"),
        ):
            with gradwire.connect(address, transport=transport) as client:
                rows.append(_measured(name, "job", client, server, shape, options))
                if name != "shm":
                    row = _measured(name, "transport", client, server, empty, options)
                    rows.append(row)
    return Answer("transports", rows, judge=_bars)


def measure_sizes(options: Options) -> Answer:
    """Compare cubes on the host and on the device, by size."""
    rows = []
    with (
        _server(options) as (server, unix),
        gradwire.connect(unix, transport="shm") as shared,
        gradwire.connect(server.address, transport="grpc") as remote,
    ):
        for side in sorted(set(map(options.scaled, SIDES))):
            shape = Shape(side, side, side)
            x, w, dy = operands(shape)
            out = empty_results(x, w, dy)

            def here(
                given: tuple[Array, Array, Array] = (x, w, dy),
                results: tuple[Array, Array, Array] = out,
            ) -> None:
                products(*given, results)

            calls: dict[str, Callable[[], Any]] = {
                "NumPy ms": here,
                "shm ms": _job(shared, shape),
                "tcp ms": _job(remote, shape),
            }
            took = _in_turns(calls, options.seconds)
            rows.append(
                {
                    "side": side,
                    "faster": min(took, key=lambda name: took[name])[:-3],
                    **{name: s * 1e3 for name, s in took.items()},
                }
            )
    return Answer("numpy", rows)


def _bars(rows: Sequence[dict[str, Any]], answers: dict[str, Any]) -> Iterable[Bound]:
    rate = {(row["way"], row["what"]): row["GB/s each way"] for row in rows}
    shape = next(row["shape"] for row in rows if row["what"] == "job")
    dtype = device_worker.END_TO_END[1].label
    beside = answers.get("worker", {}).get("rows")
    if beside:
        through = device_worker.of_shape(beside, shape, dtype)["GB/s each way"]
        name = "shared memory over the device worker without gRPC"
        yield Bound(name, rate["shm", "job"] / through, LEAST_OF_WORKER, at_least=True)
    for row in rows:
        if (row["way"], row["what"]) == ("direct", "job"):
            seen = row["GB/s each way"]
            name = "direct connections, GB/s each way"
            yield Bound(name, seen, LEAST_DIRECT_GB_PER_S, at_least=True)
            for end in ("client", "server"):
                name = f"direct connections, {end}'s CPU s/GB"
                yield Bound(name, row[f"{end} CPU s/GB"], MOST_DIRECT_CPU_S)


def _measured(
    way: str,
    what: str,
    client: gradwire.Client,
    server: ServerProcess,
    shape: Shape,
    options: Options,
) -> dict[str, Any]:
    job = _job(client, shape)
    job()
    took: list[float] = []
    receipts: list[gradwire.Receipt] = []
    before = Used.here(), server.used()
    until = time.perf_counter() + options.seconds
    while len(took) < 3 or time.perf_counter() < until:
        began = time.perf_counter()
        receipts.append(job())
        took.append(time.perf_counter() - began)
    used = Used.here().since(before[0]), server.used().since(before[1])
    moved_gb = 2 * shape.bytes_each_way * len(took) / 1e9
    total_s = median(took)
    stages = ("receiving", "copy_to_device", "computing", "copy_from_device", "sending")
    return {
        "way": way,
        "what": what,
        "shape": str(shape),
        "ms": total_s * 1e3,
        "GB/s each way": shape.bytes_each_way / total_s / 1e9,
        "client CPU s/GB": used[0].cpu_s / moved_gb,
        "server CPU s/GB": used[1].cpu_s / moved_gb,
        **{
            f"{stage} share": median([getattr(r, f"{stage}_s") for r in receipts])
            / total_s
            for stage in stages
        },
    }


def _job(client: gradwire.Client, shape: Shape) -> Job:
    """A job with reused arrays, in the memory suited to its transport."""
    sizes = (shape.m, shape.n), (shape.n, shape.k), (shape.m, shape.k)
    x, w, dy = (client.empty(size) for size in sizes)
    copied(operands(shape), into=(x, w, dy))
    y, dx, dw = (client.empty(size) for size in (sizes[2], sizes[0], sizes[1]))
    return lambda: client.gradients(x, w, dy, out=(y, dx, dw)).receipt


def _in_turns(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    took: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    until = time.perf_counter() + seconds
    while len(took[next(iter(took))]) < 3 or time.perf_counter() < until:
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            took[name].append(time.perf_counter() - began)
    return {name: median(samples) for name, samples in took.items()}


@contextmanager
def _server(options: Options) -> Iterator[tuple[ServerProcess, str]]:
    """Start a server at a TCP port; yield it, and the address of its unix socket."""
    with tempfile.TemporaryDirectory(prefix="gradwire-bench-") as folder:
        path = Path(folder, "socket")
        server = ServerProcess.of_module("bench.gpu.server", options.backend, str(path))
        try:
            yield server, f"unix:{path}"
        finally:
            server.stop()
