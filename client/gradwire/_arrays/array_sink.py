"""Storage of received elements in an array of any memory layout."""

from __future__ import annotations

from typing import Any

import numpy as np

from gradwire._api.types import Array
from gradwire_protocol.dtypes import Dtype


class ArraySink:
    """Stores a result's elements, in order, in an array.

    Args:
        array: The array, of any memory layout, with `dtype` or a wider dtype.
        dtype: Dtype of the received elements.
    """

    def __init__(self, array: Array, dtype: Dtype) -> None:
        if array.ndim == 1:
            array = array[None]
        self._target = array
        self._dtype = dtype.numpy
        self._columns = array.shape[-1]
        self._lead = array.shape[:-1]
        self._row_bytes = self._columns * dtype.itemsize
        self._filled = 0
        self._moved = 0
        self._flat = array.flags.c_contiguous and array.dtype == self._dtype
        # A contiguous array with another dtype than the received elements.
        self._line: Array | None = None
        if self._flat:
            self._rows = array
        elif array.flags.c_contiguous:
            self._line = array.reshape(-1)
            return
        else:
            # Rows are collected here, and copied to the array when complete.
            rows = max(1, (1 << 20) // max(1, self._row_bytes))
            self._rows = np.empty((rows, self._columns), dtype.numpy)
        self._bytes = self._rows.reshape(-1).view(np.uint8).data

    def seek(self, row: int) -> None:
        """Continue at `row`."""
        if self._flat:
            self._filled = row * self._row_bytes
        elif self._line is not None:
            self._filled = row * self._columns
        else:
            self.close()
            self._moved = row

    def write(self, payload: memoryview) -> None:
        """Store the next elements, at most as many as are missing."""
        if self._flat:
            end = self._filled + len(payload)
            self._bytes[self._filled : end] = payload
            self._filled = end
            return
        if self._line is not None:
            elements = np.frombuffer(payload, self._dtype)
            end = self._filled + elements.size
            self._line[self._filled : end] = elements
            self._filled = end
            return
        while payload:
            part = payload[: len(self._bytes) - self._filled]
            self._bytes[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            payload = payload[len(part) :]
            if self._filled == len(self._bytes):
                self._move()

    def room(self, size_bytes: int) -> memoryview | None:
        """Return the memory of the next bytes; None if they have to be converted."""
        if not self._flat:
            return None
        return self._bytes[self._filled : self._filled + size_bytes]

    def advance(self, size_bytes: int) -> None:
        """Count the next bytes as stored: they were received into `room`."""
        self._filled += size_bytes

    def close(self) -> None:
        """Copy all collected elements to the array."""
        if not self._flat and self._line is None and self._filled:
            self._move()

    def _move(self) -> None:
        count = self._filled // self._row_bytes
        first, last = self._moved, self._moved + count
        where: Any = slice(first, last)
        if len(self._lead) > 1:
            where = np.unravel_index(np.arange(first, last), self._lead)
        self._target[where] = self._rows[:count]
        self._moved, self._filled = last, 0
