"""The plan of a job: its checked sizes and options, and its header."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace

from gradwire._api.errors import InputError
from gradwire._api.options import Options
from gradwire._arrays.device_copy import HostCopies
from gradwire._arrays.operand import Operand, Source, read
from gradwire._core.block_rows import automatic_block_rows
from gradwire._core.kept import Keeping, Tensor
from gradwire_protocol import limits
from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.job_spec import JobSpec
from gradwire_protocol.matrices import OPERANDS, Matrix, operands_for
from gradwire_protocol.v1.job_pb2 import Job


@dataclass(frozen=True, slots=True)
class Plan:
    """The properties of a job that are fixed before it is sent."""

    m: int | None
    """Number of rows; None while it is unknown."""

    n: int
    """Columns of X, rows of W."""

    k: int
    """Columns of W and of dY."""

    dtype: Dtype
    """Dtype in which the operands are sent."""

    options: Options
    """The options of the call."""

    chunk_bytes: int = limits.DEFAULT_CHUNK_BYTES
    """Largest payload of a chunk, in both directions."""

    kept: Keeping | None = None
    """The operands and results that stay in a session."""

    block_rows: int = 0
    """Most rows of a row block, the same in every attempt; 0: the server's choice."""

    segment_rows: int = 0
    """Rows of a segment, if the sums of each segment are received instead of dW and dB;
    else 0."""

    first_row: int = 0
    """The job's first row within a larger job, for errors."""

    @property
    def results(self) -> tuple[Matrix, ...]:
        """The results to receive."""
        if self.segment_rows:
            return tuple(each for each in self.options.results if each.row_wise)
        if self.kept is None:
            return self.options.results
        into = self.kept.into
        return tuple(each for each in self.options.results if each not in into)

    @property
    def sums(self) -> tuple[Matrix, ...]:
        """The results to receive that are summed over row blocks."""
        return tuple(result for result in self.results if result.is_sum)

    @property
    def sums_of_segments(self) -> tuple[Matrix, ...]:
        """The results of which each segment's sum is received."""
        if not self.segment_rows:
            return ()
        return tuple(each for each in self.options.results if each.is_sum)

    @property
    def operands(self) -> tuple[Matrix, ...]:
        """The operands to send: those that the wanted results need."""
        needed = operands_for(self.options.results)
        if self.kept is None:
            return needed
        return tuple(each for each in needed if each not in self.kept.operands)

    def result_dtype(self, result: Matrix) -> Dtype:
        """Return the dtype in which a result is sent."""
        return self.options.result_dtypes.get(result, self.dtype)

    def array_dtype(self, result: Matrix) -> Dtype:
        """Return the dtype of the caller's array for a result."""
        if self.options.wire_dtype is None:
            return self.result_dtype(result)
        return self.options.result_dtypes.get(result, Dtype.FLOAT32)

    def shape(self, matrix: Matrix, m: int) -> tuple[int, int]:
        """Return the shape of a matrix, if the job has m rows."""
        return matrix.shape(m, self.n, self.k)

    def size_bytes(self, matrix: Matrix, m: int) -> int:
        """Return the size of a matrix, if the job has m rows."""
        rows, columns = self.shape(matrix, m)
        dtype = self.dtype if matrix in OPERANDS else self.result_dtype(matrix)
        return rows * columns * dtype.itemsize

    def upload_bytes(self, m: int) -> int:
        """Return the size of all operands."""
        return sum(self.size_bytes(matrix, m) for matrix in self.operands)

    def download_bytes(self, m: int) -> int:
        """Return the size of all wanted results."""
        return sum(self.size_bytes(matrix, m) for matrix in self.results)

    def elements_per_message(self) -> int:
        """Return the number of elements in a full message, at least 1."""
        return max(1, self.chunk_bytes // self.dtype.itemsize)

    def spec(self) -> JobSpec:
        """Return the job's spec, with all matrices sent in messages."""
        options = self.options
        spec = JobSpec(
            m=self.m,
            n=self.n,
            k=self.k,
            dtype=self.dtype,
            results={each: self.result_dtype(each) for each in options.results},
            dw_accumulator=options.dw_accumulator,
            allow_tf32=options.allow_tf32,
            checksum=options.checksum,
            max_chunk_bytes=self.chunk_bytes,
            features=self._features(),
            block_rows=self.block_rows or None,
            segment_rows=self.segment_rows or None,
            segment_sums=bool(self.segment_rows),
        )
        return spec if self.kept is None else self.kept.applied(spec)

    def _features(self) -> tuple[str, ...]:
        features = (limits.BLOCK_ROWS,) if self.block_rows else ()
        return (*features, limits.SEGMENTS) if self.segment_rows else features

    def header(self) -> Job:
        """Return the header for `spec`.

        Headers are cached without their job ids, because programs with small jobs
        send thousands of equal ones.
        """
        options = self.options
        if self.kept is not None or self.segment_rows:
            return self.spec().to_message(options.job_id)
        results = tuple((result, self.result_dtype(result)) for result in self.results)
        key = (
            *(self.m, self.n, self.k, self.dtype, results, options.dw_accumulator),
            *(options.allow_tf32, options.checksum, self.chunk_bytes, self.block_rows),
        )
        made = _HEADERS.get(key)
        if made is None:
            if len(_HEADERS) >= _MOST_HEADERS:
                _HEADERS.clear()
            made = _HEADERS[key] = self.spec().to_message()
        job = Job()
        job.CopyFrom(made)
        job.job_id = options.job_id
        return job


_HEADERS: dict[Hashable, Job] = {}
_MOST_HEADERS = 256


def read_operands(
    given: Mapping[Matrix, object],
    options: Options,
    copies: HostCopies | None = None,
    *,
    kept: bool = False,
) -> dict[Matrix, Source]:
    """Convert the caller's operands to arrays.

    Args:
        given: The caller's X, W and dY, or None.
        options: The options of the call.
        copies: Counts copies from a GPU's memory.
        kept: Whether operands may be kept tensors, which are left out.

    Raises:
        InputError: An operand is missing or invalid.
    """
    require(given, options)
    for matrix, value in given.items():
        if isinstance(value, Tensor) and not kept:
            raise InputError(
                f"{matrix.label} is a tensor of a session: use the session's forward,"
                " backward and gradients"
            )
    return {
        matrix: read(value, matrix.label, options.wire_dtype, copies)
        for matrix, value in given.items()
        if value is not None and not isinstance(value, Tensor)
    }


def plan_arrays(
    sources: Mapping[Matrix, Source], options: Options
) -> tuple[Plan, dict[Matrix, Operand]]:
    """Plan a job of arrays.

    Args:
        sources: The caller's arrays, each with at least two dimensions. Those that no
            wanted result needs are checked, but not sent.
        options: The options of the call.

    Returns:
        The plan, and the operands to send.

    Raises:
        InputError: Two operands do not fit together.
    """
    operands = {matrix: source.whole() for matrix, source in sources.items()}
    plan = with_block_rows(check(operands, options))
    return plan, {matrix: operands[matrix] for matrix in plan.operands}


def plan_kept(
    sources: Mapping[Matrix, Source], options: Options, kept: Keeping
) -> tuple[Plan, dict[Matrix, Operand]]:
    """Plan a job of arrays and kept tensors.

    Args:
        sources: The operands that are sent.
        options: The options of the call.
        kept: The operands and results that stay in a session.

    Returns:
        The plan, and all operands; kept ones have no elements.

    Raises:
        InputError: Two operands do not fit together.
    """
    operands = {matrix: source.whole() for matrix, source in sources.items()}
    operands |= kept.stand_ins(operands)
    plan = with_block_rows(check(operands, options))
    return replace(plan, kept=kept), operands


def check(operands: Mapping[Matrix, Operand], options: Options) -> Plan:
    """Return the plan of a job with these operands, with m.

    Raises:
        InputError: Two operands do not fit together.
    """
    x, w, dy = (operands.get(matrix) for matrix in OPERANDS)
    if w is not None and w.array.ndim != 2:
        raise InputError(
            f"w has shape {w.array.shape}: expected a matrix with two dimensions"
        )
    dtype = common_dtype(operands, options)
    if x is not None and w is not None and x.columns != w.rows:
        raise InputError(
            f"x has shape {x.array.shape} and w {w.array.shape}: x's columns"
            f" ({x.columns}) must equal w's rows ({w.rows})"
        )
    if dy is not None and w is not None and dy.columns != w.columns:
        raise InputError(
            f"dy has shape {dy.array.shape} and w {w.array.shape}: dy's columns"
            f" ({dy.columns}) must equal w's columns ({w.columns})"
        )
    if x is not None and dy is not None and x.lead != dy.lead:
        raise InputError(
            f"x has shape {x.array.shape} and dy {dy.array.shape}: "
            + (
                f"x's rows ({x.rows}) must equal dy's rows ({dy.rows})"
                if len(x.lead) == len(dy.lead) == 1
                else "all dimensions but the last must be equal"
            )
        )
    rows = dy if x is None else x
    if w is not None:
        n, k = w.rows, w.columns
    else:
        # dW needs both of the others, dB only dY.
        n = 0 if x is None else x.columns
        k = operands[Matrix.DY].columns
    return Plan(None if rows is None else rows.rows, n, k, dtype, options)


def with_rows(plan: Plan, m: int | None) -> Plan:
    """Return the plan for another number of rows; None: unknown."""
    return replace(plan, m=m)


def with_block_rows(plan: Plan) -> Plan:
    """Return the plan with the rows of a block that its options ask for."""
    rows = plan.options.block_rows
    if rows == "auto":
        rows = automatic_block_rows(plan.m, plan.n, plan.k, plan.dtype)
    return replace(plan, block_rows=rows) if rows else plan


def require(given: Mapping[Matrix, object], options: Options) -> None:
    """Check that every needed operand was given.

    Raises:
        InputError: An operand is None.
    """
    for result in options.results:
        for needed in result.needs:
            if given.get(needed) is None:
                operands = " and ".join(matrix.label for matrix in result.needs)
                raise InputError(
                    f"{result.label} needs {operands}, but {needed.label} is None"
                )


def common_dtype(
    operands: Mapping[Matrix, Operand] | Mapping[Matrix, Source], options: Options
) -> Dtype:
    """Return the dtype in which all operands are sent.

    Raises:
        InputError: They have several, or `dw_accumulator` is too narrow for it.
    """
    (name, first), *others = operands.items()
    for other, value in others:
        if value.dtype is not first.dtype:
            raise InputError(
                f"{name.label} is {first.dtype.label} and {other.label} is"
                f" {value.dtype.label}: expected one dtype for all operands; convert"
                f" one, for example {other.label}.astype({name.label}.dtype)"
            )
    accumulator = options.dw_accumulator
    if accumulator is not None and accumulator not in first.dtype.accumulators:
        raise InputError(
            f"dw_accumulator is {accumulator.label}, but the operands are"
            f" {first.dtype.label}: omit it, or send {accumulator.label} operands"
        )
    return first.dtype
