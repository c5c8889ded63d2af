"""The NumPy backend: one device, the CPU, with NumPy's BLAS."""

from __future__ import annotations

import functools
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import numpy.typing as npt

from gradwire_protocol.dtypes import Dtype, rounded
from gradwire_protocol.job_spec import JobSpec
from gradwire_protocol.limits import MIB
from gradwire_protocol.matrices import ROW_RESULTS, Matrix
from gradwire_server.backends.base import (
    Array,
    DeviceInfo,
    RowBlock,
    Sums,
    Times,
    empty_aligned,
)
from gradwire_server.backends.host_limits import memory_bytes
from gradwire_server.backends.kept_memory import KeptArray
from gradwire_server.backends.numpy.kept_memory import HostArray, HostMemory
from gradwire_server.backends.numpy.worker_threads import (
    Piece,
    WorkerThreads,
    blas_kernel,
    limit_blas,
)
from gradwire_server.backends.products import compute_block
from gradwire_server.backends.row_blocks import held_in

PARTS = 4
"""Most pieces of a product, cut along its longer side and shared by the threads. There
are more if dW's tiles must be smaller."""

PIECE = 512
"""Rows or columns of a piece of a large product; SMALL_PIECE for small ones. BLAS packs
the operand that is not cut once for each piece, so pieces must not be too small."""

SMALL_PIECE = 128

INLINE_BELOW_OPS = 1 << 22
"""The device worker's thread computes products with fewer multiplications and additions
alone, because waking another thread would take as long."""

TILE_BYTES = 16 * MIB
"""Largest tile of a block's contribution to a sum that a thread computes at once before
adding it. So no second n x k matrix is needed."""


class NumpyBackend:
    """Computes on the CPU.

    Args:
        threads: Number of computing threads. Each calls single-threaded BLAS: BLAS is
            limited to one thread in the whole process until `close`. 0: one computing
            thread, and BLAS is unchanged.
        niceness: Niceness of the threads, added to the process's.
    """

    name = "numpy"
    max_columns = 2**31 - 1
    inline_below_ops = INLINE_BELOW_OPS
    row_block_bytes = 16 * MIB
    pipeline_depth = 1

    def __init__(self, threads: int = 0, niceness: int = 0) -> None:
        self._blas = limit_blas() if threads else None
        self._threads = WorkerThreads(threads if self._blas else 1, niceness)
        blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
        self._libraries = {
            "numpy": np.__version__,
            blas["name"]: blas["version"],
            "blas-kernel": blas_kernel(),
        }
        self.devices: tuple[DeviceInfo, ...] = (
            DeviceInfo(
                backend=self.name,
                index=0,
                name=_processor(),
                memory_bytes=memory_bytes(),
                library=", ".join(" ".join(item) for item in self._libraries.items()),
                threads=1 if self._blas else _blas_threads(),
                in_host_memory=True,
                sums_rounded_to_nearest=tuple(Dtype),
                ignores_tf32=True,
            ),
        )

    def init_thread(self, device: int) -> None:
        """Make the device worker's thread one of the worker threads."""
        del device
        self._threads.enter()

    def job_bytes(self, spec: JobSpec, block_rows: int) -> int:
        """Return the size of the accumulator, widened copies and scratch."""
        scratch = sum(
            rows * columns
            for rows, columns in _scratch_shapes(spec, block_rows).values()
        )
        if Matrix.DB in spec.results:
            scratch += block_rows
        size = scratch * spec.dtype.sums_in.itemsize
        held = held_in(spec, block_rows)
        for result in spec.sums:
            if not _sums_in_place(spec, result, held):
                elements = math.prod(result.shape(0, spec.n, spec.k))
                size += elements * held.itemsize
            if spec.results[result] != held:
                size += spec.size_bytes(result)
        tile = _tile_elements(spec)
        return size + self._threads.count * tile * spec.dtype.sums_in.itemsize

    def device_bytes(self, spec: JobSpec, block_rows: int) -> int:
        """Return 0: all memory is host memory."""
        del spec, block_rows
        return 0

    def kept_bytes(self, keep_bytes: int) -> int:
        """Return 0: all memory is host memory."""
        del keep_bytes
        return 0

    def open_kept(self, keep_bytes: int, device: int) -> HostMemory:
        """Open a session's memory, which is allocated array by array."""
        del keep_bytes, device
        return HostMemory()

    def empty(self, size_bytes: int) -> npt.NDArray[np.uint8]:
        """Allocate ordinary, aligned memory."""
        return empty_aligned(size_bytes)

    def pin(self, memory: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Return the memory itself: the device computes in host memory."""
        return memory

    def open_job(
        self,
        spec: JobSpec,
        block_rows: int,
        device: int,
        *,
        times: Times,
        sums: Sums | None = None,
        kept: Mapping[Matrix, KeptArray] | None = None,
    ) -> NumpyJob:
        """Open a job; `device` is 0. Kept operands are in row blocks, as all others."""
        del device, kept
        return NumpyJob(spec, block_rows, self._threads, times, sums or {})

    def close(self) -> None:
        """End the threads, and restore BLAS's own threads."""
        self._threads.close()
        if self._blas is not None:
            self._blas.restore_original_limits()

    def libraries(self) -> dict[str, str]:
        """Return the versions of NumPy and its BLAS, and the kernels chosen by BLAS."""
        return self._libraries


class NumpyJob:
    """A job on the CPU, with W, the accumulators of sums, and scratch."""

    def __init__(
        self,
        spec: JobSpec,
        block_rows: int,
        threads: WorkerThreads,
        times: Times,
        places: Sums,
    ) -> None:
        self._spec = spec
        self._times = times
        self._threads = threads
        self._scratch = {
            purpose: np.empty(shape, spec.dtype.sums_in.numpy)
            for purpose, shape in _scratch_shapes(spec, block_rows).items()
        }
        self._ones: Array | None = None
        if Matrix.DB in spec.results:
            self._ones = np.ones((block_rows, 1), spec.dtype.sums_in.numpy)
        self._tiles: SimpleQueue[Array] = SimpleQueue()
        tile_elements = _tile_elements(spec)
        for _ in range(threads.count):
            self._tiles.put(np.empty(tile_elements, spec.dtype.sums_in.numpy))
        self._w: Array | None = None
        held = held_in(spec, block_rows)
        self._sums = {
            result: places[result]
            if result in places and _sums_in_place(spec, result, held)
            else np.empty(result.shape(0, spec.n, spec.k), held.numpy)
            for result in spec.sums
        }
        self._begun = False
        """Whether there are sums, of row blocks or those that were taken."""

    def take_w(self, w: Array) -> None:
        """Take W, shape (n, k)."""
        with self._times.computing(), np.errstate(all="ignore"):
            self._w = self._widened("w", w)

    def take_sums(self, sums: Sums) -> None:
        """Continue these sums."""
        for result, own in self._sums.items():
            np.copyto(own, sums[result])
        self._begun = True

    def compute_block(self, block: RowBlock) -> None:
        """Compute y and dx of the block, and add its contribution to the sums."""
        # NaN, Inf and overflow are valid results, so no warnings are needed.
        with self._times.computing(), np.errstate(all="ignore"):
            products = _Products(self._tiles, first=not self._begun)
            compute_block(
                products,
                w=self._w,
                x=self._widened("x", block.x),
                dy=self._widened("dy", block.dy),
                y=self._result(Matrix.Y, block.y),
                dx=self._result(Matrix.DX, block.dx),
                ones=None if self._ones is None else self._ones[: block.rows],
                sums=self._sums,
            )
            try:
                operations = self._spec.row_operations * block.rows
                self._threads.run(products.pieces, inline=operations < INLINE_BELOW_OPS)
            finally:
                # Pieces refer to their products. This cycle would keep the block's
                # memory until the next garbage collection.
                products.pieces.clear()
        self._begun = True

    def copy_sums(self, out: Sums) -> None:
        """Copy the sums over the blocks so far."""
        for result, own in self._sums.items():
            if self._begun:
                np.copyto(out[result], own)
            else:
                out[result].fill(0)

    def restart_sums(self) -> None:
        """Begin the sums anew."""
        self._begun = False

    def kept_sums(self) -> Mapping[Matrix, KeptArray]:
        """Return the sums that stay, rounded once from the accumulator."""
        sums = self._rounded(self._spec.into)
        return {result: HostArray(array) for result, array in sums.items()}

    def finish(self) -> Sums:
        """Return the sums to send, rounded once from the accumulator."""
        return self._rounded(each for each in self._sums if each not in self._spec.into)

    def _rounded(self, results: Iterable[Matrix]) -> Sums:
        with self._times.computing(), np.errstate(all="ignore"):
            if not self._begun:
                for own in self._sums.values():
                    own.fill(0)
            return {
                result: rounded(self._sums[result], self._spec.results[result])
                for result in results
            }

    def close(self) -> None:
        """Do nothing: the memory is released with the job."""

    def _widened(self, purpose: str, given: Array | None) -> Array | None:
        """Return `given` in the dtype of the sums: itself, or a copy in scratch.

        NumPy's own products of 16-bit arrays are slow and round every step. An operand
        that shares memory with another one is copied, too.
        """
        if given is None or purpose not in self._scratch:
            return given
        copy = self._scratch[purpose][: len(given)]
        np.copyto(copy, given)
        return copy

    def _result(self, matrix: Matrix, result: Array | None) -> _Result | None:
        """Return the memory in which a result is computed: its own, or scratch."""
        if result is None:
            return None
        scratch = self._scratch.get(matrix.label)
        computed = result if scratch is None else scratch[: len(result)]
        return _Result(result, computed, self._spec.results[matrix])


@dataclass(frozen=True, slots=True)
class _Result:
    """Rows of Y or dX, and memory in the dtype of the sums to compute them in."""

    rounded: Array
    computed: Array
    dtype: Dtype
    """Of `rounded`."""


class _Products:
    """Products with NumPy's BLAS, cut into pieces for the worker threads.

    Transposes are flags of BLAS's call, never copies. The cuts, and so the bits of a
    product, depend only on its shape.
    """

    def __init__(self, tiles: SimpleQueue[Array], *, first: bool) -> None:
        self.pieces: list[Piece] = []
        self._tiles = tiles
        self._first = first

    def multiply(self, a: Array, b: Array, out: _Result) -> None:
        for rows, columns in _tiles(*out.computed.shape):
            self.pieces.append(
                partial(_multiply, a[rows], b[:, columns], out, (rows, columns))
            )

    def multiply_transposed(self, a: Array, b: Array, out: _Result) -> None:
        self.multiply(a, b.T, out)

    def accumulate_transposed(self, a: Array, b: Array, out: Array) -> None:
        most = TILE_BYTES // b.dtype.itemsize
        # The largest pieces come first, so that all threads end at about the same time.
        self.pieces[:0] = [
            partial(self._accumulate, a[:, rows].T, b[:, columns], out[rows, columns])
            for rows, columns in _tiles(len(out), out.shape[1], most)
        ]

    def _accumulate(self, a: Array, b: Array, out: Array) -> None:
        if self._first and out.dtype == b.dtype:
            np.matmul(a, b, out=out)
            return
        tile = self._tiles.get()
        try:
            share = tile[: out.size].reshape(out.shape)
            np.matmul(a, b, out=share)
            if self._first:
                np.copyto(out, share)
            else:
                np.add(out, share, out=out)
        finally:
            self._tiles.put(tile)


def _multiply(a: Array, b: Array, out: _Result, part: tuple[slice, slice]) -> None:
    np.matmul(a, b, out=out.computed[part])
    if out.rounded is not out.computed:
        rounded(out.computed[part], out.dtype, out.rounded[part])


@functools.lru_cache(512)
def _tiles(
    rows: int, columns: int, most_elements: int | None = None
) -> Sequence[tuple[slice, slice]]:
    """Return the pieces of a product, cut by rows or by columns.

    Every piece needs one whole operand, which BLAS packs again for each piece. The
    longer side is cut, so that this is the smaller operand. The first piece is the
    largest.
    """
    if not rows or not columns:
        return ()
    length, other = max(rows, columns), min(rows, columns)
    size = max(-(-length // PARTS), min(PIECE, -(-length // 2)), SMALL_PIECE)
    if most_elements is not None:
        size = max(min(size, most_elements // other), 1)
    cuts = [slice(at, min(at + size, length)) for at in range(0, length, size)]
    whole = slice(None)
    if rows >= columns:
        return tuple((cut, whole) for cut in cuts)
    return tuple((whole, cut) for cut in cuts)


def _sums_in_place(spec: JobSpec, result: Matrix, held: Dtype) -> bool:
    """Return whether a result, held in a dtype, is summed in its own memory."""
    return result in spec.buffers and spec.results[result] == held


def _scratch_shapes(spec: JobSpec, block_rows: int) -> dict[str, tuple[int, int]]:
    """Return the shapes of a job's scratch, in the dtype of its sums, by purpose.

    Operands are widened if products are summed in a wider dtype, and results are
    computed in scratch if they are rounded. An operand that shares memory with another
    one is copied, too: NumPy multiplies a matrix by its own transpose with BLAS's SYRK,
    whose bits differ from GEMM's.
    """
    n, sums_in = spec.n, spec.dtype.sums_in
    shapes: dict[str, tuple[int, int]] = {}
    for position, operand in enumerate(spec.operands):
        before = spec.operands[:position]
        shared = any(spec.share_memory(operand, other) for other in before)
        if shared or spec.dtype != sums_in:
            rows = n if operand is Matrix.W else block_rows
            shapes[operand.label] = (rows, spec.row_length(operand))
    for result in ROW_RESULTS:
        if spec.results.get(result, sums_in) != sums_in:
            shapes[result.label] = (block_rows, spec.row_length(result))
    return shapes


def _tile_elements(spec: JobSpec) -> int:
    """Return the number of elements of each thread's tile."""
    most = 0
    for result in spec.sums:
        n, k = result.shape(0, spec.n, spec.k)
        cuts = _tiles(n, k, TILE_BYTES // spec.dtype.sums_in.itemsize)
        if cuts:
            rows, columns = cuts[0]
            elements = len(range(n)[rows]) * len(range(k)[columns])
            most = max(most, elements)
    return most


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2] for line in lines if line.startswith("model name")]
    return names[0].strip() if names else platform.machine()


def _blas_threads() -> int:
    """Return the number of threads that BLAS starts when it is loaded."""
    for variable in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        value = os.environ.get(variable, "")
        if value.isdigit() and int(value):
            return int(value)
    # A quota of processor time is nothing that BLAS asks for.
    return len(os.sched_getaffinity(0))
