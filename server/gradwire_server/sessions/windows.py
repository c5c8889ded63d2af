"""Elements of kept arrays as bytes in host memory, wherever the arrays lie.

Arrays in host memory are read and written in place. Those of a device are copied
piece by piece, by work for the thread of the device worker.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from gradwire_protocol.limits import MAX_PAYLOAD_BYTES
from gradwire_server.backends.kept_memory import KeptArray, KeptMemory

WINDOW_BYTES = MAX_PAYLOAD_BYTES
"""Bytes that are copied at once: as large a piece as one message can bring."""

Work: TypeAlias = Callable[[], None]
"""To be done in the thread of the device worker."""


class _Window:
    """Consecutive bytes of one array, copied to host memory."""

    def __init__(self, memory: KeptMemory) -> None:
        self._memory = memory
        self._buffer: npt.NDArray[np.uint8] | None = None
        self._array: KeptArray | None = None
        self._begin = self._end = 0

    def _allocate(self) -> None:
        if self._buffer is None:
            self._buffer = self._memory.empty(WINDOW_BYTES)

    def _bytes(self, begin: int, end: int) -> npt.NDArray[np.uint8]:
        if self._buffer is None:
            raise RuntimeError("nothing was loaded")
        return self._buffer[begin - self._begin : end - self._begin]


class ReadWindow(_Window):
    """Reads arrays. Parts are at most `WINDOW_BYTES` and whole elements.

    Args:
        memory: The memory of the arrays.
    """

    def load(self, array: KeptArray, begin: int, end: int) -> Work | None:
        """Return what has to be done before these bytes can be seen, if anything."""
        loaded = array is self._array and self._begin <= begin and end <= self._end
        if array.host is not None or loaded:
            return None
        return partial(self._load, array, begin)

    def seen(self, array: KeptArray, begin: int, end: int) -> memoryview:
        """Return bytes of an array, valid until the next `load`."""
        if array.host is not None:
            return array.host.reshape(-1).view(np.uint8).data[begin:end]
        return self._bytes(begin, end).data

    def _load(self, array: KeptArray, begin: int) -> None:
        self._allocate()
        self._array, self._begin = None, begin
        self._end = min(array.nbytes, begin + WINDOW_BYTES)
        elements = self._bytes(begin, self._end).view(array.dtype.numpy)
        self._memory.read(array, begin // array.dtype.itemsize, elements)
        self._array = array


class WriteWindow(_Window):
    """Writes arrays. Parts of one array follow each other.

    They are at most `WINDOW_BYTES` and whole elements.

    Args:
        memory: The memory of the arrays.
    """

    def make_room(self, array: KeptArray, begin: int, end: int) -> Work | None:
        """Return what has to be done before these bytes can be filled, if anything."""
        follows = array is self._array and begin == self._end
        if array.host is not None or (follows and end - self._begin <= WINDOW_BYTES):
            return None
        return partial(self._begin_at, array, begin)

    def room(self, array: KeptArray, begin: int, end: int) -> memoryview:
        """Return bytes of an array, to be filled before the next `make_room`."""
        if array.host is not None:
            return array.host.reshape(-1).view(np.uint8).data[begin:end]
        self._end = end
        return self._bytes(begin, end).data

    def rest(self) -> Work | None:
        """Return what has to be done after the last bytes are filled, if anything."""
        return self._write if self._end > self._begin else None

    def _begin_at(self, array: KeptArray, begin: int) -> None:
        self._allocate()
        self._write()
        self._array, self._begin, self._end = array, begin, begin

    def _write(self) -> None:
        array, begin = self._array, self._begin
        if array is not None and self._end > begin:
            elements = self._bytes(begin, self._end).view(array.dtype.numpy)
            self._memory.write(elements, array, begin // array.dtype.itemsize)
            self._begin = self._end
