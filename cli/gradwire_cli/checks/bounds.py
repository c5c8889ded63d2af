"""The element of a result with the largest ratio of error to bound."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


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
