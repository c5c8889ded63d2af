"""Streams of rows: the caller's items in, blocks of result rows out."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np

from gradwire._arrays import Operand, operand
from gradwire._checking import RowCheck
from gradwire._devices import HostCopies
from gradwire._exceptions import ClientStateError, InputError
from gradwire._exchange import Exchange
from gradwire._options import Options
from gradwire._outputs import ArraySink
from gradwire._plan import Plan, check, require, with_rows
from gradwire._receiving import BlockSink, Sink
from gradwire._retrying import Attempts
from gradwire._sending import Sender
from gradwire._types import Array, Receipt, RowBlock
from gradwire._verifying import Computed
from gradwire.wire import limits
from gradwire.wire.matrices import ROW_OPERANDS, ROW_RESULTS, Matrix, operands_for

_NOTHING = object()


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
            raise InputError(f"m is {m}; it can be up to {limits.MAX_INT64}")
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

    def items(self, rows: Iterator[object]) -> Iterator[dict[Matrix, Operand]]:
        """The operands in each of the items that are left."""
        while True:
            self.settle()
            item = next(rows, _NOTHING)
            if item is _NOTHING:
                return
            yield self.read(item)

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


class RowJob:
    """A job whose rows come and go in parts, without the I/O.

    Attributes:
        exchange: The conversation with the server.
        options: What the caller asked for.
        ready: Row blocks that are complete and were not handed out yet.
        dw: dW; None where it is not wanted.
        receipt: What became of the job, once it is done.
        check: What checks the results before they are handed out, if anything.
    """

    def __init__(
        self,
        plan: Plan,
        w: Operand | None,
        first: Mapping[Matrix, Operand] | None,
        connections: int = 1,
        copies: HostCopies | None = None,
        *,
        check: RowCheck | None = None,
        address: str = "",
    ) -> None:
        self.options = plan.options
        self.check = check
        self._address = address
        self._copies = copies or HostCopies()
        self._plan = plan
        self.ready: deque[RowBlock] = deque()
        self._w = w if Matrix.W in plan.operands else None
        self._first = first
        self._sender = Sender(plan, connections=connections)
        self._blocks = self._block_sinks(plan)
        sinks: dict[Matrix, Sink] = dict(self._blocks)
        others = [self._block_sinks(plan, self._blocks) for _ in range(1, connections)]
        self.dw: Array | None = None
        if Matrix.DW in plan.results:
            dtype = plan.array_dtype(Matrix.DW)
            self.dw = np.empty((plan.n, plan.k), dtype.numpy)
            sinks[Matrix.DW] = ArraySink(self.dw, plan.result_dtype(Matrix.DW))
        self.exchange = Exchange(plan, self._sender, sinks, *others)
        self._next_row = 0
        self.receipt: Receipt | None = None

    @property
    def block_messages(self) -> int:
        """Messages that carry the operands of a row block, about."""
        plan, rows = self._plan, self._sender.block_rows
        sizes = [plan.size_bytes(each, rows) for each in ROW_OPERANDS]
        return 2 + sum(size // plan.chunk_bytes for size in sizes)

    def opening_messages(self) -> Iterator[tuple[int, bytes]]:
        """What is sent before the second item: W and the first one.

        Each message with its connection.
        """
        for message in self.exchange.weight_messages(self._w):
            yield 0, message
        first, self._first = self._first, None
        if first is not None:
            yield from self.exchange.row_messages(first)

    def messages(
        self, items: Iterable[Mapping[Matrix, Operand]]
    ) -> Iterator[tuple[int, bytes]]:
        """What is sent after the header, for the items after the first."""
        yield from self.opening_messages()
        for operands in items:
            yield from self.exchange.row_messages(operands)
        yield from self.exchange.end_messages()

    def receive(self, message: bytes, connection: int = 0) -> None:
        """Take a message from the server; see `Exchange.receive`.

        Raises:
            VerificationError: It completes a block that is wrong.
        """
        self.exchange.receive(message, connection)
        # A matrix without columns has no elements, so none of it ever comes.
        filled = [sink for sink in self._blocks.values() if sink.columns]
        while filled and all(self._next_row in sink.complete for sink in filled):
            self._hand_out(len(filled[0].complete[self._next_row]))

    def finish(self, attempts: Attempts | None = None) -> Receipt:
        """The server has ended the stream with OK; see `Exchange.finish`.

        Raises:
            VerificationError: The last block or dW is wrong.
        """
        receipt = self._copies.told(self.exchange.finish())
        if attempts is not None:
            receipt = attempts.told(receipt)
        while self._blocks and self._next_row < receipt.m:
            self._hand_out(min(receipt.block_rows, receipt.m - self._next_row))
        if self.check is not None:
            self.check.finish(self.dw, receipt.m, Computed.of(receipt, self._address))
            receipt = replace(receipt, verifying_s=self.check.seconds)
        self.receipt = receipt
        return receipt

    def _block_sinks(
        self, plan: Plan, beside: Mapping[Matrix, BlockSink] | None = None
    ) -> dict[Matrix, BlockSink]:
        return {
            matrix: BlockSink(
                plan.shape(matrix, 0)[1],
                plan.array_dtype(matrix),
                plan.result_dtype(matrix),
                self._sender,
                None if beside is None else beside[matrix],
            )
            for matrix in ROW_RESULTS
            if matrix in plan.results
        }

    def _hand_out(self, rows: int) -> None:
        parts = {
            matrix: (
                sink.complete.pop(self._next_row) if sink.columns else sink.empty(rows)
            )
            for matrix, sink in self._blocks.items()
        }
        block = RowBlock(self._next_row, parts.get(Matrix.Y), parts.get(Matrix.DX))
        if self.check is not None and self.exchange.accepted is not None:
            accepted = self.exchange.accepted
            self.check.check(block, Computed.as_accepted(accepted, self._address))
        self.ready.append(block)
        self._next_row += rows


def iterate(rows: object) -> Iterator[object]:
    """The caller's items.

    Raises:
        InputError: There are none to be had.
    """
    if isinstance(rows, Iterable):
        return iter(rows)
    raise InputError(
        f"rows is a {type(rows).__qualname__}, which cannot be iterated: give pairs"
        " (x_rows, dy_rows)"
    )


def require_receipt(job: RowJob | None) -> Receipt:
    """What became of a stream's job, if it is done.

    Raises:
        ClientStateError: It is not, or was not even begun.
    """
    if job is None or job.receipt is None:
        raise ClientStateError(
            "dw and receipt are there once the stream has been iterated to its end"
        )
    return job.receipt
