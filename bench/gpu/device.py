"""The three products on a device alone: the backend compared with a library.

Operands and results are on the device. A turn repeats all three products for a tenth
of a second, between two events of the device's clock. Turns alternate.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bench.gpu.parts import Answer, Options, median
from bench.report.bound import Bound
from gradwire_protocol.dtypes import Dtype
from gradwire_server.backends.async_device import gemm
from gradwire_server.backends.async_device.device import Stream
from gradwire_server.backends.async_device.gemm import Compute, DeviceMatrix

SIDES = (1024, 4096, 8192)
MODES = {
    "float32": (Dtype.FLOAT32, False),
    "tf32": (Dtype.FLOAT32, True),
    "bfloat16": (Dtype.BFLOAT16, False),
    "float64": (Dtype.FLOAT64, False),
}
"""Element type of the operands, and whether TF32 is allowed."""

LEAST = 0.95
"""Minimum rate of the backend, relative to the library's."""

_TURN_S = 0.1
_ROUNDS = 7

Run = Callable[[int], float]
"""Runs all three products N times; returns seconds by the device's clock."""


def measure(options: Options) -> Answer:
    """Measure operations a second of the backend and the library."""
    if options.backend != "cupy":
        return Answer("device", skipped="there is no device beside the processor")
    rows = []
    for side in map(options.scaled, SIDES):
        for mode, (dtype, tf32) in MODES.items():
            ours = _ours(side, dtype, tf32=tf32)
            name, theirs = _theirs(side, dtype, tf32=tf32)
            ours_s, theirs_s = _in_turns((ours, theirs), 2 if options.quick else 1)
            operations = 6 * side**3
            rows.append(
                {
                    "side": side,
                    "mode": mode,
                    "ours TFLOP/s": operations / ours_s / 1e12,
                    "library": name,
                    "library TFLOP/s": operations / theirs_s / 1e12,
                    "ratio": theirs_s / ours_s,
                }
            )
    return Answer("device", rows, judge=_bars)


def _bars(rows: Sequence[dict[str, Any]], _: dict[str, Any]) -> Iterable[Bound]:
    for row in rows:
        name = f"rate of {row['mode']} products at {row['side']}³ over {row['library']}"
        yield Bound(name, row["ratio"], LEAST, at_least=True)


def _in_turns(runs: Sequence[Run], fewer: int) -> list[float]:
    """Seconds of the three products: the median of turns."""
    counts = []
    for run in runs:
        run(2)  # select and load kernels, allocate workspaces
        counts.append(max(int(_TURN_S / max(run(1), 1e-6)), 1))
    took: list[list[float]] = [[] for _ in runs]
    for _ in range(_ROUNDS // fewer):
        for run, count, samples in zip(runs, counts, took, strict=True):
            samples.append(run(count) / count)
    return [median(samples) for samples in took]


def _ours(side: int, dtype: Dtype, *, tf32: bool) -> Run:
    from cupy.cuda import Event, get_elapsed_time  # noqa: PLC0415

    from gradwire_server.backends.cuda import host  # noqa: PLC0415
    from gradwire_server.backends.cuda.memory_pool import Pool  # noqa: PLC0415

    pool: Pool[Any] = Pool(host.allocate, max_free_bytes=0)
    device = host.CupyDevice(0, pool)
    compute = Compute.of(dtype, allow_tf32=tf32)
    # For 16-bit operands dW is summed in float32, as in a job.
    types = dict.fromkeys(("x", "w", "dy", "y", "dx"), dtype) | {"dw": dtype.sums_in}
    memories = {
        name: device.allocate(side * side * each.itemsize)
        for name, each in types.items()
    }
    at = {
        name: DeviceMatrix(memories[name].address, side, side, each)
        for name, each in types.items()
    }
    for name in ("x", "w", "dy"):
        _fill(at[name])
    gemms = (
        gemm.multiply(at["x"], at["w"], at["y"], compute),
        gemm.multiply_transposed(at["dy"], at["w"], at["dx"], compute),
        gemm.transposed_multiply(at["x"], at["dy"], at["dw"], compute),
    )
    begin, end = Event(), Event()

    def run(count: int) -> float:
        device.record(Stream.COMPUTE, begin)
        for _ in range(count):
            for each in gemms:
                device.multiply(each)
        device.record(Stream.COMPUTE, end)
        end.synchronize()
        assert memories  # keep them alive until the function returns
        seconds: float = get_elapsed_time(begin, end) / 1000
        return seconds

    return run


def _fill(matrix: DeviceMatrix) -> None:
    """Fill with normal numbers: with zeros the device would run cooler and faster."""
    import cupy  # noqa: PLC0415
    import numpy as np  # noqa: PLC0415

    host = np.random.default_rng(3).standard_normal(matrix.size, np.float32)
    converted = host.astype(matrix.dtype.numpy)
    cupy.cuda.runtime.memcpy(
        matrix.address,
        converted.ctypes.data,
        converted.nbytes,
        cupy.cuda.runtime.memcpyHostToDevice,
    )


def _theirs(side: int, dtype: Dtype, *, tf32: bool) -> tuple[str, Run]:
    if importlib.util.find_spec("torch") is not None:
        return "torch.matmul", _torch(side, dtype, tf32=tf32)
    return "cupy.matmul", _cupy(side, dtype, tf32=tf32)


def _torch(side: int, dtype: Dtype, *, tf32: bool) -> Run:
    import torch  # noqa: PLC0415

    kind = getattr(torch, dtype.label)
    x, w, dy = (torch.randn(side, side, device="cuda").to(kind) for _ in range(3))
    y, dx, dw = (torch.empty_like(x) for _ in range(3))
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def run(count: int) -> float:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        begin.record()
        for _ in range(count):
            torch.matmul(x, w, out=y)
            torch.matmul(dy, w.T, out=dx)
            torch.matmul(x.T, dy, out=dw)
        end.record()
        end.synchronize()
        seconds: float = begin.elapsed_time(end) / 1000
        return seconds

    return run


def _cupy(side: int, dtype: Dtype, *, tf32: bool) -> Run:
    import cupy  # noqa: PLC0415

    random = cupy.random.default_rng(3)
    x, w, dy = (
        random.standard_normal((side, side), dtype="f4").astype(dtype.numpy)
        for _ in range(3)
    )
    y, dx, dw = (cupy.empty_like(x) for _ in range(3))
    begin, end = cupy.cuda.Event(), cupy.cuda.Event()
    mode = cupy.cuda.cublas.CUBLAS_TF32_TENSOR_OP_MATH if tf32 else 0

    def run(count: int) -> float:
        handle = cupy.cuda.get_cublas_handle()
        before = cupy.cuda.cublas.getMathMode(handle)
        cupy.cuda.cublas.setMathMode(handle, mode)
        begin.record()
        for _ in range(count):
            cupy.matmul(x, w, out=y)
            cupy.matmul(dy, w.T, out=dx)
            cupy.matmul(x.T, dy, out=dw)
        end.record()
        end.synchronize()
        # The handle belongs to the thread, so the backend uses the same one.
        cupy.cuda.cublas.setMathMode(handle, before)
        seconds: float = cupy.cuda.get_elapsed_time(begin, end) / 1000
        return seconds

    return run
