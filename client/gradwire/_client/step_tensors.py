"""Weights and gradients among the arguments of a session, in the caller's words."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

from gradwire._api.errors import CallError, InputError
from gradwire._api.optimizers import Optimizer
from gradwire._core.kept import Tensor

_DESCRIBED = {
    "weight": "a weight",
    "gradient": "a gradient",
    "activation": "an X that forward has kept",
}

_MADE_BY = {"weight": "put", "gradient": "zeros_like"}


def argument_name(role: str, group: int) -> str:
    """Return what a weight or a gradient is called among the arguments of `step`.

    Args:
        role: "weight" or "gradient".
        group: Index of its group: the first one is `gradients`, the others are `more`.
    """
    return f"a {role} in {f'more[{group - 1}]' if group else 'gradients'}"


def check_role(tensor: Tensor, name: str, role: str) -> None:
    """Check that an argument is a tensor of a role.

    Args:
        tensor: The tensor.
        name: The argument's name.
        role: "weight" or "gradient".

    Raises:
        InputError: It has another role.
    """
    if tensor.role != role:
        raise InputError(
            f"{name} is {tensor!r}, {_DESCRIBED[tensor.role]}: expected"
            f" {_DESCRIBED[role]}, as returned by {_MADE_BY[role]}"
        )


def check_pair(weight: Tensor, gradient: Tensor, group: int, seen: set[int]) -> None:
    """Check what is known of a weight and its gradient without the server.

    Args:
        weight: The weight.
        gradient: Its gradient.
        group: Index of their group.
        seen: Numbers of the tensors before them, to which theirs are added.

    Raises:
        InputError: One is something else, or was there before; or they do not fit each
            other.
    """
    for role, tensor in (("weight", weight), ("gradient", gradient)):
        name = argument_name(role, group)
        check_role(tensor, name, role)
        if tensor.number in seen:
            raise InputError(f"{name} is {tensor!r}, which the step names twice")
        seen.add(tensor.number)
    pair = f"the weight is {weight!r} and its gradient {gradient!r}: expected"
    if weight.transposed is not gradient.transposed:
        raise InputError(f"{pair} both transposed, or none")
    if weight.shape != gradient.shape:
        raise InputError(f"{pair} one shape")


@contextlib.contextmanager
def callers_tensors(
    groups: Sequence[tuple[Optimizer, Mapping[Tensor, Tensor]]],
) -> Iterator[None]:
    """Have a server's refusal of a step name the tensors, and not fields of the call.

    `GradwireError.fields` and `details` keep the server's words.
    """
    try:
        yield
    except CallError as error:
        text = str(error)
        for path, name, tensor in _paths(groups):
            if path in error.fields:
                text = text.replace(f"{path} is {tensor.number}", f"{name} is {tensor}")
                text = text.replace(path, f"{name}, {tensor},")
        error.args = (text.replace("header.frozen", "frozen"),)
        raise


def _paths(
    groups: Sequence[tuple[Optimizer, Mapping[Tensor, Tensor]]],
) -> Iterator[tuple[str, str, Tensor]]:
    """Yield each tensor's path in the request, its name, and the tensor."""
    for group, (_, gradients) in enumerate(groups):
        for position, pair in enumerate(gradients.items()):
            for role, tensor in zip(_MADE_BY, pair, strict=True):
                path = f"groups[{group}].parameters[{position}].{role}"
                yield path, argument_name(role, group), tensor
