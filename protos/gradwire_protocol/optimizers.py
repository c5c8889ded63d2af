"""The optimizers of a session's steps: their options, states and valid values.

`Sgd` and `Adam` have the options of PyTorch's optimizers under PyTorch's names, and
are written to and read from the messages of the same names. They hold any values;
`check_optimizer` says whether a step can use them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Real
from types import MappingProxyType
from typing import Any, ClassVar, TypeAlias

from gradwire_protocol.v1 import session_service_pb2


class OptimizerError(ValueError):
    """An optimizer's option has an invalid value; the text is a sentence.

    Args:
        message: The option, the given and the expected value.
        field: Path of the option.
    """

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True, slots=True)
class Sgd:
    """Stochastic gradient descent, as `torch.optim.SGD`.

    The formulas are those of `gradwire.v1.Sgd`. Nesterov's momentum is that of
    I. Sutskever et al., On the importance of initialization and momentum in deep
    learning, ICML 2013, in the form that PyTorch's documentation states.
    """

    kind: ClassVar[str] = "sgd"
    """The member of `ParameterGroup.optimizer`."""

    lr: float
    """Learning rate, at least 0."""
    momentum: float = 0.0
    """Factor of the momentum buffer, at least 0. 0: there is no buffer."""
    dampening: float = 0.0
    """1 minus the factor of the gradient in the momentum buffer."""
    weight_decay: float = 0.0
    """Factor of the weight that is added to the gradient, at least 0."""
    nesterov: bool = False
    """Whether to use Nesterov's momentum, which needs momentum without dampening."""

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the states of each weight, as in PyTorch."""
        return ("momentum_buffer",) if self.momentum else ()

    @classmethod
    def from_message(cls, message: session_service_pb2.Sgd) -> Sgd:
        """Read the options from a message. Values are not checked."""
        return cls(**_read(cls, message))

    def to_message(self) -> session_service_pb2.Sgd:
        """Write the options, which must be valid, to a message."""
        return session_service_pb2.Sgd(**asdict(self))


@dataclass(frozen=True, slots=True)
class Adam:
    """Adam, as `torch.optim.Adam`, or AdamW, as `torch.optim.AdamW`.

    The formulas are those of `gradwire.v1.Adam`: D. P. Kingma and J. Ba, Adam: a
    method for stochastic optimization, ICLR 2015; I. Loshchilov and F. Hutter,
    Decoupled weight decay regularization, ICLR 2019.
    """

    kind: ClassVar[str] = "adam"
    """The member of `ParameterGroup.optimizer`."""

    lr: float
    """Learning rate, at least 0."""
    beta1: float = 0.9
    """Decay of the average of gradients, at least 0 and less than 1."""
    beta2: float = 0.999
    """Decay of the average of squared gradients, at least 0 and less than 1."""
    eps: float = 1e-8
    """Added to the denominator, at least 0."""
    weight_decay: float = 0.0
    """At least 0: a factor of the weight that is added to the gradient, or with
    `decoupled` a factor of lr times the weight that is taken from the weight."""
    decoupled: bool = False
    """Whether weight decay is decoupled from the gradient: AdamW."""

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the states of each weight, as in PyTorch."""
        return ("exp_avg", "exp_avg_sq")

    @classmethod
    def from_message(cls, message: session_service_pb2.Adam) -> Adam:
        """Read the options from a message. Values are not checked."""
        return cls(**_read(cls, message))

    def to_message(self) -> session_service_pb2.Adam:
        """Write the options, which must be valid, to a message."""
        return session_service_pb2.Adam(**asdict(self))


Optimizer: TypeAlias = Sgd | Adam

OPTIMIZERS: Mapping[str, type[Sgd] | type[Adam]] = MappingProxyType(
    {optimizer.kind: optimizer for optimizer in (Sgd, Adam)}
)
"""The optimizers by the members of `ParameterGroup.optimizer`."""

CLIP_EPSILON = 1e-6
"""Added to the norm of all gradients before dividing by it, as by
`torch.nn.utils.clip_grad_norm_`."""

STATES = ("momentum_buffer", "exp_avg", "exp_avg_sq")
"""Names of all states of weights, as in `TensorInfo.states`."""

FORMULAS = "gradwire.v1"
"""Version of the formulas, in saved files: states are valid with these alone."""


def check_optimizer(optimizer: Optimizer, path: str = "") -> None:
    """Check the values of an optimizer's options.

    Args:
        optimizer: The optimizer, with values of any kind.
        path: Path of the optimizer, for the error's text and field.

    Raises:
        OptimizerError: A value is not a finite number, or out of its range.
    """
    nesterov = isinstance(optimizer, Sgd) and optimizer.nesterov is True
    for option in fields(optimizer):
        value = getattr(optimizer, option.name)
        rules = [_VALID[option.name]]
        if nesterov and option.name in _VALID_WITH_NESTEROV:
            rules.append(_VALID_WITH_NESTEROV[option.name])
        for is_valid, expected in rules:
            if not is_valid(value):
                field = f"{path}.{option.name}" if path else option.name
                raise OptimizerError(
                    f"{field} is {_shown(value)}: expected {expected}", field
                )


def _is_finite(value: object) -> bool:
    # To Python, True and False are numbers. As a rate, they are a mistake.
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer larger than any float
        return False


def _shown(value: object) -> str:
    """A value in an error's text: short, and numbers without their type."""
    return (str(value) if isinstance(value, Real) else repr(value))[:60]


_Rule: TypeAlias = tuple[Callable[[Any], bool], str]

_FINITE: _Rule = (_is_finite, "a finite number")
_AT_LEAST_0: _Rule = (
    lambda value: _is_finite(value) and value >= 0,
    "a finite number, at least 0",
)
_BELOW_1: _Rule = (
    lambda value: _is_finite(value) and 0 <= value < 1,
    "at least 0 and less than 1",
)
_FLAG: _Rule = (lambda value: isinstance(value, bool), "True or False")

_VALID: Mapping[str, _Rule] = {
    "lr": _AT_LEAST_0,
    "momentum": _AT_LEAST_0,
    "dampening": _FINITE,
    "weight_decay": _AT_LEAST_0,
    "nesterov": _FLAG,
    "beta1": _BELOW_1,
    "beta2": _BELOW_1,
    "eps": _AT_LEAST_0,
    "decoupled": _FLAG,
}
"""Valid values of every option."""

_VALID_WITH_NESTEROV: Mapping[str, _Rule] = {
    "momentum": (lambda value: value > 0, "more than 0 with nesterov"),
    "dampening": (lambda value: value == 0, "0 with nesterov"),
}
"""What Nesterov's momentum needs, as in PyTorch."""


def _read(cls: type[Sgd] | type[Adam], message: Any) -> dict[str, Any]:
    return {option.name: getattr(message, option.name) for option in fields(cls)}
