"""The decision whether a job uses memory shared with the server."""

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
from gradwire._core.unary import SMALL_BYTES, has_at_most
from gradwire._transport.address import is_local
from gradwire._transport.shm.segments import Allocation, CannotShareError, Pool
from gradwire._transport.shm.shm_job import ShmJob
from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.limits import MIB, SHARED_MEMORY
from gradwire_protocol.matrices import Matrix

OPEN_TIMEOUT_S = 10.0
"""Timeout for opening a region. A live server opens or refuses it at once."""

_MOST_COPIED_BYTES = 256 * MIB
"""With ``transport="auto"``, most bytes of operands that are copied to shared memory.
Larger operands are sent in messages, which need no additional memory."""

_FOR_GOOD = (CannotShareError, ContractError, NotAllowedError, UnsupportedError)


class ShmPolicy:
    """The shared memory of one client, and its choice of transport.

    Args:
        transport: "auto", "grpc", "direct" or "shm".
        address: The server's address.
    """

    def __init__(self, transport: str, address: str) -> None:
        self.pool = Pool()
        self.demanded = transport == "shm"
        self._address = address
        self._local = is_local(address)
        self._possible = self.demanded
        self._allowed = transport in {"auto", "shm"}

    @property
    def on(self) -> bool:
        """Whether the server shares memory, as far as known."""
        return self._possible

    def learn(self, info: ServerInfo) -> None:
        """Use the server's answer about itself.

        Raises:
            CannotShareError: ``transport="shm"``, and the server shares no memory.
        """
        offered = SHARED_MEMORY in info.features
        if self.demanded and not offered:
            raise CannotShareError(
                f"the server at {self._address} does not share memory: enable its"
                ' setting allow-shared-memory, or use transport="auto"'
            )
        if self._allowed and not self.demanded:
            self._possible = offered and self._local

    def should_use(
        self, plan: Plan, operands: Mapping[Matrix, Operand], *, unary: bool
    ) -> bool:
        """Return whether to send a job through shared memory.

        With ``transport="auto"``, jobs whose arrays are in ordinary memory are sent in
        messages if they are small, or very large.
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
        if unary and not inside and has_at_most(SMALL_BYTES, plan):
            return False
        return copied <= _MOST_COPIED_BYTES

    def place(
        self, plan: Plan, operands: Mapping[Matrix, Operand], outputs: ArrayOutputs
    ) -> ShmJob:
        """Create a job in shared memory, which uses arrays already there in place."""
        return ShmJob(plan, operands, outputs, self.pool)

    def on_refusal(self, error: GradwireError) -> None:
        """Record that the server refused a region. Stop asking if that is permanent."""
        if not self.demanded and isinstance(error, _FOR_GOOD):
            self._possible = False

    def may_do_without(self) -> bool:
        """Stop using shared memory, unless it is demanded; return whether it stopped.

        Jobs do not find the regions that were opened for them, for example because a
        proxy has several servers behind it.
        """
        self._possible = self.demanded
        return not self.demanded

    def disable(self) -> None:
        """Use no shared memory, whatever the server offers."""
        self._allowed = self.demanded = self._possible = False

    def after_fork(self) -> Pool:
        """Use a new pool in the child of a fork.

        Returns:
            The parent's pool.
        """
        inherited, self.pool = self.pool, Pool()
        return inherited


def may_be_smaller(error: GradwireError) -> bool:
    """Return whether the server might open a smaller region."""
    return isinstance(error, ExhaustedError)


class EmptyArray:
    """The shape and dtype of an array requested with `Client.empty`."""

    def __init__(self, shape: Any, dtype: DtypeLike) -> None:
        self.shape = parse_shape(shape)
        self.dtype: Dtype = parse_dtype(dtype, "dtype")
        count = int(np.prod(self.shape, dtype=object))
        self.sizes = [count * self.dtype.itemsize]

    def made(self, rooms: Sequence[Allocation] | None) -> Array:
        """Create the array, in shared memory if `rooms` is not None."""
        if rooms is None:
            return np.empty(self.shape, self.dtype.numpy)
        return rooms[0].array.view(self.dtype.numpy).reshape(self.shape)
