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

    numpy: np.dtype[Any]
    """The NumPy dtype, in native (little-endian) byte order."""

    itemsize: int
    """Bytes of one element."""

    label: str
    """The name that people use: ``float16``, ``bfloat16``, ..."""

    def __init__(self, _: int) -> None:
        # Asked for with every message: not worth looking up each time.
        self.label = self.name.lower()
        self.numpy = np.dtype(getattr(ml_dtypes, self.label, self.label))
        self.itemsize = self.numpy.itemsize

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


_FROM_NUMPY = {wire.numpy: wire for wire in Dtype}
_FROM_LABEL = {wire.label: wire for wire in Dtype}
