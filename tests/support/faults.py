"""Faults that a server could plausibly have, each with the check that must find it.

A fault spoils what a correct server computes: a real one, over a real socket. So it
shows what `gradwire check` finds, not how a bug would come about.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.matrices import Matrix
from gradwire_server.api import gradient_servicer
from gradwire_server.api.job_service import JobService
from gradwire_server.backends.base import RowBlock
from gradwire_server.backends.numpy.backend import NumpyBackend
from gradwire_server.jobs.stream.pipeline import RowBlockPipeline

DB, DW, DX, Y = Matrix.DB, Matrix.DW, Matrix.DX, Matrix.Y
F16, BF16 = Dtype.FLOAT16, Dtype.BFLOAT16
F32, F64 = Dtype.FLOAT32, Dtype.FLOAT64


def _same_block(job: FaultyJob, block: RowBlock) -> RowBlock:
    return block


def _right(*_: Any) -> None:
    """Spoil nothing."""


@dataclass(frozen=True)
class Fault:
    """What a server does wrong, and which check must find it."""

    name: str
    found_by: str
    dtype: Dtype = F32
    """The dtype with which it is looked for."""
    when: Callable[[FaultyJob], object] = lambda job: True
    """Whether a job is spoilt."""
    spec: Callable[[Any], Any] = lambda spec: spec
    """Changes the job as the backend understands it."""
    w: Callable[[FaultyJob, Any], Any] = lambda job, w: w
    """Changes W."""
    before: Callable[[FaultyJob, RowBlock], RowBlock] = _same_block
    """Changes a row block before it is computed."""
    after: Callable[[FaultyJob, RowBlock], None] = _right
    """Changes the results of a row block in place."""
    sums: Callable[[FaultyJob, dict[Matrix, Any]], None] = _right
    """Changes dW and db, in the dtype in which they are sent, in place."""
    taken: Callable[[Any], Any] = lambda sums: sums
    """Changes the sums that a resumed job brings."""
    patch: Callable[[pytest.MonkeyPatch], None] = _right
    """Changes the server around the backend."""

    def __str__(self) -> str:
        return self.name


class FaultyBackend(NumpyBackend):
    """NumPy with a fault that can be exchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.set(None)

    def set(self, fault: Fault | None) -> None:
        """Have this fault from the next job on, and forget the jobs so far."""
        self.fault = fault
        self.jobs = 0
        self.running = 0
        self.kept: dict[Any, Any] = {}

    def open_job(self, spec: Any, *arguments: Any, **options: Any) -> Any:
        if self.fault is None:
            return super().open_job(spec, *arguments, **options)
        job = super().open_job(self.fault.spec(spec), *arguments, **options)
        return FaultyJob(self, self.fault, job, spec, arguments[0])


class FaultyJob:
    """A job of that backend."""

    def __init__(
        self, backend: FaultyBackend, fault: Fault, job: Any, spec: Any, rows: int
    ) -> None:
        self.backend, self.fault, self.job, self.spec = backend, fault, job, spec
        self.block_rows = rows
        self.number, backend.jobs = backend.jobs, backend.jobs + 1
        self.block = 0
        self.w: Any = None
        self.open, backend.running = True, backend.running + 1
        self.wrong = bool(fault.when(self))

    @property
    def shared(self) -> bool:
        return bool(self.spec.buffers)

    @property
    def square(self) -> bool:
        return self.spec.n == self.spec.k

    @property
    def shape(self) -> tuple[Any, ...]:
        return (self.spec.n, self.spec.k, self.spec.dtype)

    def take_w(self, w: Any) -> None:
        self.w = w.copy()
        self.job.take_w(self.fault.w(self, w) if self.wrong else w)

    def take_sums(self, sums: Any) -> None:
        self.job.take_sums(self.fault.taken(sums))

    def compute_block(self, block: RowBlock) -> None:
        if not self.wrong:
            self.job.compute_block(block)
        else:
            self.job.compute_block(self.fault.before(self, block))
            self.fault.after(self, block)
        self.block += 1

    def copy_sums(self, out: Any) -> None:
        self.job.copy_sums(out)

    def restart_sums(self) -> None:
        self.job.restart_sums()

    def finish(self) -> Any:
        sums = self.job.finish()
        if self.wrong:
            self.fault.sums(self, sums)
        return sums

    def kept_sums(self) -> Any:
        sums = self.job.kept_sums()
        if self.wrong:
            self.fault.sums(self, {each: array.host for each, array in sums.items()})
        return sums

    def close(self) -> None:
        self.backend.running -= self.open
        self.open = False
        self.job.close()


def _zero(matrix: str, *where: Any) -> Callable[[FaultyJob, RowBlock], None]:
    """Make part of a block's y or dx zero."""

    def after(job: FaultyJob, block: RowBlock) -> None:
        result = getattr(block, matrix)
        if result is not None:
            result[where] = 0

    return after


def _zero_from(matrix: str, first: int) -> Callable[[FaultyJob, RowBlock], None]:
    """Make y or dx zero from a row block on."""

    def after(job: FaultyJob, block: RowBlock) -> None:
        if job.block >= first:
            _zero(matrix, ...)(job, block)

    return after


def _zero_sum(matrix: Matrix, *where: Any) -> Callable[[FaultyJob, Any], None]:
    """Make part of dW or db zero."""

    def sums(job: FaultyJob, found: Any) -> None:
        if matrix in found:
            found[matrix][where] = 0

    return sums


def _from_blocks(
    taken: Callable[[FaultyJob, RowBlock], bool], *operands: str
) -> Callable[[FaultyJob, RowBlock], RowBlock]:
    """Leave the other blocks out of dW (with "x"), of db and dX as well (with "dy")."""

    def before(job: FaultyJob, block: RowBlock) -> RowBlock:
        if taken(job, block):
            return block
        nothing = {
            name: np.zeros_like(getattr(block, name))
            for name in operands
            if getattr(block, name) is not None
        }
        return replace(block, **nothing)

    return before


def _mapped(
    change: Callable[[Any], Any], *matrices: str
) -> dict[str, Callable[[FaultyJob, Any], None]]:
    """Change every element of results."""

    def after(job: FaultyJob, block: RowBlock) -> None:
        for name in matrices:
            result = getattr(block, name, None)
            if result is not None:
                result[...] = change(result)

    def sums(job: FaultyJob, found: Any) -> None:
        for matrix, result in found.items():
            if matrix.label in matrices:
                result[...] = change(result)

    return {"after": after, "sums": sums}


ALL = ("y", "dx", "dw", "db")


def _truncated_product(job: FaultyJob, block: RowBlock) -> None:
    """Y in bfloat16, cut off instead of rounded."""
    if block.y is not None and block.y.dtype == ml_dtypes.bfloat16:
        y = block.x.astype(np.float32) @ job.w.astype(np.float32)
        block.y[...] = (y.view(np.uint32) & 0xFFFF0000).view(np.float32)


def _by_way_of(dtype: Any) -> Callable[[FaultyJob, RowBlock], None]:
    """Y rounded to one dtype, and then to its own."""

    def after(job: FaultyJob, block: RowBlock) -> None:
        if block.y is not None:
            sums_in = job.spec.dtype.sums_in.numpy
            y = block.x.astype(sums_in) @ job.w.astype(sums_in)
            block.y[...] = y.astype(dtype).astype(np.float32)

    return after


def _largest(result: Any) -> Any:
    """The largest number instead of infinity."""
    most = ml_dtypes.finfo(result.dtype).max
    wide = result.astype(np.float64)
    return np.where(np.isinf(wide), np.sign(wide) * float(most), wide)


def _nan_as_zero(result: Any) -> Any:
    return np.where(np.isnan(result.astype(np.float64)), 0, result)


def _flushed(result: Any) -> Any:
    tiny = ml_dtypes.finfo(result.dtype).tiny
    return np.where(np.abs(result.astype(np.float64)) < float(tiny), 0, result)


def _operands(
    change: Callable[[Any], Any],
) -> dict[str, Callable[[FaultyJob, Any], Any]]:
    def before(job: FaultyJob, block: RowBlock) -> RowBlock:
        return replace(
            block,
            x=None if block.x is None else change(block.x),
            dy=None if block.dy is None else change(block.dy),
        )

    return {"before": before, "w": lambda job, w: change(w)}


def _flushed_operand(operand: Any) -> Any:
    return np.asarray(_flushed(operand), operand.dtype)


def _tf32(operand: Any) -> Any:
    if operand.dtype != np.float32:
        return operand
    bits = np.ascontiguousarray(operand).view(np.uint32)
    return ((bits + 0x1000) & 0xFFFFE000).view(np.float32)


def _in_float32(operand: Any) -> Any:
    return operand.astype(np.float32).astype(operand.dtype)


def _summed_in_float16(job: FaultyJob, block: RowBlock) -> None:
    if block.y is not None and block.y.dtype == np.float16:
        block.y[...] = 0
        for column in range(job.spec.n):
            block.y[...] += block.x[:, column, None] * job.w[column]


def _wrong_transpose(job: FaultyJob, block: RowBlock) -> None:
    """dX = dY times W read as if it were (k, n)."""
    if block.dx is not None:
        block.dx[...] = block.dy @ job.w.reshape(job.w.shape[::-1])


def _stale_w(job: FaultyJob, w: Any) -> Any:
    return job.backend.kept.setdefault(job.shape, w.copy())


def _sums_not_cleared(job: FaultyJob, sums: Any) -> None:
    before = job.backend.kept.get(job.shape)
    if DW in sums:
        job.backend.kept[job.shape] = sums[DW].copy()
        if before is not None:
            sums[DW][...] += before


def _results_overwritten(job: FaultyJob, block: RowBlock) -> None:
    """A job writes to the memory of the results of the job before."""
    if block.y is not None:
        earlier = job.backend.kept.get("y")
        if earlier is not None and earlier.shape == block.y.shape:
            earlier[...] = 0
        job.backend.kept["y"] = block.y


def _w_of_the_last_job(job: FaultyJob, block: RowBlock) -> None:
    if block.y is not None and block.y.dtype == np.float32:
        block.y[...] = block.x @ job.backend.kept[job.shape]


def _remember_w(job: FaultyJob, w: Any) -> Any:
    job.backend.kept[job.shape] = w.copy()
    return w


def _lost_beside_others(job: FaultyJob, block: RowBlock) -> RowBlock:
    alone = job.backend.running == 1
    return _from_blocks(lambda *_: alone, "x")(job, block)


def _compute_alone_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = JobService.run

    async def run(*arguments: Any) -> Any:
        results = await right(*arguments)
        if DX in results:
            results[DX] = -results[DX]
        return results

    monkeypatch.setattr(JobService, "run", run)


def _small_calls_share_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer is taken from a cache by the header without the operands."""
    right = JobService.run
    answers: dict[Any, Any] = {}

    async def run(self: Any, call: Any, size: int, operands: Any) -> Any:
        spec = call.header.spec
        key = (spec.m, spec.n, spec.k, spec.dtype, tuple(spec.results.items()))
        return answers.setdefault(key, await right(self, call, size, operands))

    monkeypatch.setattr(JobService, "run", run)


def _chunks_within_rows_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = RowBlockPipeline.chunks

    def chunks(self: Any, matrix: Any, first_row: int, array: Any) -> Any:
        for chunk in right(self, matrix, first_row, array):
            if matrix is DX and chunk.index % array.shape[1]:
                np.frombuffer(chunk.payload, np.uint8)[:8] = 0
            yield chunk

    monkeypatch.setattr(RowBlockPipeline, "chunks", chunks)


def _other_connections_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the peer of the first call gets right results of Compute."""
    right_scope, right_run = gradient_servicer.call_scope, JobService.run
    peers: list[str] = []

    async def call_scope(service: Any, method: str, context: Any, serve: Any) -> Any:
        peers.append(context.peer())
        return await right_scope(service, method, context, serve)

    async def run(*arguments: Any) -> Any:
        results = await right_run(*arguments)
        if peers[-1] != peers[0] and Y in results:
            results[Y] = results[Y][::-1].copy()
        return results

    monkeypatch.setattr(gradient_servicer, "call_scope", call_scope)
    monkeypatch.setattr(JobService, "run", run)


def _streams_of_known_length_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = RowBlockPipeline.compute

    def compute(self: Any, number: int, block: Any) -> Any:
        wait = right(self, number, block)
        if self.spec.m is not None and block.dx is not None:
            block.dx[-1] = 0
        return wait

    monkeypatch.setattr(RowBlockPipeline, "compute", compute)


def _accumulator_ignored(spec: Any) -> Any:
    return replace(spec, dw_accumulator=spec.dtype.sums_in)


def _only(*results: Matrix) -> Callable[[FaultyJob], bool]:
    return lambda job: tuple(job.spec.results) == results


def _multiple_of_8(job: FaultyJob, block: RowBlock) -> bool:
    return block.rows % 8 == 0


_SHAPES = (
    Fault(
        "W transposed if square",
        "shapes",
        when=lambda job: job.square,
        w=lambda job, w: np.ascontiguousarray(w.T),
    ),
    Fault(
        "W transposed if square and large",
        "wide",
        when=lambda job: job.square and job.spec.n > 1000,
        w=lambda job, w: np.ascontiguousarray(w.T),
    ),
    Fault("W read as (k, n)", "finite differences", F64, after=_wrong_transpose),
    Fault(
        "dW transposed",
        "products",
        sums=lambda job, sums: (
            sums[DW].__setitem__(..., sums[DW].T.reshape(sums[DW].shape).copy())
            if DW in sums
            else None
        ),
    ),
    Fault("Y zero beyond column 128", "shapes", after=_zero("y", ..., np.s_[128:])),
    Fault("Y zero beyond column 512", "wide", after=_zero("y", ..., np.s_[512:])),
    Fault("dX zero beyond column 1024", "wide", after=_zero("dx", ..., np.s_[1024:])),
    Fault("dW zero beyond column 1024", "wide", sums=_zero_sum(DW, ..., np.s_[1024:])),
    Fault("dW zero beyond row 1024", "wide", sums=_zero_sum(DW, np.s_[1024:])),
    Fault("db zero beyond column 256", "shapes", sums=_zero_sum(DB, ..., np.s_[256:])),
    Fault(
        "Y zero beyond column 65,536",
        "long rows",
        after=_zero("y", ..., np.s_[1 << 16 :]),
    ),
    Fault(
        "dX zero beyond column 65,536",
        "long rows",
        after=_zero("dx", ..., np.s_[1 << 16 :]),
    ),
    Fault(
        "dW zero beyond row 65,536", "long rows", sums=_zero_sum(DW, np.s_[1 << 16 :])
    ),
    Fault(
        "Y zero if m is 1",
        "shapes",
        when=lambda job: job.spec.m == 1,
        after=_zero("y", ...),
    ),
    Fault(
        "dX zero if k is 1",
        "shapes",
        when=lambda job: job.spec.k == 1,
        after=_zero("dx", ...),
    ),
    Fault(
        "Y doubled if n is 1",
        "shapes",
        when=lambda job: job.spec.n == 1,
        **_mapped(lambda y: 2 * y, "y"),
    ),
    Fault(
        "dW of no rows not zero",
        "zero sizes",
        when=lambda job: job.spec.m == 0,
        **_mapped(lambda dw: dw + 1, "dw"),
    ),
    Fault(
        "empty sums of Y not zero",
        "zero sizes",
        when=lambda job: job.spec.n == 0,
        **_mapped(lambda y: y + 1, "y"),
    ),
    Fault(
        "rows beyond a multiple of 8 not in dW",
        "shapes",
        before=_from_blocks(_multiple_of_8, "x"),
    ),
    Fault(
        "last column of dX zero if n is odd",
        "shapes",
        when=lambda job: job.spec.n % 2,
        after=_zero("dx", ..., np.s_[-1:]),
    ),
)

_ROW_BLOCKS = (
    Fault(
        "dW ends after three blocks",
        "row blocks",
        before=_from_blocks(lambda job, block: job.block < 3, "x"),
    ),
    Fault(
        "dW ends after twenty blocks",
        "spread",
        before=_from_blocks(lambda job, block: job.block < 20, "x"),
    ),
    Fault(
        "db ends after one block",
        "row blocks",
        before=_from_blocks(lambda job, block: job.block < 1, "dy"),
    ),
    Fault("Y zero from block 5 on", "row blocks", after=_zero_from("y", 5)),
    Fault("dX zero from block 16 on", "row blocks", after=_zero_from("dx", 16)),
    Fault(
        "dW of several blocks wrong for n > 8",
        "row blocks",
        when=lambda job: job.spec.n > 8,
        before=_from_blocks(lambda job, block: job.block != 1, "x"),
    ),
    Fault(
        "dW of several blocks ends at column 128",
        "wide blocks",
        F64,
        when=lambda job: job.spec.k > 128,
        before=lambda job, block: (
            replace(block, dy=np.where(np.arange(job.spec.k) < 128, block.dy, 0))
            if job.block
            else block
        ),
    ),
    Fault(
        "columns of dX beyond 512 zero in the second block",
        "wide blocks",
        after=lambda job, block: (
            _zero("dx", ..., np.s_[512:])(job, block) if job.block == 1 else None
        ),
    ),
    Fault(
        "last, short block not in dW",
        "row blocks",
        before=_from_blocks(
            lambda job, block: not job.block or block.rows == job.block_rows, "x"
        ),
    ),
    Fault(
        "last block of full blocks counts twice",
        "row blocks",
        when=lambda job: job.spec.m and not job.shared,
        before=lambda job, block: (
            replace(block, x=2 * block.x)
            if job.block and (job.block + 1) * job.block_rows == job.spec.m
            else block
        ),
    ),
    Fault(
        "rows of a block beyond 4,096 zero",
        "row blocks",
        after=_zero("y", np.s_[4096:]),
    ),
    Fault(
        "one wrong bit in the second block",
        "row blocks",
        after=lambda job, block: (
            block.y.view(np.uint8)
            .reshape(-1)
            .__setitem__(0, block.y.view(np.uint8).flat[0] ^ 1)
            if job.block == 1
            else None
        ),
    ),
    Fault(
        "dW over blocks in float32 for float64",
        "row blocks",
        F64,
        when=lambda job: job.spec.m is None,
        **_mapped(_in_float32, "dw"),
    ),
    Fault(
        "float64 accumulator ignored",
        "float64 sum",
        spec=_accumulator_ignored,
    ),
    Fault(
        "float64 accumulator ignored for bfloat16",
        "float64 sum",
        BF16,
        spec=_accumulator_ignored,
    ),
)

_ARITHMETIC = (
    Fault("bfloat16 cut off", "rounding", BF16, after=_truncated_product),
    Fault(
        "float64 to bfloat16 rounded twice",
        "rounding",
        F64,
        after=_by_way_of(np.float32),
        when=lambda job: job.spec.results.get(Y) is BF16,
    ),
    Fault(
        "float32 to bfloat16 rounded twice",
        "rounding",
        F32,
        after=_by_way_of(np.float16),
        when=lambda job: job.spec.results.get(Y) is BF16,
    ),
    Fault(
        "wider result rounded first",
        "rounding",
        F16,
        after=_by_way_of(np.float16),
        when=lambda job: job.spec.results.get(Y) is F32,
    ),
    Fault("float16 summed in float16", "products", F16, after=_summed_in_float16),
    Fault("float32 in TF32", "products", **_operands(_tf32)),
    Fault(
        "TF32 in streams only",
        "call = stream",
        **_operands(_tf32),
        when=lambda job: job.spec.m is None,
    ),
    Fault("float64 in float32", "products", F64, **_operands(_in_float32)),
    Fault(
        "the largest float16 for Inf", "overflow to Inf", F16, **_mapped(_largest, *ALL)
    ),
    Fault(
        "the largest float32 for Inf", "overflow to Inf", F32, **_mapped(_largest, *ALL)
    ),
    Fault("zero for NaN in Y", "NaN and Inf", F32, **_mapped(_nan_as_zero, "y")),
    Fault("zero for NaN in dW", "NaN and Inf", F64, **_mapped(_nan_as_zero, "dw")),
    Fault("zero for NaN in db", "NaN and Inf", BF16, **_mapped(_nan_as_zero, "db")),
    Fault("the largest number for Inf", "NaN and Inf", F32, **_mapped(_largest, "dx")),
    Fault(
        "subnormal float32 results zero", "subnormals", F32, **_mapped(_flushed, *ALL)
    ),
    Fault(
        "subnormal float16 results zero", "subnormals", F16, **_mapped(_flushed, "dw")
    ),
    Fault(
        "subnormal bfloat16 operands zero",
        "subnormals",
        BF16,
        **_operands(_flushed_operand),
    ),
    Fault(
        "subnormal float64 operands zero",
        "subnormals",
        F64,
        **_operands(_flushed_operand),
    ),
)

_STATE = (
    Fault("a stale W of the same shape", "products", w=_stale_w),
    Fault(
        "a stale W of the same shape in streams",
        "call = stream",
        when=lambda job: job.spec.m is None,
        w=_stale_w,
    ),
    Fault(
        "a stale W of the same shape in shared memory",
        "call = shared memory",
        when=lambda job: job.shared,
        w=_stale_w,
    ),
    Fault("dW not cleared between jobs", "products", sums=_sums_not_cleared),
    Fault(
        "an answer for equal headers", "products", patch=_small_calls_share_an_answer
    ),
    Fault(
        "every second job wrong",
        "products",
        when=lambda job: job.number % 2,
        after=_zero("y", ...),
    ),
    Fault(
        "wrong from the tenth job on",
        "shapes",
        when=lambda job: job.number > 9,
        after=_zero("y", ...),
    ),
    Fault(
        "results overwritten by the next job",
        "call = shared memory",
        when=lambda job: job.shared,
        after=_results_overwritten,
    ),
    Fault(
        "W of the job that began last",
        "concurrent jobs",
        w=_remember_w,
        after=_w_of_the_last_job,
    ),
    Fault("dW lost beside other jobs", "concurrent jobs", before=_lost_beside_others),
)

_WAYS = (
    Fault("wrong in Compute only", "products", patch=_compute_alone_is_wrong),
    Fault(
        "wrong in streams of unknown length only",
        "call = stream",
        when=lambda job: job.spec.m is None,
        after=_zero("y", np.s_[:1]),
    ),
    Fault(
        "wrong in streams of known length only",
        "call = stream",
        patch=_streams_of_known_length_are_wrong,
    ),
    Fault(
        "wrong in shared memory only",
        "call = shared memory",
        when=lambda job: job.shared,
        after=_zero("dx", np.s_[-1:]),
    ),
    Fault(
        "dW ends after four blocks in shared memory",
        "shared blocks",
        when=lambda job: job.shared,
        before=_from_blocks(lambda job, block: job.block < 4, "x"),
    ),
    Fault(
        "wrong on direct connections only",
        "call = direct",
        when=lambda job: job.spec.direct,
        after=_zero("dx", np.s_[-1:]),
    ),
    Fault(
        "dW ends after four blocks on direct connections",
        "direct blocks",
        when=lambda job: job.spec.direct,
        before=_from_blocks(lambda job, block: job.block < 4, "x"),
    ),
    Fault(
        "wrong over other connections",
        "call = other connection",
        patch=_other_connections_are_wrong,
    ),
    Fault(
        "wrong with checksums only",
        "call = with checksum",
        when=lambda job: job.spec.checksum,
        after=_zero("dx", np.s_[:1]),
    ),
    Fault(
        "wrong if a message begins within a row",
        "long rows",
        F64,
        patch=_chunks_within_rows_are_wrong,
    ),
    Fault(
        "checkpoint counts twice after resuming",
        "resumed job",
        taken=lambda sums: {matrix: 2 * array for matrix, array in sums.items()},
    ),
    Fault(
        "checkpoint lost in resuming",
        "resumed job",
        taken=lambda sums: {matrix: 0 * array for matrix, array in sums.items()},
    ),
    Fault(
        "Y zero after resuming",
        "resumed job",
        when=lambda job: job.spec.resume is not None,
        after=_zero("y", ...),
    ),
    Fault(
        "Y alone wrong", "call = one result", when=_only(Y), after=_zero("y", np.s_[:1])
    ),
    Fault(
        "dX alone wrong",
        "call = one result",
        when=_only(DX),
        after=_zero("dx", np.s_[:1]),
    ),
    Fault("dW alone wrong", "call = one result", when=_only(DW), sums=_zero_sum(DW, 0)),
    Fault(
        "db alone wrong",
        "call = one result",
        when=_only(DB),
        sums=_zero_sum(DB, ..., 0),
    ),
)

FAULTS = (*_SHAPES, *_ROW_BLOCKS, *_ARITHMETIC, *_STATE, *_WAYS)
