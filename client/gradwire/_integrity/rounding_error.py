"""What rounding does: the one place that says how far a product may be off.

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
"""Unit roundoffs that an addition loses there: they truncate (M. Fasi, N. J.
Higham, M. Mikaitis and S. Pranesh, Numerical behavior of NVIDIA tensor cores,
PeerJ Computer Science 7:e330, 2021)."""

_TF32 = 2 * 2.0**-10
"""By how much a product is off whose factors were cut to TF32."""


def gamma(length: int, u: float) -> float:
    """gamma_n: n u / (1 - n u), and infinity from n u = 1 on."""
    return length * u / (1 - length * u) if length * u < 1 else float("inf")


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """How a product C = A B was computed, as far as its rounding depends on it."""

    operands: Dtype
    """Dtype of the operands."""

    result: Dtype
    """Dtype in which the result travels, rounded once."""

    length: int
    """Most additions that an element has been through."""

    roundoffs: float = 1.0
    """How many unit roundoffs of the sums' dtype one addition may lose."""

    coarse: float = 0.0
    """By how much, relatively, a product of two elements may be off."""

    @classmethod
    def of_device(
        cls, device: Device, operands: Dtype, result: Dtype, length: int, *, tf32: bool
    ) -> Arithmetic:
        """That of a device, as its server describes it.

        Args:
            device: What computed.
            operands: Dtype of the operands.
            result: Dtype in which the result travels.
            length: Most additions that an element has been through.
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
        """Bound on an error, relative to |A| |B|."""
        return gamma(self.length, self._u) + self.coarse

    @property
    def usual(self) -> float:
        """Standard deviation of an error, relative to |A| |B|, or more."""
        return self._u * math.sqrt(self.length) + self.coarse

    @property
    def rounding(self) -> float:
        """Relative error of the result's own rounding; 0 where there is none."""
        if self.result.itemsize >= self.operands.sums_in.itemsize:
            return 0.0
        return self.result.unit_roundoff

    @property
    def tiny(self) -> float:
        """What underflow adds to an error."""
        return (
            self.length * self.operands.sums_in.smallest_subnormal
            + self.result.smallest_subnormal / 2
        )

    @property
    def largest(self) -> float:
        """What no element and no sum can pass without becoming Inf."""
        return min(self.result.largest, self.operands.sums_in.largest)

    def bound(self, exact: Doubles, magnitude: Doubles, length: int) -> Doubles:
        """Bound on |result - exact| for every element of a product.

        For an inner product of length n, summed in any order in an arithmetic
        of unit roundoff u,

            |fl(a . b) - a . b| <= gamma_n |a| . |b|,  gamma_n = n u / (1 - n u)

        (N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd
        edition, section 3.1, inequality (3.5)). The order being free, it holds
        for sums that are cut into row blocks, and fused multiply-adds only make
        the left side smaller. The model of one rounding in section 2.2,
        fl(s) = s (1 + d) with |d| <= u, gives the share of a result that is
        rounded to a narrower dtype afterwards. Underflow adds up to half a
        subnormal each time. Neither is a statement about probabilities: a
        server that exceeds the bound is wrong.

        Args:
            exact: The product, summed in float64, shape (rows, columns). Its own
                error is within the bound.
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
    """Whether sums of squares of that dtype neither overflowed nor underflowed.

    Args:
        norms: Their roots.
        dtype: In which they were computed: float32 or float64.
    """
    # Squares reach its 0.78th power: the rest is for their sum.
    near = Dtype.of(dtype).largest ** 0.39
    return np.asarray((norms > 1 / near) & (norms < near))
