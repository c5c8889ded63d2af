"""What rounding does: the constants from which bounds on errors are made.

N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition,
sections 2.1 and 3.1.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from gradwire_protocol.dtypes import Dtype


def unit_roundoff(dtype: Dtype) -> float:
    """Largest relative error of one rounding to nearest: half an epsilon."""
    return float(_finfo(dtype).eps) / 2


def smallest_subnormal(dtype: Dtype) -> float:
    """Spacing of the numbers of `dtype` around 0."""
    return float(_finfo(dtype).smallest_subnormal)


def largest(dtype: Dtype) -> float:
    """The largest finite number of `dtype`."""
    return float(_finfo(dtype).max)


def gamma(length: int, u: float) -> float:
    """gamma_n: n u / (1 - n u), and infinity from n u = 1 on."""
    return length * u / (1 - length * u) if length * u < 1 else float("inf")


def can_be_squared(
    norms: npt.NDArray[Any], dtype: np.dtype[np.generic]
) -> npt.NDArray[np.bool_]:
    """Whether sums of squares of that dtype neither overflowed nor underflowed.

    Args:
        norms: Their roots.
        dtype: In which they were computed: float32 or float64.
    """
    near = 1e15 if dtype.itemsize == 4 else 1e130
    return np.asarray((norms > 1 / near) & (norms < near))


def _finfo(dtype: Dtype) -> Any:
    # NumPy's own knows no bfloat16, and ml_dtypes' has no types.
    return ml_dtypes.finfo(dtype.numpy)  # type: ignore[no-untyped-call]
