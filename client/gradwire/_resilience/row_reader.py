"""Conversion of a stream's items to operands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from gradwire._api.errors import InputError
from gradwire._api.options import Options
from gradwire._arrays.device_copy import HostCopies
from gradwire._arrays.operand import Operand, operand
from gradwire._arrays.result_library import ResultLibrary, library_of
from gradwire._core.job_plan import Plan, check, require, with_block_rows, with_rows
from gradwire._integrity.stream_verifier import RowCheck
from gradwire_protocol import limits
from gradwire_protocol.matrices import ROW_OPERANDS, Matrix, operands_for


class RowReader:
    """Converts the items of the caller's iterable to operands.

    An item is a pair (x_rows, dy_rows), with None for an operand that the job does not
    need. If the job needs only one operand, an item may be that operand. Both operands
    of a pair have the same number of rows, which may be any number.
    """

    def __init__(
        self, w: object, m: int | None, options: Options, *, first_row: int = 0
    ) -> None:
        if m is not None and (not isinstance(m, int | np.integer) or m < 0):
            raise InputError(f"m is {m!r}: expected an integer of at least 0, or None")
        if m is not None and m > limits.MAX_INT64:
            raise InputError(f"m is {m}: expected at most {limits.MAX_INT64}")
        self._m = None if m is None else int(m)
        self.options = options
        self._needed = tuple(
            matrix for matrix in ROW_OPERANDS if matrix in operands_for(options.results)
        )
        require(dict.fromkeys(self._needed, True) | {Matrix.W: w}, options)
        self.copies = HostCopies()
        """Copies from and to GPU memory so far."""
        needs_w = Matrix.W in operands_for(options.results)
        self._weights = (w,) if needs_w else ()
        self.library: ResultLibrary | None = library_of(self._weights)
        """Library of the results, by W and the first item; None: NumPy."""
        self.w = (
            None
            if w is None
            else operand(w, "w", options.wire_dtype, copies=self.copies)
        )
        self.check: RowCheck | None = None
        """Checks the results; None: no check."""
        self._plan: Plan | None = None
        self._count = 0
        self._rows = 0
        self._first_row = first_row

    def plan(self, first: Mapping[Matrix, Operand] | None) -> Plan:
        """Return the plan of a job whose first item, if any, has these operands.

        Raises:
            InputError: There is neither an item nor W.
        """
        if first is None and self.w is None:
            raise InputError(
                "rows is empty and w is None, so n, k and the dtype are unknown:"
                " expected at least one pair, possibly with 0 rows"
            )
        self._plan = with_block_rows(with_rows(self._check(first or {}), self._m))
        self._begin_check(self._plan)
        return self._plan

    def read(self, item: object) -> dict[Matrix, Operand]:
        """Return the operands of an item.

        Raises:
            InputError: The item is invalid, or does not fit the first one. The message
                has the item's number, counted from 0.
        """
        try:
            operands = self._operands(item)
            plan = self._check(operands)
        except InputError as error:
            raise InputError(f"item {self._count} of rows: {error}") from error
        first = self._plan
        if first is not None:
            sizes, expected = (
                (f"n = {p.n}", f"k = {p.k}", p.dtype.label) for p in (plan, first)
            )
            for size, wanted in zip(sizes, expected, strict=True):
                if size != wanted:
                    raise InputError(
                        f"item {self._count} of rows has {size}: expected {wanted},"
                        " as in item 0"
                    )
        if (check := self._begin_check(plan)) is not None:
            check.took(self._rows, operands)
        self._count += 1
        self._rows += next(iter(operands.values())).rows
        return operands

    def settle(self) -> None:
        """Prepare for the request of the next item."""
        if self.check is not None:
            self.check.settle()

    def again(self, item: object) -> dict[Matrix, Operand]:
        """Return the operands of an item that was read before."""
        return self._operands(item)

    def _begin_check(self, plan: Plan) -> RowCheck | None:
        verify = self.options.verify
        if verify and self.check is None:
            w = self.w if Matrix.W in plan.operands else None
            plan = replace(with_rows(plan, self._m), first_row=self._first_row)
            self.check = RowCheck(plan, w, verify)
        return self.check

    def _is_pair(self, item: Any) -> bool:
        """Whether an item is a pair, and not the rows of one operand."""
        if not isinstance(item, tuple | list) or len(item) != 2:
            return False
        # A DataLoader of PyTorch gives lists; a list may also be two rows.
        return (
            isinstance(item, tuple)
            or len(self._needed) == 2
            or all(getattr(each, "ndim", 0) == 2 for each in item)
        )

    def _operands(self, item: Any) -> dict[Matrix, Operand]:
        if self._is_pair(item):
            values = dict(zip(ROW_OPERANDS, item, strict=True))
        elif len(self._needed) == 1:
            values = {self._needed[0]: item}
        else:
            raise InputError(
                f"it is a {type(item).__qualname__}: expected a pair (x_rows, dy_rows)"
            )
        operands = {}
        if not self._count:
            needed = [values[matrix] for matrix in self._needed]
            self.library = library_of([*needed, *self._weights])
        for matrix in self._needed:
            if values[matrix] is None:
                wanted = " and ".join(result.label for result in self.options.results)
                raise InputError(
                    f"{matrix.label}'s rows are None, but needed for {wanted}"
                )
            operands[matrix] = operand(
                values[matrix],
                matrix.label,
                self.options.wire_dtype,
                self._first_row + self._rows,
                self.copies,
            )
            if operands[matrix].array.ndim != 2:
                raise InputError(
                    f"{matrix.label} has shape {operands[matrix].array.shape}: expected"
                    " two dimensions"
                )
        return operands

    def _check(self, operands: Mapping[Matrix, Operand]) -> Plan:
        weights = {} if self.w is None else {Matrix.W: self.w}
        return check({**operands, **weights}, self.options)
