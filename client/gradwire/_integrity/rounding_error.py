"""What rounding does: the constants from which bounds on errors are made.

N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition,
sections 2.1 and 3.1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from gradwire_protocol.dtypes import Dtype


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
    # Squares reach its 0.78th power: the rest is for their sum.
    near = Dtype.of(dtype).largest ** 0.39
    return np.asarray((norms > 1 / near) & (norms < near))
