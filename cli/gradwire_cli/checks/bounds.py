"""Bounds on the rounding error of a product, element by element.

For an inner product of length n, summed in any order in an arithmetic of
unit roundoff u,

    |fl(a . b) - a . b| <= gamma_n |a| . |b|,    gamma_n = n u / (1 - n u)

(N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition,
section 3.1, inequality (3.5)). It holds for any order, so also for sums over
row blocks. Fused multiply-adds only make the left side smaller. For results
rounded to a narrower dtype afterwards, the same section's model of one
rounding, fl(s) = s (1 + d) with |d| <= u, adds to the bound. Both are worst-case
bounds, not probabilities: a server that exceeds them is wrong.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from gradwire._integrity.rounding_error import gamma
from gradwire_protocol.dtypes import Dtype

Doubles = npt.NDArray[np.float64]


def product_bound(
    exact: Doubles, magnitude: Doubles, length: int, operands: Dtype, result: Dtype
) -> Doubles:
    """Bound on |result - reference| for every element of a product.

    The result is a product of matrices of dtype `operands`, computed as the
    contract says: summed in float32 for 16-bit operands and in the operands'
    own dtype otherwise, then rounded once if `result` is narrower. The
    reference is the same product in float64; the bound includes its error.

    Args:
        exact: The reference.
        magnitude: |A| |B|, the product of the operands' magnitudes.
        length: Length of the sums.
        operands: Dtype of the operands.
        result: Dtype of the result.
    """
    sums = operands.sums_in
    summed = (
        gamma(length, sums.unit_roundoff) + gamma(length, Dtype.FLOAT64.unit_roundoff)
    ) * magnitude + length * sums.smallest_subnormal
    if result.itemsize >= sums.itemsize:
        return summed
    rounded = result.unit_roundoff * (np.abs(exact) + summed)
    return summed + rounded + result.smallest_subnormal / 2


def worst(error: npt.NDArray[Any], bound: npt.NDArray[Any]) -> tuple[float, float]:
    """Error and bound of the element with the largest ratio of error to bound.

    An error of NaN counts as infinite.
    """
    if not error.size:
        return 0.0, 0.0
    error = np.where(np.isnan(error), np.inf, error)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(error == 0, 0, error / bound)
    at = int(np.argmax(share))
    return float(error.flat[at]), float(np.broadcast_to(bound, error.shape).flat[at])
