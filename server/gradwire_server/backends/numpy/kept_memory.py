"""A session's tensors in host memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gradwire_protocol.dtypes import Dtype, rounded
from gradwire_protocol.optimizers import Optimizer
from gradwire_server.backends.base import (
    Array,
    empty_aligned,
)
from gradwire_server.backends.kept_memory import KeptArray
from gradwire_server.backends.numpy import updates

PIECE_ELEMENTS = 1 << 22
"""Elements of a piece of work. A step's norm has other bits with another number."""


@dataclass(frozen=True, slots=True, eq=False)
class HostArray:
    """An array in host memory."""

    host: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.host.shape

    @property
    def dtype(self) -> Dtype:
        """Element type."""
        return Dtype.of(self.host.dtype)

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.host.size

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.host.nbytes


class HostMemory:
    """Host memory of a session, allocated array by array."""

    in_host_memory = True
    piece_elements = PIECE_ELEMENTS

    def allocate(self, shape: tuple[int, ...], dtype: Dtype) -> HostArray:
        """Allocate an array. Elements that nobody has written are not to be read."""
        memory = empty_aligned(math.prod(shape) * dtype.itemsize)
        return HostArray(memory.view(dtype.numpy).reshape(shape))

    def free(self, array: KeptArray) -> None:
        """Do nothing: the memory is released with the last reference."""

    def close(self) -> None:
        """Do nothing, as `free`."""

    def empty(self, size_bytes: int) -> npt.NDArray[np.uint8]:
        """Allocate ordinary, aligned memory."""
        return empty_aligned(size_bytes)

    def write(self, elements: Array, into: KeptArray, first: int) -> None:
        """Copy elements to an array."""
        _flat(into)[first : first + elements.size] = elements

    def read(self, array: KeptArray, first: int, out: Array) -> None:
        """Copy elements from an array."""
        np.copyto(out, _flat(array)[first : first + out.size])

    def clear(self, array: KeptArray, part: slice) -> None:
        """Set elements to 0."""
        _flat(array)[part].fill(0)

    def copy(self, source: KeptArray, into: KeptArray) -> None:
        """Copy an array."""
        np.copyto(_flat(into), _flat(source))

    def add(self, source: KeptArray, into: KeptArray) -> None:
        """Add an array to another one."""
        total = _flat(into)
        with np.errstate(all="ignore"):
            np.add(total, _flat(source), out=total)

    def round(self, source: KeptArray, into: KeptArray, part: slice) -> None:
        """Round elements to another dtype."""
        with np.errstate(all="ignore"):
            rounded(_flat(source)[part], into.dtype, _flat(into)[part])

    def sum_of_squares(self, array: KeptArray, part: slice) -> float:
        """Sum the squares of elements."""
        return updates.sum_of_squares(_flat(array)[part])

    def update(
        self,
        optimizer: Optimizer,
        p: KeptArray,
        g: KeptArray,
        states: Mapping[str, KeptArray],
        part: slice,
        *,
        made: int,
        scale: float,
    ) -> None:
        """Update elements of a weight and its states."""
        updates.update(
            optimizer,
            _flat(p)[part],
            _flat(g)[part],
            {name: _flat(state)[part] for name, state in states.items()},
            made,
            scale=scale,
        )


def _flat(array: KeptArray) -> Array:
    if array.host is None:
        raise ValueError("the array is not in host memory")
    return array.host.reshape(-1)
