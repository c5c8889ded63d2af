"""Streams of rows: the caller's items in, blocks of result rows out."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gradwire._api.errors import InputError
from gradwire._api.options import Options
from gradwire._arrays.device_copy import HostCopies
from gradwire._arrays.operand import Operand, operand
from gradwire._core.job_plan import Plan, check, require, with_rows
from gradwire._integrity.stream_verifier import RowCheck
from gradwire_protocol import limits
from gradwire_protocol.matrices import ROW_OPERANDS, Matrix, operands_for


class RowReader:
    """Makes operands of the items that a caller's iterable gives.

    An item is a pair (x_rows, dy_rows), with None for one that the job does
    not need; where it needs one only, that one alone will do. Both of a pair
    have equally many rows, any number.
    """

    def __init__(self, w: object, m: int | None, options: Options) -> None:
        if m is not None and (not isinstance(m, int | np.integer) or m < 0):
            raise InputError(f"m is {m!r}: give the number of rows, or None")
        if m is not None and m > limits.MAX_INT64:
            raise InputError(f"m is {m}: expected at most {limits.MAX_INT64}")
        self._m = None if m is None else int(m)
        self.options = options
        self._needed = tuple(
            matrix for matrix in ROW_OPERANDS if matrix in operands_for(options.results)
        )
        require(dict.fromkeys(self._needed, True) | {Matrix.W: w}, options)
        self.copies = HostCopies()
        """What was copied from a GPU's memory so far."""
        self.w = (
            None
            if w is None
            else operand(w, "w", options.wire_dtype, copies=self.copies)
        )
        self.check: RowCheck | None = None
        """What checks the results, where that is wanted."""
        self._plan: Plan | None = None
        self._count = 0
        self._rows = 0

    def plan(self, first: Mapping[Matrix, Operand] | None) -> Plan:
        """The plan of a job whose first item has these operands, if any.

        Raises:
            InputError: Without an item and without W, nothing is known.
        """
        if first is None and self.w is None:
            raise InputError(
                "rows gave nothing and w is None, so that n, k and the dtype are"
                " unknown: give at least one pair, of no rows if need be"
            )
        self._plan = with_rows(self._check(first or {}), self._m)
        self._begin_check(self._plan)
        return self._plan

    def read(self, item: object) -> dict[Matrix, Operand]:
        """The operands in an item.

        Raises:
            InputError: It is none, or does not fit the first; the text says
                which item it is, counted from 0.
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
                        f"item {self._count} of rows has {size}, and item 0 had"
                        f" {wanted}"
                    )
        if (check := self._begin_check(plan)) is not None:
            check.took(self._rows, operands)
        self._count += 1
        self._rows += next(iter(operands.values())).rows
        return operands

    def settle(self) -> None:
        """The next item is about to be asked for."""
        if self.check is not None:
            self.check.settle()

    def again(self, item: object) -> dict[Matrix, Operand]:
        """The operands in an item that was read before."""
        return self._operands(item)

    def _begin_check(self, plan: Plan) -> RowCheck | None:
        verify = self.options.verify
        if verify and self.check is None:
            w = self.w if Matrix.W in plan.operands else None
            self.check = RowCheck(with_rows(plan, self._m), w, verify)
        return self.check

    def _operands(self, item: object) -> dict[Matrix, Operand]:
        if isinstance(item, tuple) and len(item) == 2:
            values = dict(zip(ROW_OPERANDS, item, strict=True))
        elif len(self._needed) == 1:
            values = {self._needed[0]: item}
        else:
            raise InputError(
                f"it is a {type(item).__qualname__}: give pairs (x_rows, dy_rows)"
            )
        operands = {}
        for matrix in self._needed:
            if values[matrix] is None:
                wanted = " and ".join(result.label for result in self.options.results)
                raise InputError(
                    f"{matrix.label}'s rows are None, and {wanted} cannot be without"
                )
            operands[matrix] = operand(
                values[matrix],
                matrix.label,
                self.options.wire_dtype,
                self._rows,
                self.copies,
            )
            if operands[matrix].array.ndim != 2:
                raise InputError(
                    f"{matrix.label} has shape {operands[matrix].array.shape}: rows"
                    " of a stream have two dimensions"
                )
        return operands

    def _check(self, operands: Mapping[Matrix, Operand]) -> Plan:
        weights = {} if self.w is None else {Matrix.W: self.w}
        return check({**operands, **weights}, self.options)
