"""Operators that PyTorch's compiler takes into its graphs as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

_library = torch.library.Library("gradwire", "FRAGMENT")


NO_FORWARD_MODE = (
    "forward-mode derivatives are not supported by a product on a server: use reverse"
    " mode, as torch.autograd.grad, torch.func.vjp and jacrev do"
)


def define(
    schema: str,
    compute: Callable[..., Any],
    shapes: Callable[..., Any],
    function: type[torch.autograd.Function] | None = None,
) -> Any:
    """Define an operator.

    `torch.library.custom_op` does nearly the same. But its operators drop the tangents
    of their inputs without a word: their results would seem to be constants. This one
    has those derivatives that it is given, and refuses the others.

    Args:
        schema: Its name, arguments and results. Its results are no views of arguments.
        compute: Computes it.
        shapes: Returns empty results, for compilers.
        function: Computes it with its gradients, from the operator `below_autograd`;
            None: it has no gradients.

    Returns:
        The operator.
    """
    name = schema[: schema.index("(")]
    _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
    _library.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gradwire::{name}", shapes, lib=_library)
    operator = getattr(torch.ops.gradwire, name)

    def with_derivatives(*inputs: Any) -> Any:
        tensors = [each for each in inputs if isinstance(each, torch.Tensor)]
        if any(forward_ad.unpack_dual(each).tangent is not None for each in tensors):
            raise NotImplementedError(NO_FORWARD_MODE)
        if function is not None:
            return function.apply(*inputs)
        if torch.is_grad_enabled() and any(each.requires_grad for each in tensors):
            raise NotImplementedError(
                "torch.func cannot transform a product on a server in compiled code:"
                " leave the function that it transforms uncompiled"
            )
        with below_autograd():
            return operator(*inputs)

    _library.impl(name, with_derivatives, "Autograd")
    return operator


below_autograd = torch._C._AutoDispatchBelowAutograd
"""Within this context, operators are computed without derivatives."""
