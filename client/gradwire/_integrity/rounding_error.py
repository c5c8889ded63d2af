"""Bounds on the rounding error of a product.

N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition,
sections 2.1 and 3.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gradwire._api.types import Device, Doubles
from gradwire_protocol.dtypes import Dtype

_TENSOR_CORES = 3.0
"""Error of an addition on tensor cores, which truncate, in unit roundoffs (M. Fasi, N.
J. Higham, M. Mikaitis and S. Pranesh, Numerical behavior of NVIDIA tensor cores, PeerJ
Computer Science 7:e330, 2021)."""

_TF32 = 2 * 2.0**-10
"""Relative error of a product of factors truncated to TF32."""


def gamma(length: int, u: float) -> float:
    """Return gamma_n = n u / (1 - n u), or infinity if n u is at least 1."""
    return length * u / (1 - length * u) if length * u < 1 else float("inf")


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """Everything about the computation of C = A B that affects its rounding error."""

    operands: Dtype
    """Dtype of the operands."""

    result: Dtype
    """Dtype in which the result is sent, rounded once."""

    length: int
    """Largest number of additions in an element."""

    roundoffs: float = 1.0
    """Largest error of an addition, in unit roundoffs of the sums' dtype."""

    coarse: float = 0.0
    """Largest relative error of a product of two elements."""

    @classmethod
    def of_device(
        cls, device: Device, operands: Dtype, result: Dtype, length: int, *, tf32: bool
    ) -> Arithmetic:
        """Return the arithmetic of a device, as described by its server.

        Args:
            device: The device.
            operands: Dtype of the operands.
            result: Dtype in which the result is sent.
            length: Largest number of additions in an element.
            tf32: Whether the job allows TF32.
        """
        tf32 = tf32 and operands.has_tf32 and not device.ignores_tf32
        to_nearest = operands.label in device.sums_rounded_to_nearest and not tf32
        return cls(
            operands,
            result,
            length,
            roundoffs=1.0 if to_nearest else _TENSOR_CORES,
            coarse=_TF32 if tf32 else 0.0,
        )

    @property
    def worst(self) -> float:
        """Bound of an error, relative to |A| |B|."""
        return gamma(self.length, self._u) + self.coarse

    @property
    def usual(self) -> float:
        """Upper bound of the standard deviation of an error, relative to |A| |B|."""
        return self._u * math.sqrt(self.length) + self.coarse

    @property
    def rounding(self) -> float:
        """Relative error of rounding the result; 0 if it is not rounded."""
        if self.result.itemsize >= self.operands.sums_in.itemsize:
            return 0.0
        return self.result.unit_roundoff

    @property
    def tiny(self) -> float:
        """Absolute error due to underflow.

        Subnormal numbers count as lost: on either side, a library may have made the
        processor flush them to zero (``torch.set_flush_denormal``, or a library that
        was built with -ffast-math). float16 is converted, and then is not flushed.
        """
        lost = self.operands.sums_in.smallest_normal
        if self.result is not Dtype.FLOAT16:
            lost = max(lost, self.result.smallest_normal)
        return (self.length + 1) * lost + self.result.smallest_subnormal / 2

    @property
    def largest(self) -> float:
        """Largest finite value of an element or a sum."""
        return min(self.result.largest, self.operands.sums_in.largest)

    def bound(self, exact: Doubles, magnitude: Doubles, length: int) -> Doubles:
        """Return a bound of |result - exact| for every element of a product.

        For an inner product of length n, summed in any order in an arithmetic
        of unit roundoff u,

            |fl(a . b) - a . b| <= gamma_n |a| . |b|,  gamma_n = n u / (1 - n u)

        (N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd
        edition, section 3.1, inequality (3.5)). Because any order is allowed, it also
        holds for sums over row blocks. Fused multiply-adds only reduce the left side.
        For results rounded to a narrower dtype afterwards, the model of one rounding in
        section 2.2 gives the additional error: fl(s) = s (1 + d) with |d| <= u.
        Underflow adds at most `tiny`. These bounds are strict: a
        result that exceeds them is wrong.

        Args:
            exact: The product, summed in float64, shape (rows, columns). The bound
                includes its own error.
            magnitude: |A| |B|, of the same shape.
            length: Length of the sums in float64.
        """
        reference = gamma(length, Dtype.FLOAT64.unit_roundoff)
        summed = (self.worst + reference) * magnitude + self.tiny
        return summed + self.rounding * (np.abs(exact) + summed)

    @property
    def _u(self) -> float:
        return self.roundoffs * self.operands.sums_in.unit_roundoff


def can_be_squared(
    norms: npt.NDArray[Any], dtype: np.dtype[np.generic]
) -> npt.NDArray[np.bool_]:
    """Return whether sums of squares neither overflowed nor underflowed.

    Args:
        norms: The roots of the sums.
        dtype: Dtype of the computation: float32 or float64.
    """
    # Squares stay below the 0.78th power, which leaves room for their sum.
    near = Dtype.of(dtype).largest ** 0.39
    return np.asarray((norms > 1 / near) & (norms < near))
