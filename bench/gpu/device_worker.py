"""Jobs from host memory to host memory through a device worker, without gRPC.

The row blocks of a job are already in the slots of its ring buffer, and start as soon
as their slot is free. A second run starts each block only after the previous one: its
stages do not overlap, so each shows its own time. The longest stage is the lower bound
for the first run.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from bench.gpu.copies import slowdown
from bench.gpu.parts import Answer, Options, median
from bench.report.bound import Bound
from bench.work import Shape
from gradwire.v1 import job_pb2
from gradwire_protocol.dtypes import Dtype
from gradwire_server import Settings
from gradwire_server.backends import select
from gradwire_server.backends.base import Backend
from gradwire_server.backends.row_blocks import plan_row_blocks
from gradwire_server.jobs.device_execution import DeviceExecution
from gradwire_server.jobs.header.parse import parse_header
from gradwire_server.jobs.stream.job_memory import JobMemory
from gradwire_server.scheduling.device_worker import DeviceWorker, TenantHandle
from gradwire_server.scheduling.job_progress import JobProgress
from gradwire_server.sessions.job_tensors import JobTensors

JOBS = (
    (Shape(65536, 1024, 1024), Dtype.FLOAT32),  # copies take longest
    (Shape(65536, 2048, 2048), Dtype.FLOAT32),
    (Shape(32768, 4096, 4096), Dtype.FLOAT32),  # products take longest
    (Shape(65536, 8192, 8192), Dtype.BFLOAT16),
)

MOST = 1.15
"""Maximum ratio of a job's time to its longest stage."""

END_TO_END = JOBS[1]
"""The job to compare complete calls with."""


@dataclass(frozen=True, slots=True)
class Took:
    """Seconds of one job, and of its stages by the device's clock."""

    total_s: float
    to_device_s: float
    computing_s: float
    from_device_s: float


def measure(options: Options) -> Answer:
    """Measure seconds of jobs and of their longest stages."""
    settings = Settings(backend=options.backend)
    backend, _ = select.choose(settings)
    worker = DeviceWorker(
        backend.devices[0].index,
        partial(backend.init_thread, backend.devices[0].index),
        max_in_flight=backend.pipeline_depth,
    )
    try:
        return Answer(
            "worker",
            [_row(backend, worker.of(""), options, *job) for job in JOBS],
            judge=_bars,
        )
    finally:
        worker.close()
        backend.close()


def of_shape(rows: Sequence[dict[str, Any]], shape: str, dtype: str) -> dict[str, Any]:
    """The row of figures of a job."""
    (row,) = (r for r in rows if (r["shape"], r["dtype"]) == (shape, dtype))
    return row


def scaled(shape: Shape, options: Options) -> Shape:
    """The shape divided by --scale, and with fewer rows for --quick."""
    m = shape.m // 4 if options.quick else shape.m
    return Shape(*(options.scaled(size) for size in (m, shape.n, shape.k)))


def _row(
    backend: Backend, worker: TenantHandle, options: Options, whole: Shape, dtype: Dtype
) -> dict[str, Any]:
    shape = scaled(whole, options)
    overlapped: list[Took] = []
    alone: list[Took] = []
    until = time.perf_counter() + options.seconds
    while len(overlapped) < 2 or time.perf_counter() < until:
        overlapped.append(asyncio.run(_job(backend, worker, shape, dtype)))
        alone.append(asyncio.run(_job(backend, worker, shape, dtype, ahead=1)))
    total_s = median([each.total_s for each in overlapped[1:]])
    stages = {
        name: median([getattr(each, f"{name}_s") for each in alone[1:]])
        for name in ("to_device", "computing", "from_device")
    }
    longest_s = max(stages.values())
    moved = dtype.itemsize * (shape.bytes_each_way // 4)
    return {
        "shape": str(shape),
        "dtype": dtype.label,
        "ms": total_s * 1e3,
        **{f"{name} alone ms": s * 1e3 for name, s in stages.items()},
        "ratio": total_s / longest_s if longest_s else float("nan"),
        "GB/s each way": moved / total_s / 1e9,
    }


def _bars(rows: Sequence[dict[str, Any]], answers: dict[str, Any]) -> Iterable[Bound]:
    for row in rows:
        name = f"device worker, {row['shape']} {row['dtype']}, over its longest stage"
        yield Bound(name, row["ratio"], MOST, at_least=False)
        shared = answers.get("copies", {}).get("rows")
        if shared:
            ratio = row["ms"] / _longest_ms(row, slowdown(shared))
            yield Bound(f"{name}, on a shared bus", ratio, MOST, at_least=False)


def _longest_ms(row: dict[str, Any], slower: dict[str, float]) -> float:
    """The longest stage, with copies in both directions at once."""
    return max(
        row["to_device alone ms"] * slower["up GB/s"],
        row["computing alone ms"],
        row["from_device alone ms"] * slower["down GB/s"],
    )


async def _job(
    backend: Backend,
    worker: TenantHandle,
    shape: Shape,
    dtype: Dtype,
    ahead: int | None = None,
) -> Took:
    """Run one job.

    Args:
        backend: The backend.
        worker: The device worker, as seen by one tenant.
        shape: Shape of the job.
        dtype: Dtype of all matrices.
        ahead: Most started row blocks; None: one per slot.
    """
    spec = parse_header(_header(shape, dtype), backend.max_columns)
    plan = plan_row_blocks(spec, backend.row_block_bytes, backend.pipeline_depth)
    progress = JobProgress()
    computation = DeviceExecution(spec, plan, backend, worker.device, progress)
    job = object()
    region = await worker.submit(job, partial(backend.empty, plan.region_bytes))
    memory = JobMemory(spec, plan, region)
    _fill(memory.w(), dtype)
    for slot in range(plan.slots):
        block = memory.rows(slot, plan.slot_rows)
        for operand in (block.x, block.dy):
            assert operand is not None
            _fill(operand, dtype)
    begun: deque[asyncio.Future[None]] = deque()
    await worker.submit(job, partial(computation.open, {}))
    try:
        started = time.perf_counter()
        await worker.submit(job, partial(computation.take_w, memory.w()))
        for number in range(-(-shape.m // plan.block_rows)):
            if len(begun) == (ahead or plan.slots):
                await begun.popleft()
            rows = min(plan.block_rows, shape.m - number * plan.block_rows)
            piece = partial(computation.compute_block, memory.rows(number, rows))
            begun.append(worker.begin(job, piece))
        while begun:
            await begun.popleft()
        tensors = JobTensors(spec, None)
        await worker.submit(job, partial(computation.finish, tensors))
        total_s = time.perf_counter() - started
    finally:
        await worker.discard(job)
        computation.close()
    times = progress.times
    return Took(total_s, times.to_device_s, times.computing_s, times.from_device_s)


def _header(shape: Shape, dtype: Dtype) -> job_pb2.Job:
    job = job_pb2.Job(m=shape.m, n=shape.n, k=shape.k, dtype=dtype.proto_name)
    for operand in (job.x, job.w, job.dy, job.y, job.dx, job.dw):
        operand.inline.SetInParent()
    return job


def _fill(array: np.ndarray[Any, Any], dtype: Dtype) -> None:
    """Fill with a million normal numbers, repeated."""
    some = np.random.default_rng(5).standard_normal(1 << 20, np.float32)
    array[...] = np.resize(some.astype(dtype.numpy), array.shape)
