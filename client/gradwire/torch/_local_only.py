"""Finds what was done to the local parameters alone, and was meant for weights, too.

`parameters()` of a model has the local ones only, and so has PyTorch's code that goes
through them: `clip_grad_norm_`, `model.zero_grad()`, `model.requires_grad_(False)`. The
weights on the server would go on as if nothing was said.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable

import torch

from gradwire.torch._unheld import is_stepped
from gradwire.torch._weight import Weight


def check_zeroed(weight: Weight, bias: torch.Tensor) -> None:
    """Warn if the gradient of a layer's bias was emptied, and the weight's was not.

    Args:
        weight: The weight, whose gradient grows together with that of the bias.
        bias: The bias of a layer in a forward pass.
    """
    if (
        weight.touched
        and bias.grad is None
        and bias.requires_grad
        and weight.requires_grad
        and is_stepped(weight)
        # A graph with two passes of a layer adds to the bias once, at its end.
        and torch._C._current_graph_task_id() == -1
    ):
        warnings.warn(
            "the gradients of local parameters were emptied, and those on the server"
            " were not: model.zero_grad() knows the local ones only; use"
            " opt.zero_grad() of gradwire.torch.optimizer",
            stacklevel=2,
        )


def check_frozen(
    weight: Weight, bias: torch.Tensor, before: tuple[bool, bool]
) -> tuple[bool, bool]:
    """Warn if a layer's bias was frozen or thawed, and its weight was not.

    Args:
        weight: The weight.
        bias: The bias.
        before: Whether they required gradients when this was called last.

    Returns:
        Whether they do now.
    """
    now = weight.requires_grad, bias.requires_grad
    if now[0] == before[0] and now[1] != before[1] and now[0] != now[1]:
        done = "thawed" if now[1] else "frozen"
        warnings.warn(
            f"a bias was {done}, and the weight of its layer, on the server, was not:"
            " parameters() and requires_grad_() of a model know the local parameters"
            f" only; call layer.requires_grad_({now[1]}) for each layer, as of"
            " gradwire.torch.remote_layers(model).values()",
            stacklevel=2,
        )
    return now


class GradientVersions:
    """Notices that local gradients are changed between backward pass and step."""

    def __init__(self) -> None:
        # By id: tensors are compared by their elements.
        self._versions: dict[int, tuple[torch.Tensor, int]] = {}

    def watch(self, parameters: Iterable[torch.Tensor]) -> None:
        """Note the gradients of parameters, as the backward passes leave them."""
        versions = weakref.ref(self)

        def note(parameter: torch.Tensor) -> None:
            noted = versions()
            if noted is not None and parameter.grad is not None:
                noted._versions[id(parameter)] = parameter, parameter.grad._version

        for each in parameters:
            if each.requires_grad:
                handle = each.register_post_accumulate_grad_hook(note)
                weakref.finalize(self, handle.remove).atexit = False

    def forget(self) -> None:
        """Forget the gradients: they have been used, or emptied."""
        self._versions.clear()

    def check(self) -> None:
        """Warn if all of them were changed, as by clipping; some may be masked."""
        versions = list(self._versions.values())
        self.forget()
        if versions and all(
            each.grad is not None and each.grad._version != version
            for each, version in versions
        ):
            warnings.warn(
                "the local gradients were changed after the backward pass, and those"
                " on the server were not: clip_grad_norm_(model.parameters(), ...)"
                " knows the local ones only; use opt.step(max_norm=...), and scale the"
                " loss for other factors",
                stacklevel=5,  # the caller of step(), which PyTorch wraps
            )
