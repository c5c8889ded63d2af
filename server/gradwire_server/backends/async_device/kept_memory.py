"""A session's tensors in the memory of an asynchronous device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.optimizers import Optimizer
from gradwire_server.backends.async_device.arena import Arena, arena_bytes
from gradwire_server.backends.async_device.device import (
    PARTIAL_SUMS,
    Allocate,
    Device,
    Events,
    Stream,
    Update,
    begun,
)
from gradwire_server.backends.async_device.gemm import DeviceMatrix
from gradwire_server.backends.base import (
    Array,
)
from gradwire_server.backends.kept_memory import KeptArray
from gradwire_server.backends.row_blocks import ALIGNMENT

PIECE_ELEMENTS = 1 << 26
"""Elements of a piece of work: a millisecond of an update on an H200. The worker's
thread takes as long for a piece of any size."""

_SCRATCH_BYTES = -(-PARTIAL_SUMS * 8 // ALIGNMENT) * ALIGNMENT


def device_bytes(keep_bytes: int) -> int:
    """Return the bytes of device memory that a session of `keep_bytes` takes."""
    return _SCRATCH_BYTES + arena_bytes(keep_bytes)


@dataclass(frozen=True, slots=True, eq=False)
class DeviceArray:
    """An array in a device's memory."""

    address: int
    shape: tuple[int, ...]
    dtype: Dtype

    @classmethod
    def of(cls, matrix: DeviceMatrix) -> DeviceArray:
        """Return a matrix as an array."""
        return cls(matrix.address, (matrix.rows, matrix.columns), matrix.dtype)

    @property
    def host(self) -> None:
        """None: it is not in host memory."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.size * self.dtype.itemsize

    def part(self, elements: slice) -> DeviceMatrix:
        """Return consecutive elements as a row."""
        first, last, _ = elements.indices(self.size)
        address = self.address + first * self.dtype.itemsize
        return DeviceMatrix(address, 1, last - first, self.dtype)


class DeviceKeptMemory:
    """A piece of a device's memory, for one session. It is cleared at first.

    All of it is allocated at once: a session has what it has reserved, and takes no
    time to allocate in the middle of a step.

    Args:
        device: The device, in the thread of its worker.
        keep_bytes: Bytes of the session's arrays.
        empty: Allocates host memory for copies.

    Raises:
        MemoryError: The device has not enough memory.
    """

    in_host_memory = False
    piece_elements = PIECE_ELEMENTS

    def __init__(self, device: Device, keep_bytes: int, empty: Allocate) -> None:
        self._device = device
        self._empty = empty
        size_bytes = device_bytes(keep_bytes)
        with device.errors():
            self._sums = empty(PARTIAL_SUMS * 8).view(np.float64)
            self._memory = device.allocate(size_bytes)
        try:
            self._scratch = self._memory.address
            self._arena = Arena(
                self._scratch + _SCRATCH_BYTES, size_bytes - _SCRATCH_BYTES
            )
            with self._computing():
                # Others have left their elements here.
                device.clear(self._memory.address, size_bytes)
        except BaseException:
            self._memory.free()
            raise

    def allocate(self, shape: tuple[int, ...], dtype: Dtype) -> DeviceArray:
        """Find a place for an array."""
        size_bytes = math.prod(shape) * dtype.itemsize
        return DeviceArray(self._arena.take(size_bytes), shape, dtype)

    def free(self, array: KeptArray) -> None:
        """Give an array's place to others of the session."""
        self._arena.give(_on_device(array).address)

    def close(self) -> None:
        """Release the memory."""
        self._memory.free()
        self._sums = self._sums[:0].copy()

    def empty(self, size_bytes: int) -> npt.NDArray[np.uint8]:
        """Allocate host memory that the device copies fast."""
        with self._device.errors():
            return self._empty(size_bytes)

    def write(self, elements: Array, into: KeptArray, first: int) -> None:
        """Copy elements to the device."""
        part = _on_device(into).part(slice(first, first + elements.size))
        with begun(self._device) as events:
            self._device.upload(elements, part.address)
            self._device.record(Stream.H2D, events.uploaded)
            self._end(events, events.uploaded)

    def read(self, array: KeptArray, first: int, out: Array) -> None:
        """Copy elements from the device."""
        part = _on_device(array).part(slice(first, first + out.size))
        self._download(part.address, out)

    def clear(self, array: KeptArray, part: slice) -> None:
        """Set elements to 0."""
        elements = _on_device(array).part(part)
        with self._computing():
            size_bytes = elements.size * elements.dtype.itemsize
            self._device.clear(elements.address, size_bytes)

    def copy(self, source: KeptArray, into: KeptArray) -> None:
        """Copy an array on the device."""
        if source.nbytes:
            with self._computing():
                self._device.copy(
                    _on_device(source).address, _on_device(into).address, source.nbytes
                )

    def add(self, source: KeptArray, into: KeptArray) -> None:
        """Add an array to another one."""
        if source.size:
            with self._computing():
                self._device.add(
                    _on_device(source).part(slice(None)),
                    _on_device(into).part(slice(None)),
                )

    def round(self, source: KeptArray, into: KeptArray, part: slice) -> None:
        """Round elements to another dtype."""
        with self._computing():
            self._device.convert(
                _on_device(source).part(part), _on_device(into).part(part), add=False
            )

    def sum_of_squares(self, array: KeptArray, part: slice) -> float:
        """Sum the squares of elements: partial sums on the device, their sum here."""
        with self._computing():
            self._device.sum_squares(_on_device(array).part(part), self._scratch)
        self._download(self._scratch, self._sums)
        with np.errstate(all="ignore"):
            return float(np.add.reduce(self._sums))

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
        update = Update(
            optimizer,
            _on_device(p).part(part),
            _on_device(g).part(part),
            tuple(_on_device(states[name]).part(part) for name in optimizer.states),
            made,
            scale,
        )
        with self._computing():
            self._device.update(update)

    def _download(self, source: int, out: Array) -> None:
        with begun(self._device) as events:
            self._device.download(source, out)
            self._device.record(Stream.D2H, events.done)
            self._end(events, events.done)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Wait for the work that is queued in this context on `Stream.COMPUTE`."""
        with begun(self._device) as events:
            yield
            self._device.record(Stream.COMPUTE, events.computed)
            self._end(events, events.computed)

    def _end(self, events: Events, last: object) -> None:
        self._device.synchronize(last)
        self._device.release_events(events)


def _on_device(array: KeptArray) -> DeviceArray:
    if not isinstance(array, DeviceArray):
        raise TypeError("the array is not on the device")
    return array
