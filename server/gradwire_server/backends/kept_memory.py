"""The interface of the memory in which a session's tensors stay on their device.

Arrays of a session belong to one `KeptMemory`. They may lie in the device's own memory,
and then only its methods reach their elements.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.optimizers import Optimizer

Array = npt.NDArray[Any]


class KeptArray(Protocol):
    """An array of a session's memory (`KeptMemory`), C-contiguous."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def dtype(self) -> Dtype:
        """Element type."""

    @property
    def size(self) -> int:
        """Number of elements."""

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""

    @property
    def host(self) -> Array | None:
        """The array itself if it lies in host memory; None: on a device."""


class NoPieceError(MemoryError):
    """There is enough memory, but not in one piece."""


class KeptMemory(Protocol):
    """The memory of one session on its device.

    `allocate`, `free` and `close` are called in any thread, one at a time. All other
    methods are called in the thread of the device worker, and have done their work when
    they return. They raise `MemoryError` and `DeviceLostError` as a `BackendJob` does.
    In host memory, any thread may call them.

    Arguments called `part` are consecutive elements in row-major order.
    """

    in_host_memory: bool
    """Whether its arrays lie in host memory."""

    piece_elements: int
    """Most elements of a `part`, so that others wait shortly for the device. The bits
    of a sum depend on it."""

    def allocate(self, shape: tuple[int, ...], dtype: Dtype) -> KeptArray:
        """Allocate an array, whose elements are those of nobody else.

        Raises:
            MemoryError: There is not enough memory.
            NoPieceError: There is none in one piece.
        """

    def free(self, array: KeptArray) -> None:
        """Release an array's memory. It is no longer used."""

    def close(self) -> None:
        """Release all memory. No array is used any more."""

    def empty(self, size_bytes: int) -> npt.NDArray[np.uint8]:
        """Allocate host memory for `write` and `read`, as `Backend.empty`."""

    def write(self, elements: Array, into: KeptArray, first: int) -> None:
        """Copy elements from host memory.

        Args:
            elements: One dimension, of the array's dtype.
            into: The array.
            first: Index of the first element to write.
        """

    def read(self, array: KeptArray, first: int, out: Array) -> None:
        """Copy elements to host memory.

        Args:
            array: The array.
            first: Index of the first element to read.
            out: One dimension, of the array's dtype.
        """

    def clear(self, array: KeptArray, part: slice) -> None:
        """Set elements to 0."""

    def copy(self, source: KeptArray, into: KeptArray) -> None:
        """Copy all elements to an array of the same size and dtype."""

    def add(self, source: KeptArray, into: KeptArray) -> None:
        """Add all elements to those of an array of the same size and dtype.

        Sums are rounded once, to nearest, ties to even.
        """

    def round(self, source: KeptArray, into: KeptArray, part: slice) -> None:
        """Write float32 elements in a 16-bit dtype.

        They are rounded to nearest, ties to even.
        """

    def sum_of_squares(self, array: KeptArray, part: slice) -> float:
        """Sum the squares of float32 or float64 elements in float64.

        The bits depend on the elements and their order alone. The sum is finite exactly
        if all elements are, except that squares of float64 elements may overflow.
        """

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
        """Update elements of a weight and its states by a gradient.

        It allocates nothing. Formulas, their order and the roundings are those of
        `backends.numpy.updates.update`.

        Args:
            optimizer: Valid options.
            p: The weight, float32 or float64.
            g: Its gradient, of the same size and dtype.
            states: An array for each name of `optimizer.states`, likewise.
            part: The elements.
            made: Updates of the weight before this one.
            scale: Factor of g, which is applied first.
        """
