"""Whether a client shares memory with its server, and which jobs use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gradwire._api.errors import (
    ContractError,
    ExhaustedError,
    GradwireError,
    NotAllowedError,
    UnsupportedError,
)
from gradwire._api.options import DtypeLike, parse_dtype, parse_shape
from gradwire._api.types import Array, ServerInfo
from gradwire._arrays.operand import Operand
from gradwire._core.job_plan import Plan
from gradwire._core.outputs import ArrayOutputs
from gradwire._transport.address import is_local
from gradwire._transport.shm.segments import Allocation, CannotShareError, Pool
from gradwire._transport.shm.shm_job import ShmJob
from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.limits import MIB, SHARED_MEMORY
from gradwire_protocol.matrices import Matrix

OPEN_TIMEOUT_S = 10.0
"""A server opens a region or refuses it at once; this is for a dead one."""

_MOST_COPIED_BYTES = 256 * MIB
"""Where nobody asked for shared memory, operands that would have to be copied
there travel in messages from this size on: those take no memory."""

_FOR_GOOD = (CannotShareError, ContractError, NotAllowedError, UnsupportedError)


class ShmPolicy:
    """The regions of one client, and its choice of transport.

    Args:
        transport: "auto", "tcp" or "shm".
        address: The server's.
    """

    def __init__(self, transport: str, address: str) -> None:
        self.pool = Pool()
        self.demanded = transport == "shm"
        self._address = address
        self._local = is_local(address)
        self._possible = self.demanded
        self._allowed = transport != "tcp"

    @property
    def on(self) -> bool:
        """Whether memory is shared, as far as is known."""
        return self._possible

    def learn(self, info: ServerInfo) -> None:
        """Decide by what the server offers.

        Raises:
            CannotShareError: Shared memory is demanded, and it does not.
        """
        offered = SHARED_MEMORY in info.features
        if self.demanded and not offered:
            raise CannotShareError(
                f"the server at {self._address} does not share memory: it is allowed"
                ' by its setting allow-shared-memory, and transport="auto" does'
                " without"
            )
        if self._allowed and not self.demanded:
            self._possible = offered and self._local

    def should_use(
        self, plan: Plan, operands: Mapping[Matrix, Operand], *, unary: bool
    ) -> bool:
        """Whether a job shall go through shared memory.

        Where that was not demanded, small jobs whose arrays lie elsewhere go
        in one message, and large ones in many.
        """
        if self.demanded:
            return True
        if not self._possible or not plan.m:
            return False
        inside = [
            operand
            for operand in operands.values()
            if operand.rounding is None and self.pool.find(operand.array) is not None
        ]
        if len(inside) == len(operands):
            return True
        copied = sum(operand.size_bytes for operand in operands.values())
        copied -= sum(operand.size_bytes for operand in inside)
        return not (unary and not inside) and copied <= _MOST_COPIED_BYTES

    def place(
        self, plan: Plan, operands: Mapping[Matrix, Operand], outputs: ArrayOutputs
    ) -> ShmJob:
        """The job's places, as far as its arrays lie in regions."""
        return ShmJob(plan, operands, outputs, self.pool)

    def on_refusal(self, error: GradwireError) -> None:
        """Take a region's refusal: do without, for good where it is final.

        Raises:
            GradwireError: The same, where shared memory is demanded.
        """
        if self.demanded:
            raise error
        if isinstance(error, _FOR_GOOD):
            self._possible = False

    def after_fork(self) -> Pool:
        """Begin anew in the child of a fork.

        Returns:
            What the parent goes on using.
        """
        inherited, self.pool = self.pool, Pool()
        return inherited


def may_be_smaller(error: GradwireError) -> bool:
    """Whether a smaller region might have been given."""
    return isinstance(error, ExhaustedError)


class EmptyArray:
    """An array that a caller wants, wherever it will lie."""

    def __init__(self, shape: Any, dtype: DtypeLike) -> None:
        self.shape = parse_shape(shape)
        self.dtype: Dtype = parse_dtype(dtype, "dtype")
        count = int(np.prod(self.shape, dtype=object))
        self.sizes = [count * self.dtype.itemsize]

    def made(self, rooms: Sequence[Allocation] | None) -> Array:
        """The array: in this room, or of the process's own memory."""
        if rooms is None:
            return np.empty(self.shape, self.dtype.numpy)
        return rooms[0].array.view(self.dtype.numpy).reshape(self.shape)
