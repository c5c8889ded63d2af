"""The NumPy backend: one device, the CPU, through NumPy's BLAS."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import numpy as np

from gradwire.wire.limits import MIB
from gradwire.wire.matrices import ROW_RESULTS, Matrix
from gradwire_server.backends import algebra
from gradwire_server.backends.base import Array, DeviceInfo, RowBlock
from gradwire_server.memory import machine_bytes
from gradwire_server.spec import JobSpec

PANEL_BYTES = 16 * MIB
"""A share of dW is computed and added in panels of rows of about this size,
so that no second n x k matrix is needed. Smaller ones make BLAS pack dY
again too often."""


class NumpyBackend:
    """Computes on the CPU."""

    name = "numpy"
    max_columns = 2**31 - 1

    def __init__(self) -> None:
        self.devices: tuple[DeviceInfo, ...] = (
            DeviceInfo(
                backend=self.name,
                index=0,
                name=_processor(),
                memory_bytes=machine_bytes(),
                library=", ".join(" ".join(item) for item in self.libraries().items()),
                threads=_blas_threads(),
            ),
        )

    def job_bytes(self, spec: JobSpec, block_rows: int) -> int:
        """Bytes of the accumulator, of widened copies and of scratch."""
        scratch = sum(
            rows * columns
            for rows, columns in _scratch_shapes(spec, block_rows).values()
        )
        size = scratch * spec.dtype.sums_in.itemsize
        if Matrix.DW in spec.results:
            dw, result = spec.n * spec.k, spec.results[Matrix.DW]
            size += dw * spec.accumulator.itemsize
            size += dw * result.itemsize if result != spec.accumulator else 0
        return size

    def open_job(self, spec: JobSpec, block_rows: int, device: int) -> NumpyJob:
        """A job; `device` is 0."""
        del device
        return NumpyJob(spec, block_rows)

    def libraries(self) -> dict[str, str]:
        """NumPy's version, and its BLAS's."""
        blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
        return {"numpy": np.__version__, blas["name"]: blas["version"]}


class NumpyJob:
    """A job on the CPU: W, dW's accumulator and scratch."""

    def __init__(self, spec: JobSpec, block_rows: int) -> None:
        self._spec = spec
        self._scratch = {
            purpose: np.empty(shape, spec.dtype.sums_in.numpy)
            for purpose, shape in _scratch_shapes(spec, block_rows).items()
        }
        self._products = _Products(self._scratch.get("panel"))
        self._w: Array | None = None
        self._dw: Array | None = None
        if Matrix.DW in spec.results:
            self._dw = np.zeros((spec.n, spec.k), spec.accumulator.numpy)

    def take_w(self, w: Array) -> None:
        """Takes W, shape (n, k)."""
        self._w = self._widened("w", w)

    def take_block(self, block: RowBlock) -> None:
        """Computes y and dx of the block and adds its share to dW."""
        # NaN, Inf and overflow are data here, not events to warn of.
        with np.errstate(all="ignore"):
            y = self._room("y", block.y)
            dx = self._room("dx", block.dx)
            algebra.take_block(
                self._products,
                w=self._w,
                x=self._widened("x", block.x),
                dy=self._widened("dy", block.dy),
                y=y,
                dx=dx,
                dw=self._dw,
            )
            _round(y, block.y)
            _round(dx, block.dx)

    def finish(self) -> Array:
        """dW, shape (n, k), rounded once from the accumulator."""
        if self._dw is None:
            raise RuntimeError("the job does not want dW")
        with np.errstate(all="ignore"):
            return self._dw.astype(self._spec.results[Matrix.DW].numpy, copy=False)

    def _widened(self, purpose: str, given: Array | None) -> Array | None:
        """`given` in the dtype of the sums: itself, or a copy kept here.

        NumPy's own products of 16-bit arrays are slow and round every step.
        """
        if given is None or purpose not in self._scratch:
            return given
        copy = self._scratch[purpose][: len(given)]
        np.copyto(copy, given)
        return copy

    def _room(self, purpose: str, result: Array | None) -> Array | None:
        """Where a result is computed: in place, or where it can be rounded."""
        if result is None or purpose not in self._scratch:
            return result
        return self._scratch[purpose][: len(result)]


class _Products:
    """Products through NumPy's BLAS; transposes are flags of the call."""

    def __init__(self, panel: Array | None) -> None:
        self._panel = panel

    def multiply(self, a: Array, b: Array, out: Array) -> None:
        np.matmul(a, b, out=out)

    def multiply_transposed(self, a: Array, b: Array, out: Array) -> None:
        np.matmul(a, b.T, out=out)

    def accumulate_transposed(self, a: Array, b: Array, out: Array) -> None:
        if self._panel is None or not out.size:
            return
        for first in range(0, len(out), len(self._panel)):
            rows = out[first : first + len(self._panel)]
            share = self._panel[: len(rows)]
            np.matmul(a[:, first : first + len(rows)].T, b, out=share)
            np.add(rows, share, out=rows)


def _scratch_shapes(spec: JobSpec, block_rows: int) -> dict[str, tuple[int, int]]:
    """Shapes of a job's scratch, in the dtype of its sums, by purpose.

    Operands are widened where products are summed in a wider dtype than
    theirs, results pass through scratch where they are rounded to another
    one, and dW's share passes through a panel.
    """
    n, k, sums_in = spec.n, spec.k, spec.dtype.sums_in
    shapes: dict[str, tuple[int, int]] = {}
    if spec.dtype != sums_in:
        for operand in spec.operands:
            rows = n if operand is Matrix.W else block_rows
            shapes[operand.label] = (rows, spec.row_length(operand))
    for result in ROW_RESULTS:
        if spec.results.get(result, sums_in) != sums_in:
            shapes[result.label] = (block_rows, spec.row_length(result))
    if Matrix.DW in spec.results:
        panel_rows = PANEL_BYTES // max(k * sums_in.itemsize, 1)
        shapes["panel"] = (min(n, max(panel_rows, 1)), k)
    return shapes


def _round(computed: Array | None, result: Array | None) -> None:
    if computed is not None and result is not None and computed is not result:
        np.copyto(result, computed, casting="unsafe")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2] for line in lines if line.startswith("model name")]
    return names[0].strip() if names else platform.machine()


def _blas_threads() -> int:
    """How many threads BLAS starts, as it decides when it is loaded."""
    for variable in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        value = os.environ.get(variable, "")
        if value.isdigit() and int(value):
            return int(value)
    return len(os.sched_getaffinity(0))
