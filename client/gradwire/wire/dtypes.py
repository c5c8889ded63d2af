"""Element types: the one table between the wire's and NumPy's."""

from __future__ import annotations

import enum
from typing import Any

import ml_dtypes
import numpy as np


class Dtype(enum.IntEnum):
    """An element type, with its number on the wire (`gradwire.v1.Dtype`)."""

    FLOAT16 = 1
    BFLOAT16 = 2
    FLOAT32 = 3
    FLOAT64 = 4

    @property
    def numpy(self) -> np.dtype[Any]:
        """The NumPy dtype, in native (little-endian) byte order."""
        return _NUMPY[self]

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return _NUMPY[self].itemsize

    @property
    def label(self) -> str:
        """The name that people use: ``float16``, ``bfloat16``, ..."""
        return self.name.lower()

    @property
    def proto_name(self) -> str:
        """The name of the enum's value in the contract: ``DTYPE_FLOAT32``."""
        return f"DTYPE_{self.name}"

    @property
    def sums_in(self) -> Dtype:
        """The dtype in which products of such operands are summed."""
        return Dtype.FLOAT32 if self.itemsize == 2 else self

    @classmethod
    def of(cls, dtype: np.dtype[Any]) -> Dtype:
        """The element type of a NumPy dtype, in any byte order.

        Raises:
            KeyError: The dtype has no element type on the wire.
        """
        return _FROM_NUMPY[np.dtype(dtype).newbyteorder("=")]

    @classmethod
    def named(cls, label: str) -> Dtype:
        """The element type called `label`.

        Raises:
            KeyError: No element type has that name.
        """
        return _FROM_LABEL[label]


_NUMPY: dict[Dtype, np.dtype[Any]] = {
    Dtype.FLOAT16: np.dtype(np.float16),
    Dtype.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
    Dtype.FLOAT32: np.dtype(np.float32),
    Dtype.FLOAT64: np.dtype(np.float64),
}
_FROM_NUMPY = {dtype: wire for wire, dtype in _NUMPY.items()}
_FROM_LABEL = {wire.label: wire for wire in Dtype}
