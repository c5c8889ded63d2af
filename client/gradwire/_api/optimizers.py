"""The optimizers of a session's steps, with PyTorch's options and names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from gradwire._api.errors import InputError
from gradwire_protocol import optimizers
from gradwire_protocol.optimizers import OptimizerError, check_optimizer


@dataclass(frozen=True, slots=True)
class SGD:
    """Stochastic gradient descent, as `torch.optim.SGD`.

    With g the gradient of a weight p, and b its momentum buffer:

        g = g + weight_decay p
        b = g in the first step, then b = momentum b + (1 - dampening) g
        g = g + momentum b (nesterov), or b
        p = p - lr g

    Raises:
        InputError: A value is out of range; the message names the option.

    Example:
        >>> session.step(gradwire.SGD(lr=0.1, momentum=0.9), {w: g})
    """

    lr: float = 1e-3
    """Learning rate, at least 0."""
    momentum: float = 0.0
    """At least 0; 0: no momentum buffer."""
    dampening: float = 0.0
    """Dampening of the momentum."""
    weight_decay: float = 0.0
    """L2 penalty, at least 0."""
    nesterov: bool = False
    """Whether to use Nesterov's momentum."""

    def __post_init__(self) -> None:
        _checked(self)

    def spec(self) -> optimizers.Optimizer:
        """Return the optimizer of the contract."""
        return optimizers.Sgd(
            self.lr, self.momentum, self.dampening, self.weight_decay, self.nesterov
        )


@dataclass(frozen=True, slots=True)
class Adam:
    """Adam (D. P. Kingma and J. Ba, 2015), as `torch.optim.Adam`.

    Raises:
        InputError: A value is out of range; the message names the option.

    Example:
        >>> session.step(gradwire.Adam(lr=3e-4), {w: g}, max_norm=1.0)
    """

    lr: float = 1e-3
    """Learning rate, at least 0."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the averages of gradients and of their squares, below 1."""
    eps: float = 1e-8
    """Added to the denominator, at least 0."""
    weight_decay: float = 0.0
    """L2 penalty, at least 0."""

    def __post_init__(self) -> None:
        _checked(self)

    def spec(self) -> optimizers.Optimizer:
        """Return the optimizer of the contract."""
        return _adam(self, decoupled=False)


@dataclass(frozen=True, slots=True)
class AdamW:
    """Adam with decoupled weight decay (I. Loshchilov and F. Hutter, 2019).

    As `torch.optim.AdamW`.

    Raises:
        InputError: A value is out of range; the message names the option.

    Example:
        >>> session.step(gradwire.AdamW(lr=3e-4), {w: g}, max_norm=1.0)
    """

    lr: float = 1e-3
    """Learning rate, at least 0."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the averages of gradients and of their squares, below 1."""
    eps: float = 1e-8
    """Added to the denominator, at least 0."""
    weight_decay: float = 1e-2
    """Factor, times lr, of the weight that is taken from the weight, at least 0."""

    def __post_init__(self) -> None:
        _checked(self)

    def spec(self) -> optimizers.Optimizer:
        """Return the optimizer of the contract."""
        return _adam(self, decoupled=True)


Optimizer: TypeAlias = SGD | Adam | AdamW


def _adam(given: Adam | AdamW, *, decoupled: bool) -> optimizers.Adam:
    try:
        beta1, beta2 = given.betas
    except (TypeError, ValueError):
        raise InputError(
            f"{type(given).__name__}'s betas is {given.betas!r}: expected two numbers"
        ) from None
    return optimizers.Adam(
        given.lr, beta1, beta2, given.eps, given.weight_decay, decoupled
    )


def _checked(given: Optimizer) -> None:
    try:
        check_optimizer(given.spec())
    except OptimizerError as error:
        raise InputError(f"{type(given).__name__}'s {error}") from None
