"""Verification of a job's results, for the option `verify`; see `freivalds`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from gradwire._api.errors import VerificationError
from gradwire._api.types import Array, Device, Receipt, device_of
from gradwire._api.verify import Verify
from gradwire._arrays.operand import Operand
from gradwire._core.job_plan import Plan
from gradwire._integrity.freivalds import SuspectRows, Wrong
from gradwire._integrity.product_checks import (
    ColumnSums,
    RowProduct,
    SumProduct,
    settle,
    summed_again,
)
from gradwire._integrity.random_sums import RandomSums
from gradwire._integrity.rounding_error import Arithmetic
from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.matrices import ROW_RESULTS, Matrix
from gradwire_protocol.v1.job_pb2 import Accepted

_ELEMENTS = 1 << 20
"""Approximate number of elements checked at once."""


@dataclass(frozen=True, slots=True)
class Computed:
    """The server and device of a job, and its row blocks."""

    address: str
    server_instance: str
    device: Device
    block_rows: int

    @classmethod
    def of(cls, receipt: Receipt, address: str) -> Computed:
        """Create from the receipt of a server at `address`."""
        return cls(address, receipt.server_instance, receipt.device, receipt.block_rows)

    @classmethod
    def as_accepted(cls, accepted: Accepted, address: str) -> Computed:
        """Create from the Accepted of a server at `address`."""
        device = device_of(accepted.device)
        return cls(address, accepted.server_instance, device, accepted.block_rows)


class Verifier:
    """Checks the results of one job, a few rows at a time, without keeping them.

    Args:
        plan: The job.
        w: W, if the job needs it.
        verify: Settings of the check.

    Attributes:
        seconds: Time spent so far.
    """

    def __init__(self, plan: Plan, w: Operand | None, verify: Verify) -> None:
        self.seconds = 0.0
        self._plan = plan
        self._verify = verify
        self._dtype = plan.dtype.sums_in.numpy
        # The server must not be able to predict the signs, so the seed is random.
        self._rng = np.random.default_rng()
        self._products: dict[Matrix, RowProduct] = {}
        self._sums: dict[Matrix, SumProduct] = {}
        self._column_sums: dict[Matrix, ColumnSums] = {}
        with self._working():
            if w is not None:
                whole = w.take(0, w.rows).astype(self._dtype, copy=False)
                for matrix, b in ((Matrix.Y, whole), (Matrix.DX, whole.T)):
                    if matrix in plan.results and b.shape[1]:
                        random_sums = self._random_sums(matrix, len(b))
                        self._products[matrix] = RowProduct(b, random_sums)
            for matrix in plan.sums:
                rows, columns = plan.shape(matrix, 0)
                if matrix.is_vector:
                    self._column_sums[matrix] = ColumnSums(columns)
                elif rows and columns:
                    random_sums = self._random_sums(matrix, plan.m or rows)
                    self._sums[matrix] = SumProduct(rows, random_sums)

    @property
    def step(self) -> int:
        """Best number of rows to check at once."""
        return max(1, _ELEMENTS // max(1, self._plan.n, self._plan.k))

    def add(self, operands: Mapping[Matrix, Array]) -> None:
        """Add rows of X and dY to the expected sums."""
        for matrix, product in self._sums.items():
            with self._working():
                a, b = (self._wide(operands[each]) for each in matrix.needs)
                for first in range(0, len(a), self.step):
                    part = slice(first, first + self.step)
                    product.add(a[part], b[part])
        for matrix, column_sums in self._column_sums.items():
            with self._working():
                rows = operands[matrix.needs[0]]
                for first in range(0, len(rows), self.step):
                    column_sums.add(rows[first : first + self.step])

    def check_rows(
        self,
        operands: Mapping[Matrix, Array],
        results: Mapping[Matrix, Array],
        first_row: int,
        by: Computed,
    ) -> None:
        """Check rows of Y and dX against the same rows of X and dY.

        Raises:
            VerificationError: A result is wrong.
        """
        with self._working():
            for matrix, product in self._products.items():
                a = self._wide(operands[matrix.needs[0]])
                wrong = product.wrong(a, results[matrix], self._arithmetic(matrix, by))
                if wrong is not None:
                    raise _wrong_element(matrix, wrong, first_row, by, self._plan)

    def check_sums(self, sums: Mapping[Matrix, Array], m: int, by: Computed) -> None:
        """Check sums against all rows that were taken into account.

        Raises:
            VerificationError: One is wrong.
        """
        for matrix, product in self._sums.items():
            with self._working():
                arithmetic = self._arithmetic(matrix, by, m)
                misplaced = product.misplaced(sums[matrix], arithmetic)
                if misplaced is not None:
                    raise _wrong_element(matrix, misplaced, 0, by, self._plan)
                suspects, _ = product.suspects(sums[matrix], arithmetic)
            if suspects.certain.any():
                raise _wrong_sum(matrix, suspects, by, self._plan)
        self._check_column_sums(sums, m, by)

    def check_arrays(
        self,
        operands: Mapping[Matrix, Operand],
        results: Mapping[Matrix, Array],
        m: int,
        by: Computed,
    ) -> None:
        """Check all results against all operands.

        Raises:
            VerificationError: A result is wrong.
        """
        rows_of = {
            matrix: Operand(results[matrix], Dtype.of(results[matrix].dtype))
            for matrix in self._products
        }
        for first, taken in self._parts(operands, m):
            last = min(first + self.step, m)
            came = {each: rows.take(first, last) for each, rows in rows_of.items()}
            self.check_rows(taken, came, first, by)
            self.add(taken)
        for matrix in self._sums:
            with self._working():
                wrong = self._wrong_in_sum(matrix, operands, results[matrix], m, by)
            if wrong is not None:
                raise _wrong_element(matrix, wrong, 0, by, self._plan)
        self._check_column_sums(results, m, by)

    def _check_column_sums(
        self, results: Mapping[Matrix, Array], m: int, by: Computed
    ) -> None:
        for matrix, column_sums in self._column_sums.items():
            with self._working():
                arithmetic = self._arithmetic(matrix, by, m)
                wrong = column_sums.wrong(results[matrix], arithmetic)
            if wrong is not None:
                raise _wrong_element(matrix, wrong, 0, by, self._plan)

    def _wrong_in_sum(
        self,
        matrix: Matrix,
        operands: Mapping[Matrix, Operand],
        result: Array,
        m: int,
        by: Computed,
    ) -> Wrong | None:
        """What is most wrong in a sum, whose operands are still there."""
        first, second = matrix.needs
        arithmetic = self._arithmetic(matrix, by, m)
        misplaced = self._sums[matrix].misplaced(result, arithmetic)
        if misplaced is not None:
            return misplaced
        product = self._without_spoilt(matrix, operands, m)
        suspects, length = product.suspects(result, arithmetic)

        def again(rows: Array) -> tuple[Array, Array]:
            parts = (
                (taken[first], taken[second]) for _, taken in self._parts(operands, m)
            )
            return summed_again(parts, rows, result.shape[1])

        return settle(suspects, result, arithmetic, length, again)

    def _without_spoilt(
        self, matrix: Matrix, operands: Mapping[Matrix, Operand], m: int
    ) -> SumProduct:
        """Return a sum's check, recomputed without columns with NaN or Inf."""
        product = self._sums[matrix]
        columns = product.no_numbers
        if not columns.size:
            return product
        random_sums = self._random_sums(matrix, m)
        random_sums.mask(columns)
        product = SumProduct(self._plan.shape(matrix, 0)[0], random_sums)
        for _, taken in self._parts(operands, m):
            product.add(*(self._wide(taken[each]) for each in matrix.needs))
        return product

    def _parts(
        self, operands: Mapping[Matrix, Operand], m: int
    ) -> Iterator[tuple[int, dict[Matrix, Array]]]:
        for first in range(0, m, self.step):
            last = min(first + self.step, m)
            yield (
                first,
                {
                    matrix: operand.take(first, last)
                    for matrix, operand in operands.items()
                    if matrix is not Matrix.W
                },
            )

    def _wide(self, rows: Array) -> Array:
        return rows.astype(self._dtype, copy=False)

    def _random_sums(self, matrix: Matrix, length: int) -> RandomSums:
        columns = matrix.row_length(self._plan.n, self._plan.k)
        dtype = self._plan.result_dtype(matrix)
        groups = self._verify.groups_for(columns, dtype)
        return RandomSums(
            columns,
            self._verify.rounds,
            groups,
            length,
            dtype=self._dtype,
            rng=self._rng,
        )

    def _arithmetic(self, matrix: Matrix, by: Computed, m: int = 0) -> Arithmetic:
        plan = self._plan
        if matrix in ROW_RESULTS:
            length = plan.n if matrix is Matrix.Y else plan.k
        else:
            length = min(m, by.block_rows) + -(-m // by.block_rows)
        return Arithmetic.of_device(
            by.device,
            plan.dtype,
            plan.result_dtype(matrix),
            length,
            tf32=plan.options.allow_tf32 and not matrix.is_vector,
        )

    @contextmanager
    def _working(self) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            # This code checks for NaN, Inf and overflow, so no warnings are needed.
            with np.errstate(all="ignore"):
                yield
        finally:
            self.seconds += time.perf_counter() - begun


def _wrong_element(
    matrix: Matrix, wrong: Wrong, first_row: int, by: Computed, plan: Plan
) -> VerificationError:
    row = first_row + wrong.row + (plan.first_row if matrix.row_wise else 0)
    off = abs(wrong.value - wrong.exact)
    if np.isnan(wrong.exact):
        must = "but must be NaN or Inf, as its operands are"
    elif np.isinf(wrong.bound):
        must = "but no sum of its operands' products can be that large"
    else:
        must = f"but must be within {wrong.bound:.3g} of {wrong.exact:.6g}"
    error = _error(
        f"{matrix.label} is wrong in row {row}, column {wrong.column}: it is"
        f" {wrong.value:.6g}, {must}",
        by,
        plan,
    )
    error.result, error.row, error.column = matrix.label, row, wrong.column
    error.error, error.bound = off if np.isfinite(off) else None, wrong.bound
    return error


def _wrong_sum(
    matrix: Matrix, suspects: SuspectRows, by: Computed, plan: Plan
) -> VerificationError:
    certain = suspects.rows[suspects.certain]
    row = int(certain[0]) + (plan.first_row if matrix.row_wise else 0)
    excess = float(suspects.excess[suspects.certain].max())
    others = f" and in {len(certain) - 1} more" if len(certain) > 1 else ""
    how_far = f"off by {excess:.3g} times what rounding explains"
    error = _error(
        f"{matrix.label} is wrong in row {row}{others}: sums of its elements are"
        f" {how_far if excess else 'no numbers'}",
        by,
        plan,
    )
    error.result, error.row = matrix.label, row
    error.error, error.bound = (excess, 1.0) if excess else (None, None)
    return error


def _error(what: str, by: Computed, plan: Plan) -> VerificationError:
    who = f"server {by.address}, instance {by.server_instance}, device"
    who += f" {by.device.index}, {by.device.backend}: {by.device.name}"
    job_id = plan.options.job_id
    error = VerificationError(f"{what} ({who}, job {job_id})", job_id=job_id)
    error.server_instance = by.server_instance
    return error
