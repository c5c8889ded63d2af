"""The scalars in the formulas of updates, for any array library.

They are computed in float64, and rounded once to the dtype of the elements.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from gradwire_protocol.dtypes import Dtype
from gradwire_protocol.optimizers import Adam, Sgd


class SgdScalars(NamedTuple):
    """Factors of an update by SGD, in the dtype of the elements."""

    scale: Any
    """Factor of the gradient, applied first."""
    weight_decay: Any
    lr: Any
    momentum: Any
    undamped: Any
    """1 minus the dampening."""

    @classmethod
    def of(cls, optimizer: Sgd, dtype: Dtype, scale: float) -> SgdScalars:
        """Return the factors for an optimizer."""
        values = (
            scale,
            optimizer.weight_decay,
            optimizer.lr,
            optimizer.momentum,
            1 - optimizer.dampening,
        )
        return cls(*map(dtype.numpy.type, values))


class AdamScalars(NamedTuple):
    """Factors of an update by Adam or AdamW, in the dtype of the elements."""

    scale: Any
    """Factor of the gradient, applied first."""
    weight_decay: Any
    """Factor of the weight that is added to the gradient; 0 if it is decoupled."""
    kept: Any
    """Factor of the weight, applied first; 1 unless weight decay is decoupled."""
    new: Any
    """1 - beta1."""
    decay2: Any
    """beta2."""
    new2: Any
    """1 - beta2."""
    step_size: Any
    """lr / (1 - beta1ᵗ)."""
    correction2: Any
    """√(1 - beta2ᵗ)."""
    eps: Any

    @classmethod
    def of(cls, optimizer: Adam, dtype: Dtype, scale: float, t: int) -> AdamScalars:
        """Return the factors for the t-th update by an optimizer."""
        lr, beta1, beta2 = optimizer.lr, optimizer.beta1, optimizer.beta2
        decoupled = optimizer.decoupled
        values = (
            scale,
            0 if decoupled else optimizer.weight_decay,
            1 - lr * optimizer.weight_decay if decoupled else 1,
            1 - beta1,
            beta2,
            1 - beta2,
            lr / (1 - beta1**t),
            (1 - beta2**t) ** 0.5,
            optimizer.eps,
        )
        return cls(*map(dtype.numpy.type, values))
