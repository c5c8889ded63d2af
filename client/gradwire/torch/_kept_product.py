"""The product of a layer with its weight in a session, as operators of PyTorch.

`torch.compile` takes a custom operator into its graph as it is. It may hold tensors and
constants only, so the weight and what a forward pass keeps are numbers in tensors: as
constants, they would make one compiled graph for each layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from gradwire._client.session_base import Context
from gradwire.torch._kept_x import KeptX, held_by, token_of, with_room
from gradwire.torch._operators import below_autograd, define
from gradwire.torch._unheld import contributed
from gradwire.torch._weight import Weight, label_of, weight_of


def multiply(
    x: torch.Tensor, weight: Weight, wire_dtype: str | None, *, keep: bool
) -> torch.Tensor:
    """Compute x Wᵀ, with its gradient of x, and with dW in the session.

    Args:
        x: Shape (..., in_features), with at least two dimensions.
        weight: W, shape (out_features, in_features).
        wire_dtype: The dtype in which float32 rows travel; None: their own.
        keep: Whether a pass that trains keeps x in the session.

    Returns:
        Shape (..., out_features), with the dtype of x.

    Raises:
        NotImplementedError: A transform of torch.func, or a forward-mode derivative.
        GradwireError: The job failed.
    """
    _refuse_transforms()
    trains = weight.requires_grad and torch.is_grad_enabled()
    y, _ = _multiply(
        x,
        weight.handle,
        weight.leaf if trains else None,
        weight.shape[0],
        wire_dtype,
        keep,
    )
    product: torch.Tensor = y
    return product


def _compute_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    leaf: torch.Tensor | None,
    out_features: int,
    wire_dtype: str | None,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return Y, and the token of what is kept for the backward pass."""
    w = weight_of(weight)
    sent, options = _sent(x, w, wire_dtype)
    y = sent.new_empty((*x.shape[:-1], out_features))
    # Within a backward pass, this is a forward pass of activation checkpointing. The
    # X that was kept at first is there for the gradient.
    kept = keep and leaf is not None and torch._C._current_graph_task_id() == -1
    _, context = with_room(
        w.session,
        lambda: w.session.forward(sent, w.tensor.T, keep=kept, out=y, **options),
    )
    y = y.to(x.dtype)
    if leaf is None:
        return y, torch.zeros((), dtype=torch.int64)
    if context is None:
        context = _context(None, x, w, options)
    # Autograd holds X, or makes it anew where activations are checkpointed.
    context.local_x = None
    return y, token_of(KeptX(w.session, context, kept=kept))


def _shapes_of_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    leaf: torch.Tensor | None,
    out_features: int,
    wire_dtype: str | None,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    y = x.new_empty((*x.shape[:-1], out_features))
    return y, torch.empty((), dtype=torch.int64)


def _refuse_transform(*_: object) -> Any:
    raise NotImplementedError(
        "torch.func cannot transform a layer whose weight is kept on a server: use"
        " gradwire.torch.linear(x, w, client=client), or make the layer local with"
        " gradwire.torch.to_local"
    )


class _Product(torch.autograd.Function):
    """The product with its gradients.

    Its form, without `setup_context`, has `torch.func` refuse it in compiled code.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *more: Any) -> Any:
        with below_autograd():
            y, token = _multiply(x, *more)
        ctx.weight, ctx.leaf, _, ctx.wire_dtype, _ = more
        # Not with save_for_backward: activation checkpointing would make it anew, and
        # drop what the first forward pass has kept.
        ctx.token = token
        ctx.in_features = x.shape[-1]
        ctx.save_for_backward(None if ctx.leaf is None else x)
        return y, token

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor, _: object) -> tuple[Any, ...]:
        needs_dx = ctx.needs_input_grad[0]
        (x,) = ctx.saved_tensors
        found = _differentiate(
            dy,
            x,
            ctx.weight,
            ctx.leaf,
            ctx.token,
            ctx.in_features,
            ctx.wire_dtype,
            needs_dx,
        )
        # The leaf's gradient is always 0. A compiler must think that it is computed
        # here: it leaves out what nothing depends on.
        dx = found.pop(0) if needs_dx else None
        of_leaf = found.pop().detach() if ctx.leaf is not None else None
        return (dx, None, of_leaf, None, None, None)


_multiply = define(
    "layer_product(Tensor x, Tensor weight, Tensor? leaf, int out_features,"
    " str? wire_dtype, bool keep) -> (Tensor, Tensor)",
    _compute_product,
    _shapes_of_product,
    _Product,
)
torch.library.register_vmap("gradwire::layer_product", _refuse_transform)


def _refuse_transforms() -> None:
    # A compiler cannot trace the question. There, the operator refuses, or PyTorch.
    compiling = torch.compiler.is_compiling()
    if not compiling and torch._C._functorch.peek_interpreter_stack() is not None:
        _refuse_transform()


def _compute_gradients(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor,
    leaf: torch.Tensor | None,
    token: torch.Tensor,
    in_features: int,
    wire_dtype: str | None,
    dx: bool,
) -> list[torch.Tensor]:
    """Add dW to the weight's gradient, if it is wanted, and return dX, if it is."""
    w = weight_of(weight)
    results: list[torch.Tensor]
    results = [] if leaf is None else [leaf.new_zeros(())]
    adds = x is not None and _is_wanted(w)
    if not dx and not adds:
        return results
    sent, options = _sent(dy, w, wire_dtype)
    kept = held_by(token)
    context = _context(None, dy, w, options)
    if adds:
        local_x, _ = _sent(x, w, wire_dtype)
        if kept is None or kept.contributed:
            # With retain_graph, each pass is a contribution of its own.
            context = _context(local_x, dy, w, options)
        elif kept.context.x is None:
            context = dataclasses.replace(kept.context, x=local_x)
        else:
            context = dataclasses.replace(kept.context, local_x=local_x)
        options["result_dtype"] = {"dw": w.tensor.dtype}
        w.touched = True
        contributed(w)
    out = sent.new_empty((*dy.shape[:-1], in_features)) if dx else None
    w.session.backward(
        context, sent, into=w.gradient if adds else None, dx=dx, out=out, **options
    )
    if adds and kept is not None:
        kept.used()
    return results if out is None else [out.to(dy.dtype), *results]


def _shapes_of_gradients(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor,
    leaf: torch.Tensor | None,
    token: torch.Tensor,
    in_features: int,
    wire_dtype: str | None,
    dx: bool,
) -> list[torch.Tensor]:
    results = [dy.new_empty((*dy.shape[:-1], in_features))] if dx else []
    return results if leaf is None else [*results, leaf.new_empty(())]


class _Gradients(torch.autograd.Function):
    """The gradients. Theirs are an error: otherwise they would be silently 0."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        with below_autograd():
            return tuple(_differentiate(*inputs))

    @staticmethod
    def backward(ctx: Any, *_: object) -> Any:
        raise NotImplementedError(
            "a layer whose weight is kept on a server has no second derivatives:"
            " gradwire.torch.linear(x, w, client=client) has, or make the layer local"
            " with gradwire.torch.to_local"
        )


_differentiate = define(
    "layer_gradients(Tensor dy, Tensor? x, Tensor weight, Tensor? leaf, Tensor token,"
    " int in_features, str? wire_dtype, bool dx) -> Tensor[]",
    _compute_gradients,
    _shapes_of_gradients,
    _Gradients,
)


def _is_wanted(weight: Weight) -> bool:
    """Return whether the backward pass that runs wants the weight's gradient.

    That of torch.autograd.grad(loss, inputs) does not, as for other leaves.
    """
    if torch._C._current_graph_task_id() == -1:
        return True  # compiled together with the passes of the engine
    wanted: bool = torch._C._will_engine_execute_node(weight.leaf_node)
    return wanted


def _context(
    x: Any, like: torch.Tensor, weight: Weight, options: Mapping[str, Any]
) -> Context:
    """Return a context with an X that is not kept, of as many rows as a tensor has."""
    lead, wire_dtype = tuple(like.shape[:-1]), options.get("wire_dtype")
    return Context(x, weight.tensor.T, lead, None, wire_dtype)


def _sent(
    x: torch.Tensor, weight: Weight, wire_dtype: str | None
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return rows in a dtype in which W is kept, and the job's options."""
    x = x.detach()
    if x.dtype is torch.float32 and wire_dtype is not None:
        return x, {"wire_dtype": wire_dtype}
    if label_of(x.dtype) in (weight.tensor.dtype, weight.tensor.compute_dtype):
        return x, {}
    return x.to(getattr(torch, weight.tensor.dtype)), {}
